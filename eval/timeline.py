"""A model decodes and is traced: the files of ``handle.trace``, and what they say in figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel

import scout_hf
from scout_hf.diagnostics import Span, Trace
from scout_hf.eval.bench import device as devices
from scout_hf.eval.bench.formats import new_table, three
from scout_hf.eval.decode_path import tokenize
from scout_hf.eval.pocket import POCKET_MODELS, load_pocket, make_document
from scout_hf.eval.pocket.evaluate import usual_facts

MOVERS = ("attention", "copy")
EXPLAINED = (
    "Times and jobs are per step. Hidden: the share of the jobs' time in which the model did not wait for them; a "
    "layer ahead: the share of the jobs that were started before their own layer began."
)


def run(
    out: Path,
    model: str,
    context: int,
    method: str,
    options: dict[str, Any],
    steps: int,
    device: str = "cpu",
    seed: int = 0,
    console: Console | None = None,
) -> Trace:
    """Trace the last decode steps of a short generation, and print what they were made of.

    Parameters
    ----------
    out : Path
        The timeline, ending in .json; its picture lies beside it.
    model : str
        A pocket model's name, or the folder of a model, which reads random tokens.
    context : int
        Tokens that are read before.
    options : dict
        Further settings of ``patch``; those that are None are left at their defaults, or where two tiers show most:
        ``budget`` an eighth of the context, ``resident`` half of that, ``split="cpu"`` on a CPU, and for ``scout``
        ``cpu_query="predicted"``.
    steps : int
        To keep; a few more are decoded before.

    Raises
    ------
    FileNotFoundError
        If the model is none of these, or cannot be loaded.
    ValueError
        For a device that there is not, or a context that the model does not take.
    """
    console = console or Console()
    place = devices.find(device)
    net, ids = _subject(model, context, seed)
    longest = getattr(net.config.get_text_config(decoder=True), "max_position_embeddings", None) or context + steps
    if context + steps > longest:
        raise ValueError(f"--context {context}: {model} takes {longest} tokens at most, decoded ones included")
    net, ids = net.to(place), ids.to(place)
    budget = options.get("budget") or max(context // 8, 64)
    usual = {"budget": budget, "resident": max(budget // 2, 32), "split": "cpu" if net.device.type == "cpu" else "auto"}
    usual |= {"cpu_query": "predicted"} if method == "scout" else {}
    given = usual | {name: value for name, value in options.items() if value is not None}
    length = {"max_new_tokens": steps + 6, "min_new_tokens": steps + 6}
    # The path is looked at before the prompt is read.
    with scout_hf.patch(net, method=method, **given) as handle, handle.trace(out, steps) as trace:
        net.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **length)
    console.print(_table(trace.spans, f"{method}, {type(net).__name__}, {context} tokens on {device}"))
    beside = any(span.kind in MOVERS for span in trace.spans)
    console.print(EXPLAINED if beside else "One tier: nothing runs beside the model.", highlight=False)
    console.print(f"{trace.path} for https://ui.perfetto.dev or chrome://tracing, {trace.image} to look at")
    return trace


def parts(spans: Sequence[Span]) -> dict[str, float | int]:
    """What the steps of a trace were made of.

    Returns
    -------
    dict
        ``steps``, and per step ``step_ms`` and ``wait_ms`` (of the main thread, for the CPU or a copy). For jobs of the
        kinds ``attention`` and ``copy``, where there are any: ``<kind>_jobs`` and ``<kind>_ms`` per step, what share of
        that time the main thread did not wait (``<kind>_hidden``), and what share of the jobs was asked for before
        their layer began (``<kind>_ahead``).
    """
    whole = [span for span in spans if span.kind == "step"]
    waits = [span for span in spans if span.kind == "join"]
    found: dict[str, float | int] = {"steps": len(whole), "step_ms": _ms(whole) / len(whole)}
    found["wait_ms"] = _ms(waits) / len(whole)
    for kind in MOVERS:
        jobs = [span for span in spans if span.kind == kind and not span.lane.startswith("GPU")]
        # An emulated CPU or link stands for the one that did the work.
        jobs = [span for span in jobs if "emulated" in span.lane] or jobs
        if jobs:
            waited = sum(_both(job, wait) for job in jobs for wait in waits) / 1e6
            ahead = [job.submitted < begin for job in jobs if (begin := _layer_begin(spans, whole, job)) is not None]
            found |= {f"{kind}_jobs": len(jobs) / len(whole), f"{kind}_ms": _ms(jobs) / len(whole)}
            found |= {f"{kind}_hidden": 1 - waited / max(_ms(jobs), 1e-9)}
            found |= {f"{kind}_ahead": sum(ahead) / max(len(ahead), 1)}
    return found


def _table(spans: Sequence[Span], title: str):
    found = parts(spans)
    table = new_table(title, "per step", "ms", "jobs", "hidden", "a layer ahead")
    table.add_row(f"all of it ({found['steps']} steps)", three(found["step_ms"]), "", "", "")
    table.add_row("waiting", three(found["wait_ms"]), "", "", "")
    for kind, name in zip(MOVERS, ("the CPU's share", "copies")):
        if f"{kind}_jobs" in found:
            jobs, hidden, ahead = (found[f"{kind}_{what}"] for what in ("jobs", "hidden", "ahead"))
            # A recall is for the step after: it has no layer to be ahead of.
            ahead = "-" if kind == "copy" and not ahead else f"{ahead:.0%}"
            table.add_row(name, three(found[f"{kind}_ms"]), f"{jobs:.0f}", f"{hidden:.0%}", ahead)
    return table


def _subject(model: str, context: int, seed: int) -> tuple[PreTrainedModel, torch.Tensor]:
    if model in POCKET_MODELS:
        net, tokenizer = load_pocket(model)
        return net, tokenize(tokenizer, make_document(context, usual_facts(context), seed).text)
    if not Path(model).is_dir():
        raise FileNotFoundError(f"no model {model!r}: it is one of {', '.join(POCKET_MODELS)}, or a model's folder")
    try:
        net = AutoModelForCausalLM.from_pretrained(model, dtype="auto", local_files_only=True).eval()
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"--model {model} cannot be loaded: {error}") from error
    words = net.config.get_text_config(decoder=True).vocab_size
    return net, torch.randint(words, (1, context), generator=torch.Generator().manual_seed(seed))


def _ms(spans: Sequence[Span]) -> float:
    return sum(span.end - span.begin for span in spans) / 1e6


def _both(one: Span, other: Span) -> int:
    return max(0, min(one.end, other.end) - max(one.begin, other.begin))


def _layer_begin(spans: Sequence[Span], steps: Sequence[Span], job: Span) -> int | None:
    """When the layer of a job began, in the step that the job was asked for in."""
    step = next((step for step in steps if job.submitted is not None and step.begin <= job.submitted <= step.end), None)
    layers = [span.begin for span in spans if span.kind == "layer" and span.layer == job.layer]
    return None if step is None else next((begin for begin in layers if step.begin <= begin <= step.end), None)
