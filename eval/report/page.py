"""``scout-hf report``: the records of a folder as one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import io
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from scout_hf.eval.bench import readme as bench_readme
from scout_hf.eval.bench.formats import short
from scout_hf.eval.fidelity import readme as fidelity_readme
from scout_hf.eval.methods import plots, tables, view
from scout_hf.eval.reading import read_json
from scout_hf.files import write_text

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1140px; margin: 2rem auto; padding: 0 1rem }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e5e5e5; text-align: right }
th:first-child, td:first-child, .words { text-align: left }
td { white-space: nowrap } thead th { border-bottom: 2px solid #999 }
.note { color: #666; font-size: 13px } img { max-width: 100%; height: auto }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem } code { background: #f4f4f4; padding: 0 .2em }
"""
FILES = ("methods", "fidelity", "cpu_decode", "cpu_kernel", "gpu_decode", "gpu_kernel")
TITLES = {
    "methods": "Every method, side by side",
    "fidelity": "What is lost",
    "cpu_decode": "Decoding without a GPU",
    "cpu_kernel": "Attention over scattered blocks",
    "gpu_decode": "Decoding on a GPU",
    "gpu_kernel": "The kernel on a GPU",
}
LEGEND = (
    "step ms: mean time of a decode step of all rows, with its quartiles; x stock: how much faster than stock, by its "
    "faster attention; "
    "device and host MiB: KV, digests and buffers held; link MB: what crosses to the device per step; wait ms: waiting "
    "for CPU or link; CPU ms: CPU time of all threads per step."
)
SHOWN = {
    "cpu": "{}",
    "isa": "{}",
    "cpus": "{} CPUs",
    "memory_gib": "{} GiB of memory",
    "system": "{}",
    "torch": "torch {}",
    "transformers": "transformers {}",
    "scout_hf": "scout_hf {}",
    "commit": "commit {}",
}
COMMANDS = bench_readme.COMMANDS | {"fidelity": fidelity_readme.COMMAND}
TEXTS = {name: bench_readme.markdown for name in bench_readme.COMMANDS} | {"fidelity": fidelity_readme.markdown}


def write(given: Sequence[Path], out: Path) -> list[str]:
    """Make the page of these records, files or folders of them; which were used.

    Raises
    ------
    ValueError
        If there is none among them.
    """
    paths = [path for one in given for path in ([one] if one.is_file() else [one / f"{name}.json" for name in FILES])]
    if missing := [path for path in given if not path.exists()]:
        raise ValueError(f"{missing[0]} is not there; give JSON files of `scout-hf bench` or `fidelity`, or folders")
    records = {path: read_json(path) for path in paths if path.exists()}
    for path, record in records.items():
        if _name(record) not in TEXTS:
            raise ValueError(f"{path} is no result of `scout-hf bench` or `scout-hf fidelity`: leave it out")
    if not records:
        names = ", ".join(f"{name}.json" for name in FILES)
        raise ValueError(f"no results in {', '.join(map(str, given))}; looked for {names}: run `scout-hf bench` first")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, "\n".join(_page(records)))
    return [str(path) for path in records]


def _page(records: dict[Path, dict[str, Any]]) -> Iterator[str]:
    yield f"<!doctype html><html lang=en><meta charset=utf-8><title>scout_hf</title><style>{STYLE}</style>"
    yield "<h1>scout_hf: what was measured</h1>"
    yield f"<p class=note>Made on {time.strftime('%Y-%m-%d')} from {', '.join(path.name for path in records)}.</p>"
    for path, record in records.items():
        name = _name(record)
        yield f"<h2>{html.escape(TITLES.get(name, name))}</h2>"
        if name == "methods":
            yield from _methods(record)
        else:
            yield from _markdown(TEXTS[name](record)) if name in TEXTS else ()
            for picture in sorted(path.parent.glob(f"{name}*.png")):
                yield _image(picture.read_bytes(), picture.stem)
        if name in COMMANDS:
            typed = " and ".join(f"<code>{html.escape(one)}</code>" for one in _commands(name, record))
            yield f"<p class=note>Made by {typed}; {_machine(record)}.</p>"


def _name(record: dict[str, Any]) -> str:
    """Which benchmark a record is of; the study of fidelity does not say."""
    return record.get("benchmark") or ("fidelity" if "study" in record else "")


def _methods(record: dict[str, Any]) -> Iterator[str]:
    place = tables.widest(record, view.main_shape(record))
    if place is not None:
        cells, settings = view.measured(view.at(record, place)), record["settings"]
        names = ("method", "exact", "answers right", *tables.COLUMNS)
        yield (
            f"<p>{_inline(tables.model_of(record, place))}, {short(place.context)} tokens, batch {place.batch}, "
            f"budget {settings['budget']}. <b>{html.escape(view.emulated_sentence(record))}</b> "
            f"Scout's choice of blocks drifts synthetically, {settings['drift']:.0%} per step. "
            "Answers: a trained pocket model at 4k tokens, budget 512, with nothing emulated.</p>"
        )
        yield from _table(names, [tables.row(record, one, cells) for one in cells])
        told = (view.predicted(record), tables.without(view.at(record, place)), view.unasked(record))
        yield f"<p class=note>{LEGEND} {_inline(' '.join(filter(None, told)))}</p>"
    drawn = [(draw.__name__, _drawn(record, draw)) for draw in plots.ALL]
    yield f"<div class=pair>{''.join(_image(data, name) for name, data in drawn if data)}</div>"
    yield from _markdown("\n".join(tables.further(record)))


def _drawn(record: dict[str, Any], draw: Callable[..., bool]) -> bytes | None:
    """A plot as PNG; None where there is nothing to draw."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 4.2), layout="constrained", dpi=150)
    if not draw(record, figure.subplots()):
        return None
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()


def _image(data: bytes, name: str) -> str:
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    kinds = [" class=words" if _is_words(column) else "" for column in zip(*rows)]
    heads = "".join(f"<th{kind}>{_inline(name)}</th>" for name, kind in zip(names, kinds))
    yield f"<table><thead><tr>{heads}</tr></thead><tbody>"
    for row in rows:
        yield "<tr>" + "".join(f"<td{kind}>{_inline(cell)}</td>" for cell, kind in zip(row, kinds)) + "</tr>"
    yield "</tbody></table>"


def _is_words(cells: Sequence[str]) -> bool:
    """Whether a column holds no figures."""
    return not any(cell[:1].isdigit() for cell in cells)


def _markdown(text: str) -> Iterator[str]:
    """The tables and paragraphs that the project's own generators make; nothing else of Markdown."""
    block: list[str] = []
    for row in [*text.splitlines(), ""]:
        if row.strip():
            block.append(row)
            continue
        if block and block[0].startswith("|"):
            cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block]
            yield from _table(cells[0], cells[2:])
        elif block:
            yield f"<p>{_inline(' '.join(block))}</p>"
        block = []


def _inline(text: str) -> str:
    parts = html.escape(text, quote=False).split("`")
    return "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))


def _commands(name: str, record: dict[str, Any]) -> list[str]:
    """As they were typed, where the record says so."""
    return record.get("commands") or [COMMANDS[name]]


def _machine(record: dict[str, Any]) -> str:
    facts = record.get("machine") or {}
    told = [form.format(facts[name]) for name, form in SHOWN.items() if facts.get(name)]
    return html.escape(", ".join(told) or "see the record")
