"""A picture of the last step of a timeline, one row per lane."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scout_hf.errors import ConfigError
from scout_hf.files import whole_file
from scout_hf.trace import COPIES, LINK, MAIN, POOL, SLOW_CPU, Span
from scout_hf.trace_files import lanes_of

COLOURS = {
    "layer": "#e8e8e8",
    "ahead": "#9467bd",
    "attend": "#6baed6",
    "join": "#d62728",
    "settle": "#8c8c8c",
    "attention": "#2ca02c",
    "copy": "#ff7f0e",
}
MEANINGS = {
    "layer": "a layer, all of it",
    "ahead": "predict, select, start the next layer's CPU job",
    "attend": "attend, fuse",
    "join": "wait for the CPU or a copy",
    "settle": "write back, recall",
    "attention": "the CPU's share of a layer",
    "copy": "a copy between the tiers",
}
# Drawing order: waiting is part of attending, which is part of a layer.
HEIGHTS = {"layer": 0.86, "ahead": 0.5, "attend": 0.5, "settle": 0.5, "join": 0.36, "attention": 0.4, "copy": 0.4}
JOBS = (POOL, COPIES, LINK, SLOW_CPU)
INCHES_PER_LAYER, NARROWEST, WIDEST = 0.8, 14, 40
CHARACTER = 0.07
"""Width of a character of the labels, in inches."""


def draw(spans: list[Span], path: Path, about: str = "") -> None:
    """Draw the last step; ``about`` is the start of the title.

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
            f"{path} needs matplotlib: pip install 'scout_hf[bench]'; the timeline itself was written beside it"
        ) from error
    last = [span for span in spans if span.kind == "step"][-1]
    shown = [span for span in spans if span.end > last.begin and span.begin < last.end and span.kind in COLOURS]
    lanes, length = lanes_of([last, *shown]), (last.end - last.begin) / 1e6
    wide = INCHES_PER_LAYER * sum(span.kind == "layer" and span.lane == MAIN for span in shown)
    wide = min(max(wide, NARROWEST), WIDEST)
    figure = Figure(figsize=(wide, 1.7 + 0.85 * len(lanes)), layout="constrained", dpi=140)
    axes = figure.subplots()
    axes.set(xlabel="ms", xlim=(0, length), ylim=(len(lanes) - 0.4, -0.7), yticks=range(len(lanes)), yticklabels=lanes)
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)

    for span in sorted(shown, key=lambda span: list(HEIGHTS).index(span.kind)):
        row, high, colour = lanes.index(span.lane), HEIGHTS[span.kind], COLOURS[span.kind]
        # At least as wide as a line; emulated jobs are adjacent, so they get white edges.
        edge = {"layer": "#999999"}.get(span.kind, "white" if span.lane in (LINK, SLOW_CPU) else colour)
        at = (span.begin - last.begin) / 1e6, (span.end - span.begin) / 1e6
        axes.broken_barh([at], (row - high / 2, high), color=colour, edgecolor=edge, lw=0.7)
        if span.lane in (POOL, COPIES) and span.submitted is not None:
            asked = (span.submitted - last.begin) / 1e6
            axes.plot([asked, at[0]], [lanes.index(MAIN) + 0.25, row - high / 2], color=colour, lw=0.8, alpha=0.7)
    for lane in lanes:
        parts = [span for span in shown if span.lane == lane and (span.kind == "layer" or lane in JOBS)]
        _label(axes, parts, last, lanes.index(lane), length / (0.88 * wide))

    kinds = [kind for kind in COLOURS if any(span.kind == kind for span in shown)]
    handles = [Patch(color=COLOURS[kind], label=MEANINGS[kind]) for kind in kinds]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    title = f"{about + ': ' if about else ''}a decode step of {length:.2f} ms"
    title += "; jobs are labelled with their layer, lines show where they were submitted"
    axes.set_title(title, fontsize=10, loc="left")
    with whole_file(path, binary=True) as file:
        figure.savefig(file, format="png")


def _label(axes: Any, spans: Iterable[Span], step: Span, row: int, ms_per_inch: float) -> None:
    """Label layers where there is space, and jobs by layer number, on two levels if they are close."""
    taken = [-1e9, -1e9]
    for span in sorted(spans, key=lambda span: span.begin):
        if span.layer is None:
            continue
        begin, end = ((at - step.begin) / 1e6 for at in (span.begin, span.end))
        if span.kind == "layer":
            width = (end - begin) / ms_per_inch / CHARACTER
            text = next((name for name in (f"layer {span.layer}", str(span.layer)) if len(name) < width), "")
            axes.text((begin + end) / 2, row - 0.47, text, ha="center", va="bottom", fontsize=7)
            continue
        text, middle = str(span.layer), max((begin + end) / 2, 0)
        half = (len(text) + 1) * CHARACTER * ms_per_inch / 2
        for level, right in enumerate(taken):
            if middle - half >= right:
                axes.text(middle, row + 0.22 + 0.14 * level, text, ha="center", va="top", fontsize=7)
                taken[level] = middle + half
                break
