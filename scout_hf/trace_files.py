"""A recorded timeline as a JSON file of Chrome trace events, which Perfetto opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scout_hf.files import write_text
from scout_hf.trace import COPIES, LINK, MAIN, POOL, SLOW_CPU, Span

_ORDER = (MAIN, "GPU", POOL, COPIES, LINK, SLOW_CPU)


def lanes_of(spans: list[Span]) -> list[str]:
    """The lanes of these spans, top to bottom."""
    lanes = {span.lane for span in spans}
    return sorted(lanes, key=lambda lane: (_ORDER.index("GPU" if lane.startswith("GPU") else lane), lane))


def trace_events(spans: list[Span]) -> list[dict[str, Any]]:
    """Events in Chrome's trace event format, in microseconds since the first step.

    Arrows ("flow events") lead from where a job was submitted to the job.
    """
    origin = min((span.begin for span in spans), default=0)
    lanes = lanes_of(spans)
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {"name": "scout_hf"}}
    ]
    for number, lane in enumerate(lanes, 1):
        events.append({"ph": "M", "name": "thread_name", "pid": 1, "tid": number, "args": {"name": lane}})
        events.append({"ph": "M", "name": "thread_sort_index", "pid": 1, "tid": number, "args": {"sort_index": number}})
    arrows: list[dict[str, Any]] = []
    for span in sorted(spans, key=lambda span: (span.begin, -span.end)):
        name = span.kind if span.layer is None else f"{span.kind} {span.layer}"
        where = {"pid": 1, "tid": lanes.index(span.lane) + 1}
        when = {"ts": (span.begin - origin) / 1e3, "dur": max(0, span.end - span.begin) / 1e3}
        event = {"ph": "X", "name": name, "cat": span.kind, **where, **when}
        events.append(event if span.layer is None else event | {"args": {"layer": span.layer}})
        if span.lane in (POOL, COPIES) and span.submitted is not None:
            arrow = {"name": "started", "cat": span.kind, "pid": 1, "id": len(arrows)}
            main = {"ph": "s", "tid": lanes.index(MAIN) + 1, "ts": (span.submitted - origin) / 1e3}
            arrows += [arrow | main, arrow | {"ph": "f", "bp": "e", "tid": where["tid"], "ts": when["ts"]}]
    return events + arrows


def write(spans: list[Span], path: Path) -> None:
    """Write the events of these spans as JSON."""
    write_text(path, json.dumps({"traceEvents": trace_events(spans), "displayTimeUnit": "ms"}) + "\n")
