"""Traces a short generation: the files of ``handle.trace``, and figures from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel

import scout_hf
from scout_hf import ScoutConfig
from scout_hf.diagnostics import MOVERS, Span, Trace, parts_of_spans
from scout_hf.eval.bench import device as devices
from scout_hf.eval.decode_path import tokenize
from scout_hf.eval.options import Trace as Asked
from scout_hf.eval.pocket import POCKET_MODELS, load_pocket, make_document
from scout_hf.eval.pocket.tasks import usual_statements
from scout_hf.eval.tables import Grid, three
from scout_hf.methods import unused_settings

EXPLAINED = (
    "Times and jobs are per step. Hidden: the share of the jobs' time in which the model did not wait for them; a "
    "layer ahead: the share of the jobs that were started before their own layer began."
)
NOTHING_BESIDE = (
    "In these steps nothing crossed between the tiers: all chosen blocks were resident. Try a longer --context, or a "
    "smaller --budget."
)


SETTINGS = ("split", "cpu_query", "budget", "resident", "link_gbps", "cpu_gbps")
"""Options that ``patch`` is given, where they are."""


def run(options: Asked, console: Console | None = None) -> Trace:
    """Trace the last decode steps of a short generation, and print where their time went.

    Settings that are None are left at their defaults, or where two tiers show most: ``budget`` an eighth of the
    context, ``resident`` half of that, ``split="cpu"`` on a CPU, and for ``scout`` ``cpu_query="predicted"``.

    Raises FileNotFoundError for a model that is not there or cannot be loaded, ValueError for a device that there is
    not, or a context that the model does not take.
    """
    console, model, context, steps = console or Console(), options.model, options.context, options.steps
    place = devices.find(options.device)
    net, ids = _subject(model, context, options.seed)
    longest = getattr(net.config.get_text_config(decoder=True), "max_position_embeddings", None) or context + steps
    if context + steps > longest:
        raise ValueError(f"--context {context}: {model} takes {longest} tokens at most, decoded ones included")
    net, ids = net.to(place), ids.to(place)
    budget = options.budget or max(context // 8, 64)
    usual = {"budget": budget, "resident": max(budget // 2, 32), "split": "cpu" if net.device.type == "cpu" else "auto"}
    usual |= {"cpu_query": "predicted"} if options.method == "scout" else {}
    unused = unused_settings(ScoutConfig(method=options.method, **usual), net.device)
    asked = {name: value for name in SETTINGS if (value := getattr(options, name)) is not None}
    given = {name: value for name, value in usual.items() if name not in unused} | asked
    length = {"max_new_tokens": steps + 6, "min_new_tokens": steps + 6}
    # The path is looked at before the prompt is read.
    with scout_hf.patch(net, method=options.method, **given) as handle, handle.trace(options.out, steps) as trace:
        net.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **length)
    console.print(_table(trace.spans, f"{options.method}, {type(net).__name__}, {context} tokens on {options.device}"))
    beside = any(span.kind in MOVERS for span in trace.spans)
    console.print(EXPLAINED if beside else NOTHING_BESIDE, highlight=False)
    console.print(f"{trace.path} for https://ui.perfetto.dev or chrome://tracing, {trace.image} to look at")
    return trace


def _table(spans: Sequence[Span], title: str):
    found = parts_of_spans(spans)
    table = Grid(title, ("per step", "ms", "jobs", "hidden", "a layer ahead"))
    table.add(f"all of it ({found['steps']} steps)", three(found["step_ms"]), "", "", "")
    table.add("waiting", three(found["wait_ms"]), "", "", "")
    for kind, name in zip(MOVERS, ("the CPU's share", "copies")):
        if f"{kind}_jobs" in found:
            jobs, hidden, ahead = (found[f"{kind}_{what}"] for what in ("jobs", "hidden", "ahead"))
            # A recall is for the step after: it has no layer to be ahead of.
            ahead = "-" if kind == "copy" and not ahead else f"{ahead:.0%}"
            table.add(name, three(found[f"{kind}_ms"]), f"{jobs:.0f}", f"{hidden:.0%}", ahead)
    return table


def _subject(model: str, context: int, seed: int) -> tuple[PreTrainedModel, torch.Tensor]:
    if model in POCKET_MODELS:
        net, tokenizer = load_pocket(model)
        return net, tokenize(tokenizer, make_document(context, usual_statements(context), seed).text)
    if not Path(model).is_dir():
        raise FileNotFoundError(f"no model {model!r}: it is one of {', '.join(POCKET_MODELS)}, or a model's folder")
    try:
        net = AutoModelForCausalLM.from_pretrained(model, dtype="auto", local_files_only=True).eval()
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"--model {model} cannot be loaded: {error}") from error
    words = net.config.get_text_config(decoder=True).vocab_size
    return net, torch.randint(words, (1, context), generator=torch.Generator().manual_seed(seed))
