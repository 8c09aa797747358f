"""``scout-hf report``: the records of a folder as one self-contained HTML page."""

from __future__ import annotations

import base64
import functools
import io
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from scout_hf.eval.bench import gpu_report
from scout_hf.eval.bench import readme as bench
from scout_hf.eval.language import report as fidelity
from scout_hf.eval.methods import plots, tables, view
from scout_hf.eval.records import kind_of, read_record, shown
from scout_hf.eval.report.find import find
from scout_hf.eval.tables import Grid
from scout_hf.files import write_text

TITLES = {
    "methods": "Every method, side by side",
    "fidelity": "What is lost",
    "cpu_decode": "Decoding without a GPU",
    "cpu_kernel": "Attention over scattered blocks",
    "gpu": "On a GPU",
    "sessions": "Sessions on disk",
    "rivals": "Beside other runtimes",
    "drafts": "Lossless drafts over a slow link",
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
COMMANDS = bench.COMMANDS | {"fidelity": fidelity.COMMAND, "gpu": "scout-hf bench gpu"}
PARTS = bench.PARTS | {"fidelity": fidelity.parts, "gpu": gpu_report.gpu_tables}


class Part(NamedTuple):
    """A table, pictures or a paragraph; in text ``code`` is in backticks, and what is bold is a ``Bold``."""

    text: str | tuple[str, ...] = ""
    note: bool = False
    names: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    words: Sequence[bool] = ()
    images: Sequence[tuple[str, str]] = ()


class Section(NamedTuple):
    """What is said of one record."""

    title: str
    parts: Sequence[Part]


class Bold(str):
    """A part of a paragraph."""


def write(given: Sequence[Path], out: Path) -> list[str]:
    """Make the page of these records, files or folders of them; which were used.

    ConfigError if there is none among them, or one is not as it was written.
    """
    records = {path: read_record(path) for path in find(given)}
    page = render(records)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page)
    return [str(path) for path in records]


def render(records: dict[Path, dict[str, Any]]) -> str:
    """The page; ConfigError for a record that does not hang together."""
    sections = []
    for path, record in records.items():
        with shown(path):
            kind = kind_of(record)
            sections.append(Section(TITLES.get(kind, kind), list(_parts(path, kind, record))))
    known = {"day": time.strftime("%Y-%m-%d"), "names": [path.name for path in records]}
    return _template().render(sections=sections, **known)


@functools.lru_cache
def _template() -> jinja2.Template:
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=folder, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["spans"] = _spans
    return environment.get_template("page.html.jinja")


def _parts(path: Path, kind: str, record: dict[str, Any]) -> Iterator[Part]:
    if kind == "methods":
        yield from _methods(record)
    else:
        yield from map(_part, PARTS[kind](record)) if kind in PARTS else ()
        if pictures := sorted(path.parent.glob(f"{kind}*.png")):
            yield from (_images([(picture.stem, picture.read_bytes())]) for picture in pictures)
    if kind in COMMANDS:
        typed = " and ".join(f"`{one}`" for one in record.get("commands") or [COMMANDS[kind]])
        yield Part(f"Made by {typed}; {_machine(record)}.", note=True)


def _methods(record: dict[str, Any]) -> Iterator[Part]:
    place = view.widest(record, view.main_shape(record))
    if place is not None:
        settings = record["settings"]
        yield Part(
            (
                f"{view.model_of(record, place.shape)}, {place}, budget {settings['budget']}. ",
                Bold(view.emulated_sentence(record)),
                f" Scout's choice of blocks drifts synthetically, {settings['drift']:.0%} per step. "
                "Answers: a trained pocket model at 4k tokens, budget 512, with nothing emulated.",
            )
        )
        yield _part(tables.main(record, place, "method", "exact", "answers right"))
        notes = (view.predicted(record), view.without(view.at(record, place)), view.unasked(record))
        yield Part(f"{LEGEND} {' '.join(filter(None, notes))}", note=True)
    drawn = [(draw.__name__, _drawn(record, draw)) for draw in plots.ALL]
    if drawn := [(name, data) for name, data in drawn if data]:
        yield _images(drawn)
    yield from map(_part, tables.further(record))


def _drawn(record: dict[str, Any], draw: Callable[..., bool]) -> bytes | None:
    """A plot as PNG; None where there is nothing to draw."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 4.2), layout="constrained", dpi=150)
    if not draw(record, figure.subplots()):
        return None
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()


def _images(pictures: Sequence[tuple[str, bytes]]) -> Part:
    return Part(images=[(name, base64.b64encode(data).decode()) for name, data in pictures])


def _part(part: Grid | str) -> Part:
    if isinstance(part, str):
        return Part(part)
    # A column without figures holds words.
    words = [not any(cell[:1].isdigit() for cell in column) for column in zip(*part.rows)]
    return Part(names=part.names, rows=part.rows, words=words)


def _spans(text: str | tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """A paragraph in parts: bold, code where backticks are, and plain."""
    for one in (text,) if isinstance(text, str) else text:
        if isinstance(one, Bold):
            yield "bold", str(one)
        else:
            yield from (("code" if place % 2 else "", part) for place, part in enumerate(one.split("`")) if part)


def _machine(record: dict[str, Any]) -> str:
    facts = record.get("machine") or {}
    shown = [form.format(facts[name]) for name, form in SHOWN.items() if facts.get(name)]
    return ", ".join(shown) or "see the record"
