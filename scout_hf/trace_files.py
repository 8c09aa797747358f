"""A recorded timeline as Chrome trace events, which Perfetto opens, and as a picture."""

from __future__ import annotations

import json
import os
from pathlib import Path

from scout_hf.errors import ConfigError
from scout_hf.trace import LANES, Span

COLOURS = {
    "layer": "#e5e5e5",
    "ahead": "#9467bd",
    "attend": "#1f77b4",
    "join": "#d62728",
    "settle": "#8c8c8c",
    "attention": "#2ca02c",
    "copy": "#ff7f0e",
}
MEANINGS = {
    "layer": "a layer, all of it",
    "ahead": "predict, select, start the next layer's share",
    "attend": "attend",
    "join": "wait for the CPU or a copy",
    "settle": "write back, recall",
    "attention": "the CPU's share",
    "copy": "a copy between the tiers",
}


def write(spans: list[Span], path: Path) -> None:
    """Chrome's trace event format, times in microseconds from the first step on; a reader never sees half a file."""
    origin = min(span.begin for span in spans)
    lanes = [lane for lane in LANES if any(span.lane == lane for span in spans)]
    events: list[dict] = [{"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {"name": "scout_hf"}}]
    for number, lane in enumerate(lanes, 1):
        events.append({"ph": "M", "name": "thread_name", "pid": 1, "tid": number, "args": {"name": lane}})
        events.append({"ph": "M", "name": "thread_sort_index", "pid": 1, "tid": number, "args": {"sort_index": number}})
    for span in sorted(spans, key=lambda span: (span.begin, -span.end)):
        name = span.kind if span.layer is None else f"{span.kind} {span.layer}"
        event = {"ph": "X", "name": name, "cat": span.kind, "pid": 1, "tid": lanes.index(span.lane) + 1}
        event |= {"ts": (span.begin - origin) / 1e3, "dur": max(0, span.end - span.begin) / 1e3}
        events.append(event if span.layer is None else event | {"args": {"layer": span.layer}})
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n")
    os.replace(scratch, path)


def draw(spans: list[Span], path: Path) -> None:
    """The last step as a picture: one row per lane, layers as numbers.

    Raises
    ------
    ConfigError
        Without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ConfigError(
            f"{path} takes matplotlib: pip install 'scout_hf[bench]'; the timeline itself was written beside it"
        ) from error
    last = [span for span in spans if span.kind == "step"][-1]
    shown = [span for span in spans if span.end > last.begin and span.begin < last.end and span.kind != "step"]
    lanes = [lane for lane in LANES if any(span.lane == lane for span in shown)]
    figure = Figure(figsize=(14, 1.6 + 0.75 * len(lanes)), layout="constrained", dpi=140)
    axes = figure.subplots()
    for span in sorted(shown, key=lambda span: span.kind != "layer"):
        begin, width = (span.begin - last.begin) / 1e6, (span.end - span.begin) / 1e6
        place = lanes.index(span.lane)
        high = 0.84 if span.kind == "layer" else 0.5
        edge = "#999999" if span.kind == "layer" else "none"
        axes.broken_barh([(begin, width)], (place - high / 2, high), color=COLOURS[span.kind], edgecolor=edge, lw=0.6)
        if span.kind == "layer":
            axes.text(begin + width / 2, place - 0.47, f"layer {span.layer}", ha="center", va="bottom", fontsize=7)
        elif span.kind in ("attention", "copy"):
            axes.text(begin + width / 2, place - 0.27, str(span.layer), ha="center", va="bottom", fontsize=7)
    kinds = [kind for kind in COLOURS if any(span.kind == kind for span in shown)]
    handles = [Patch(color=COLOURS[kind], label=MEANINGS[kind]) for kind in kinds]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    axes.set_yticks(range(len(lanes)), lanes)
    axes.set(xlabel="ms", xlim=(0, (last.end - last.begin) / 1e6), ylim=(len(lanes) - 0.4, -0.65))
    axes.set_title("one decode step; numbers tell the layer that a job is for", fontsize=10, loc="left")
    axes.grid(alpha=0.3, axis="x")
    scratch = path.with_name(path.name + ".part")
    figure.savefig(scratch, format="png")
    os.replace(scratch, path)
