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

from scout_hf.eval.bench import readme as bench
from scout_hf.eval.fidelity import tables as fidelity
from scout_hf.eval.methods import plots, tables, view
from scout_hf.eval.records import kind_of, read_record, shown
from scout_hf.eval.report.find import find
from scout_hf.eval.tables import Grid
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
TEMPLATE = """\
{% macro spans(text) %}{% for kind, part in text | spans -%}
{% if kind == "code" %}<code>{{ part }}</code>{% elif kind == "bold" %}<b>{{ part }}</b>{% else %}{{ part }}{% endif %}
{%- endfor %}{% endmacro -%}
<!doctype html><html lang=en><meta charset=utf-8><title>scout_hf</title><style>{{ style }}</style>
<h1>scout_hf: what was measured</h1>
<p class=note>Made on {{ day }} from {{ names | join(", ") }}.</p>
{% for section in sections %}<h2>{{ section.title }}</h2>
{% for part in section.parts %}
{%- if part.rows %}<table><thead><tr>
{%- for name in part.names -%}
<th{% if part.words[loop.index0] %} class=words{% endif %}>{{ spans(name) }}</th>
{%- endfor -%}
</tr></thead><tbody>
{% for row in part.rows %}<tr>
{%- for cell in row %}<td{% if part.words[loop.index0] %} class=words{% endif %}>{{ spans(cell) }}</td>{% endfor -%}
</tr>
{% endfor %}</tbody></table>
{% elif part.images %}<div class=pair>
{%- for name, data in part.images %}<img alt="{{ name }}" src="data:image/png;base64,{{ data }}">{% endfor -%}
</div>
{% elif part.text %}<p{% if part.note %} class=note{% endif %}>{{ spans(part.text) }}</p>
{% endif %}{% endfor %}{% endfor %}"""
"""Nothing but this makes markup, and everything that it is given is escaped."""

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
COMMANDS = bench.COMMANDS | {"fidelity": fidelity.COMMAND}
PARTS = bench.PARTS | {"fidelity": fidelity.parts}


class Part(NamedTuple):
    """A table, pictures or a paragraph; in words ``code`` stands in backticks, and what is bold is a ``Bold``."""

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

    Raises
    ------
    ConfigError
        If there is none among them, or one is not as it was written.
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
    known = {"style": STYLE, "day": time.strftime("%Y-%m-%d"), "names": [path.name for path in records]}
    return _template().render(sections=sections, **known)


@functools.lru_cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["spans"] = _spans
    return environment.from_string(TEMPLATE)


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
        told = (view.predicted(record), view.without(view.at(record, place)), view.unasked(record))
        yield Part(f"{LEGEND} {' '.join(filter(None, told))}", note=True)
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
    told = [form.format(facts[name]) for name, form in SHOWN.items() if facts.get(name)]
    return ", ".join(told) or "see the record"
