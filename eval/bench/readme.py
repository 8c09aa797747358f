"""The tables of speed in docs/results, made from the JSON of the benchmarks.

``python -m scout_hf.eval.bench.readme PAGE FOLDER`` makes those of a page again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scout_hf.eval.bench import drafts_report, rivals_report, sessions_report
from scout_hf.eval.markdown import between_marks, to_markdown, update
from scout_hf.eval.methods import tables as methods
from scout_hf.eval.records import read_record
from scout_hf.eval.tables import Grid, short

MODES = {
    "stock": "stock `sdpa`",
    "stock folded": "stock with the GQA group folded",
    "scout": "scout_hf, budget 2048",
    "scout exact": "scout_hf, `budget=None`",
    "scout int8": "scout_hf, int8",
}
KERNELS = {"native": "native", "read": "bare read of the same tiles", "torch": "torch", "int8": "int8"}
KINDS = {"rivals_int8": "rivals"}
"""Of records whose file has another name than their benchmark."""
SHOWN = (4096, 16384)
"""Selected tokens of the kernel's table."""


def _decode(record: dict[str, Any]) -> Iterator[Grid | str]:
    # Older records have no exact mode.
    shown = {name: title for name, title in MODES.items() if name in record["contexts"][0]["modes"]}
    table = Grid("", ("context", *shown.values()))
    for row in record["contexts"]:
        table.add(short(row["context"]), *(f"{row['modes'][name]['median_ms']:.0f} ms" for name in shown))
    yield table
    prompt, share = record["prefill"], {one["kind"]: one for one in record["memory"]}
    if prompt and share:
        scout, int8 = share["scout"], share["scout int8"]
        limit = ""
        if "limit_ms" in prompt:
            shares = [f"{prompt['limit_ms'] / prompt[name]['median_ms']:.0%}" for name in ("scout", "stock")]
            limit = f" ({shares[0]} of the rate at which torch multiplies matrices, stock {shares[1]})"
        prompts = f"{record['settings']['prefill_tokens']} tokens takes {prompt['ratios']['scout/stock']:.2f} times"
        yield (
            f"A prompt of {prompts} stock's time{limit}. Per byte of KV in bf16 the process grows by "
            f"{scout['held_share']:.2f} bytes, at most by {scout['peak_share']:.2f} ({int8['held_share']:.2f} and "
            f"{int8['peak_share']:.2f} with int8), digests included."
        )


def _kernel(record: dict[str, Any]) -> Iterator[Grid | str]:
    table = Grid("", ("selected tokens", *KERNELS.values()))
    for row in record["attend"]:
        if row["tokens"] in SHOWN:
            table.add(short(row["tokens"]), *(f"{row[name]['median_ms']:.2f} ms" for name in KERNELS))
    yield table
    normal, outliers = (record["int8_error"][kind]["int8_to_bf16"]["relative"] for kind in ("normal", "outliers"))
    yield (
        f"int8 differs from bf16 by {100 * normal:.1f} % of the output on normal data and by {100 * outliers:.1f} % "
        "with outlier channels."
    )
    chosen = record["select"]
    codes = chosen.get("sign2", {}) if chosen else {}
    if "coarse" in codes:
        times = [f"{codes[name]['median_ms']:.2f} ms" for name in ("coarse", "native", "read")]
        yield (
            f"Choosing {chosen['chosen']} of {chosen['blocks']} blocks by `sign2` codes, as a step does it, takes "
            f"{times[0]}; by whole codes of all blocks {times[1]}; a bare read of the codes {times[2]}."
        )


PARTS = {
    "cpu_decode": _decode,
    "cpu_kernel": _kernel,
    "methods": methods.parts,
    "sessions": sessions_report.parts,
    "rivals": rivals_report.parts,
    "drafts": drafts_report.parts,
}
COMMANDS = {
    "cpu_decode": "scout-hf bench cpu-decode",
    "cpu_kernel": "scout-hf bench cpu-kernel",
    "methods": methods.COMMAND,
    "sessions": "scout-hf bench sessions",
    "rivals": "scout-hf bench rivals",
    "rivals_int8": 'scout-hf bench rivals --weights "torch int8"',
    "drafts": "scout-hf bench drafts",
}


def markdown(record: dict[str, Any]) -> str:
    """The tables of a record of one of the benchmarks."""
    return to_markdown(PARTS[record["benchmark"]](record))


def main(page: str, folder: str) -> None:
    """Bring those tables of a page up to date that it has a place for, from the records in a folder."""
    text = Path(page).read_text(encoding="utf-8")
    placed = {name: command for name, command in COMMANDS.items() if between_marks(text, command)}
    for name, command in (placed or COMMANDS).items():
        path = Path(folder) / f"{name}.json"
        if not path.is_file():
            print(f"{name}: no {path}")
            continue
        changed = update(Path(page), command, markdown(read_record(path, KINDS.get(name, name))))
        print(f"{name}: {page} {'changed' if changed else 'is up to date'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
