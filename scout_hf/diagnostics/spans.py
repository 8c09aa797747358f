"""Figures about decode steps from the spans of a trace."""

from __future__ import annotations

from collections.abc import Sequence

from scout_hf.trace import Span

MOVERS = ("attention", "copy")
"""Kinds of spans of jobs that run in the background."""


def parts_of_spans(spans: Sequence[Span]) -> dict[str, float | int]:
    """Times and overlap of the decode steps in a trace.

    Parameters
    ----------
    spans : sequence of Span
        ``trace.spans``, with at least one step.

    Returns
    -------
    dict of str to float or int
        ``steps``; per step ``step_ms``, and ``wait_ms``: the main thread's wait for the CPU or a copy. For each kind in
        ``MOVERS`` that has jobs: ``<kind>_jobs`` and ``<kind>_ms`` per step; ``<kind>_hidden``, the share of that time
        in which the main thread did not wait; ``<kind>_ahead``, the share of jobs submitted before their layer began.

    Examples
    --------
    >>> with handle.trace("step.json") as trace:
    ...     tokens = model.generate(**inputs, max_new_tokens=8)
    >>> parts_of_spans(trace.spans)["steps"]
    2
    """
    whole = [span for span in spans if span.kind == "step"]
    waits = [span for span in spans if span.kind == "join"]
    found: dict[str, float | int] = {"steps": len(whole), "step_ms": _ms(whole) / len(whole)}
    found["wait_ms"] = _ms(waits) / len(whole)
    for kind in MOVERS:
        jobs = [span for span in spans if span.kind == kind and not span.lane.startswith("GPU")]
        # Spans of an emulated CPU or link replace those of the job that did the work.
        jobs = [span for span in jobs if "emulated" in span.lane] or jobs
        if jobs:
            waited = sum(_both(job, wait) for job in jobs for wait in waits) / 1e6
            begins = [(job.submitted, _layer_begin(spans, whole, job)) for job in jobs]
            ahead = [asked < begin for asked, begin in begins if asked is not None and begin is not None]
            found |= {f"{kind}_jobs": len(jobs) / len(whole), f"{kind}_ms": _ms(jobs) / len(whole)}
            found |= {f"{kind}_hidden": 1 - waited / max(_ms(jobs), 1e-9)}
            found |= {f"{kind}_ahead": sum(ahead) / max(len(ahead), 1)}
    return found


def _ms(spans: Sequence[Span]) -> float:
    return sum(span.end - span.begin for span in spans) / 1e6


def _both(one: Span, other: Span) -> int:
    return max(0, min(one.end, other.end) - max(one.begin, other.begin))


def _layer_begin(spans: Sequence[Span], steps: Sequence[Span], job: Span) -> int | None:
    """When the layer of a job began, in the step in which the job was submitted."""
    step = next((step for step in steps if job.submitted is not None and step.begin <= job.submitted <= step.end), None)
    layers = [span.begin for span in spans if span.kind == "layer" and span.layer == job.layer]
    return None if step is None else next((begin for begin in layers if step.begin <= begin <= step.end), None)
