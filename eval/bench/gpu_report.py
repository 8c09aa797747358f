"""The table of ``bench gpu``, for a terminal of 80 columns: at most 60 lines, also where everything failed."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

from scout_hf.eval.bench.gpu_stages import why_none
from scout_hf.eval.tables import Grid, by, share, short, three

WIDTH, MOST_LINES = 80, 60
DECODING = ("short", "long", "wide", "offloaded")
CHECKED = ("smoke", "tests", "triton", "kernels")
RATES = {
    "GB/s of the GPU": {"copies on the GPU": "copies", "link, to the GPU": "link up", "link, to the host": "down"},
    "GB/s of the host": {"reads of host memory": "reads", "pinning memory": "pinning"},
}
"""Rates that share a line."""
_WHAT, _FOUND, _BEST = 23, 46, "full KV"
# Beside rows: heads of tables, what stands above and below all.
_HEAD, _FRAME = 4, 9
LEGEND = """\
vs full: times as fast as the faster of full KV. GPU GB: KV and digests there.
CPU: share of the chosen blocks that the CPU attends to. wait: ms per step in
which the main thread waits for the CPU or for copies.
"""
_place = itemgetter("batch", "context")


def gpu_tables(record: dict[str, Any]) -> Iterator[Grid | str]:
    """What was checked, then decode steps, then how each stage went, and what is missing and why."""
    yield _title(record)
    cells, used = by(record["cells"], itemgetter("stage")), _FRAME
    checks = Grid("", ("stage", "what", "found"), 3)
    checks.rows = [(stage, _cut(what, _WHAT), _cut(found, _FOUND)) for stage, what, found in _checks(cells)]
    steps = Grid("", ("rows", "arm", "ms", "q1-q3", "vs full", "tok/s", "GPU GB", "CPU", "wait"), 2)
    for name in DECODING:
        timed = [one for one in cells.get(name, ()) if one.get("median_ms")]
        for (batch, context), rows in by(timed, _place).items():
            best = min((one["median_ms"] for one in rows if one["cell"].startswith(_BEST)), default=None)
            for one in sorted(rows, key=itemgetter("median_ms")):
                steps.add(f"{batch} x {short(context)}", one["cell"], *_step_cells(one, best))
    for table in (checks, steps):
        if table.rows:
            used += _HEAD + len(table.rows)
            yield table
    yield "\n".join(_stages(record, cells, MOST_LINES - used)) + "\n"
    if steps.rows:
        yield LEGEND


def _checks(cells: dict[str, list[dict[str, Any]]]) -> Iterator[tuple[str, str, str]]:
    machine = {one["cell"]: one for one in cells.get("machine", ())}
    if one := machine.get("versions"):
        yield "machine", "versions", _found(one)
    for title, names in RATES.items():
        rates = {label: machine.get(name, {}).get("gb_per_s") for name, label in names.items()}
        if told := ", ".join(f"{label} {three(rate)}" for label, rate in rates.items() if rate):
            yield "machine", title, told
    grouped = {name for names in RATES.values() for name in names}
    for name, one in machine.items():
        shown = name not in grouped and not why_none(one)
        if name != "versions" and (shown or {"failed", "oom"} & set(one)):
            yield "machine", name, _found(one)
    for stage in CHECKED:
        for one in cells.get(stage, ()):
            yield stage, one["cell"], _found(one)


def _title(record: dict[str, Any]) -> str:
    facts, settings = record["machine"], record["settings"]
    cut = [fact for one in record["cells"] if one["cell"] == "model" for fact in one.get("facts", ())]
    model = f"{cut[0]}, random weights; " if cut else ""
    if settings["device"] == "cpu":
        place = "REHEARSAL on a CPU: it shows that all of it runs, and its times mean nothing"
    else:
        told = [fact for one in record["cells"] if one["cell"] == "cache" for fact in one.get("facts", ())]
        digest = told[0] if told else f"{settings['digest']} digest"
        place = f"{facts.get('gpu') or settings['device']}, budget {settings['budget']}, {digest}"
    names = ("torch", "triton", "transformers", "commit")
    versions = ", ".join(f"{name} {facts[name]}" for name in names if facts.get(name))
    return "\n".join([_cut(place, WIDTH), *_folded(f"{model}{versions}", 2, ""), ""])


def _found(one: dict[str, Any]) -> str:
    """What a check found, in a few words."""
    if "passed" in one:
        failures = one.get("failures", [])
        counts = f"{one['passed']} passed, {len(failures)} failed, {one['not_for_here']} skipped"
        if not one["passed"] and not failures and one["not_for_here"]:
            counts = f"all {one['not_for_here']} skip themselves here"
        why = why_none(one) or one.get("note")
        return f"{counts}; {why}" if why else counts
    if why := why_none(one):
        return why
    if "times" in one:
        return _kernel(one["times"])
    if one.get("warnings"):
        return f"! {one['warnings'][0]}"
    if "tflop_per_s" in one:
        return f"{one['tflop_per_s']:.0f} TFLOP/s"
    if "gb_per_s" in one:
        return f"{one['gb_per_s']:.1f} GB/s"
    if "difference" in one:
        return f"{one['difference']:.1%} off stock's logits; {', '.join(one.get('facts', ()))}"
    return ", ".join(one.get("facts", ())) or "done"


def _kernel(times: dict[str, Any]) -> str:
    """Ours, with its share of the rate of copies, and the others, in microseconds."""
    ours = [one for name, one in times.items() if name in ("plain", "prefetch lines", "prefetch bulk") and "us" in one]
    if not ours:
        return ", ".join(f"{name} {three(one['us'])} us" for name, one in times.items() if "us" in one)
    best = min(ours, key=itemgetter("us"))
    others = {"sdpa flash": "flash", "flashinfer": "f.infer", "gathered by torch": "gathered"}
    beside = [f"{label} {three(times[name]['us']) if 'us' in times[name] else '-'}"
              for name, label in others.items() if name in times]  # fmt: skip
    return f"{three(best['us'])} us, {share(best.get('share_of_copy'))} of copying; {', '.join(beside)}"


def _step_cells(one: dict[str, Any], best: float | None) -> list[str]:
    return [
        three(one["median_ms"]),
        f"{three(one['q1_ms'])}-{three(one['q3_ms'])}",
        three(best / one["median_ms"]) if best else "-",
        f"{one['tokens_per_s']:.0f}",
        three(one["device_kv_bytes"] / 1e9),
        share(one.get("cpu_ratio")),
        three(one.get("join_wait_ms")),
    ]


def _stages(record: dict[str, Any], cells: dict[str, list[dict[str, Any]]], most: int) -> list[str]:
    """How each stage went, in one line for those that are done, and as many reasons as there are lines for."""
    done = [f"{one['stage']} {one['seconds']:.0f}s" for one in record["stages"] if one["state"] == "done"]
    whole = _folded(f"{'done':<10} {', '.join(done)}", 2) if done else []
    lines, more = [], []
    for one in record["stages"]:
        told = _told(one, cells.get(one["stage"], []))
        if one["state"] == "done":
            more += [f"{one['stage']:<10} {text}" for text in told]
        elif one["state"] != "not run":
            lines.append(
                f"{one['stage']:<10} {one['state']}, {one['seconds']:.0f} s{': ' * bool(told)}{'; '.join(told)}"
            )
    lines += [f"{'not run':<10} {', '.join(names)}: {why}" for why, names in _not_run(record).items()]
    left, shown = most - len(whole) - len(lines), list[str]()
    for line in lines:
        parts = _folded(line, 1 + min(2, max(0, left)))
        left -= len(parts) - 1
        shown += parts
    return [*whole, *shown, *(_cut(line, WIDTH) for line in more[: max(0, left)])]


def _not_run(record: dict[str, Any]) -> dict[str, list[str]]:
    """Stages that were not run, by the first reason: not that one was not run because of another one."""
    whys = {one["stage"]: one["why"] for one in record["stages"] if one["state"] == "not run"}
    found: dict[str, list[str]] = {}
    for name in whys:
        why = whys[name]
        while (cause := why.removesuffix(" was not run")) in whys and cause != why:
            why = whys[cause]
        found.setdefault(why, []).append(name)
    return found


def _folded(text: str, most: int, indent: str = " " * 11) -> list[str]:
    """A text in at most so many lines, cut behind them."""
    parts = textwrap.wrap(text, WIDTH, subsequent_indent=indent)
    return (
        parts if len(parts) <= most else [*parts[: most - 1], _cut(f"{parts[most - 1]} {parts[most].strip()}", WIDTH)]
    )


def _told(stage: dict[str, Any], cells: list[dict[str, Any]]) -> list[str]:
    """Why figures of a stage are missing, the worst first, and what else its cells say."""
    told = [stage["why"]] if stage["why"] else []
    told += [f"not measured: {', '.join(stage['left'])}"] if stage["left"] else []
    if stage["stage"] in ("tests", "triton"):
        told += [f"out of time, {one['note']}" for one in cells if "note" in one]
    failures = by([text for one in cells for text in one.get("failures", ())], _test_of)
    told += [f"{len(texts)} x {name}: {texts[0].partition(': ')[2]}" for name, texts in failures.items()]
    if stage["stage"] in DECODING:
        gone = by([one for one in cells if why_none(one)], why_none)
        told += [f"{why} ({'; '.join(one['cell'] for one in rows)})" for why, rows in gone.items()]
        told += [f"{one['cell']}: {text}" for one in cells for text in [one.get("note"), *one.get("warnings", ())]
                 if text]  # fmt: skip
    return list(dict.fromkeys(told))


def _test_of(failure: str) -> str:
    """A test without its file and cell."""
    return failure.partition(": ")[0].split("::")[-1].partition("[")[0]


def _cut(text: str, width: int) -> str:
    """One line of at most so many characters; the whole text is in the record."""
    line = text.rstrip()
    return line if len(line) <= width else f"{line[: width - 2]}.."
