"""The study of a language model on a text: exams of several lengths, each read once, under many settings; resumable."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

import scout_hf
from scout_hf import ConfigError, ScoutConfig
from scout_hf.eval.bench.machine import describe
from scout_hf.eval.caches import caches_of
from scout_hf.eval.language.figures import label
from scout_hf.eval.language.forced import LAST_TOKENS, Answers, Reading, cost_of_asking, cost_of_reading
from scout_hf.eval.language.tasks import Exam, make_exam
from scout_hf.eval.records import Journal, write_record
from scout_hf.files import parse_json
from scout_hf.rules import anything, count, fields, flag, items, maybe, number, one_of, simple, table, text
from scout_hf.sessions import fingerprint

JOURNAL, RECORD = "fidelity.jsonl", "fidelity.json"
BAR = "{desc} |{bar}| {percentage:3.0f}% {elapsed}, about {remaining} left"
WATCHED = 0.05
"""Share of layers and KV heads whose attention is also computed exactly, in each step."""

_INSIDE = ("cosine", "cpu_ratio", "mass", "output_error", "prediction_error", "block_recall")
_SEEN = {name: maybe(number()) for name in _INSIDE}
_OUTCOME = fields(
    {"task": text(), "log_probs": items(number()), "tokens": items(count(1)), "right": items(flag)}
    | {"divergences": items(number(low=0))}
)
RESULT = fields(
    {
        "outcomes": items(_OUTCOME, fewest=1),
        "wanted": table(text()),
        "said": table(text(1000)),
        "attended": maybe(number(low=0)),
        "context": number(low=0),
        "seconds": number(low=0),
        "layers": items(fields({"layer": count(), "attended": number(low=0)} | _SEEN)),
    }
    | _SEEN
)
"""Of one setting, or of full attention, about one document."""

_SETTING = fields(
    {"method": text(), "budget": anything, "digest": text(), "split": text(), "cpu_query": text()},
    {"monitor": anything},
)
_WHERE = fields({"tokens": count(1), "document": count(), "setting": maybe(_SETTING)})


def _cell(value: Any) -> None:
    _WHERE(value)
    RESULT(value)


RULE = fields(
    {"study": one_of("fidelity"), "model": text(1000), "machine": table(simple), "cells": items(_cell, fewest=1)}
)
"""What a record must hold for its tables and pictures."""


@dataclass(frozen=True)
class Plan:
    """What is measured: how many documents of which lengths, in tokens, and cases of each task in each.

    The settings are those beside full attention.
    """

    lengths: tuple[int, ...]
    documents: int
    each: int
    seed: int
    settings: tuple[ScoutConfig, ...]


def study(
    model: Any, tokenizer: Any, name: str, text_: str, plan: Plan, out: Path, fresh: bool, tell: Callable[[str], Any]
) -> dict[str, Any]:
    """Measure what is not in ``out`` yet; the record, which is written there too.

    The record also has what ``out`` held of the same documents under other settings: a study may be made in parts.
    ConfigError or PatchError before anything is measured if the text is too short, the model cannot read so much, or a
    setting is none for it.
    """
    for config in plan.settings:
        with caches_of(model, config):
            pass  # PatchError and ConfigError now, not after an hour
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if most is not None and max(plan.lengths) + LAST_TOKENS > most:
        raise ConfigError(f"{name} reads {most} tokens, {max(plan.lengths)} and their questions are more; try fewer")
    exams = {
        (tokens, number_): make_exam(tokenizer, text_, tokens, plan.each, plan.seed + number_)
        for tokens in plan.lengths
        for number_ in range(plan.documents)
    }
    out.mkdir(parents=True, exist_ok=True)
    machine = describe()
    journal = Journal(out / JOURNAL, RESULT, fresh, machine["commit"])
    common = {
        "model": name,
        "weights": fingerprint(model).key,
        "text": hashlib.sha256(text_.encode()).hexdigest(),
        "each": plan.each,
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": {"scout_hf": scout_hf.__version__, "transformers": transformers.__version__},
    }
    every: list[ScoutConfig | None] = [None, *plan.settings]
    cells = []
    total = sum(cost_of_reading(exam) + cost_of_asking(exam) * len(plan.settings) for exam in exams.values())
    with tqdm(total=total, bar_format=BAR, desc="reading and asking", leave=False, disable=None) as bar:
        for (tokens, number_), exam in exams.items():
            where = {"tokens": tokens, "document": plan.seed + number_}
            asked_for = {"exam": hashlib.sha256(repr(exam).encode()).hexdigest()}
            asked = [common | where | asked_for | {"setting": _said(one)} for one in every]
            _measure(model, tokenizer, exam, every, asked, journal, bar.update, tell)
            asked += journal.others(common | where | asked_for, asked)
            cells += [where | {"setting": one["setting"]} | (journal.get(one) or {}) for one in asked]
    record = {
        "study": "fidelity",
        "model": name,
        "weights": common["weights"],
        "text": {"sha256": common["text"], "characters": len(text_)},
        "settings": {"each": plan.each, "documents": plan.documents, "seed": plan.seed, "dtype": common["dtype"]},
        "machine": machine | {"threads": torch.get_num_threads()},
        "cells": cells,
    }
    write_record(record, out / RECORD)
    tell(f"wrote {out / RECORD}")
    return record


def _measure(
    model: Any,
    tokenizer: Any,
    exam: Exam,
    every: Sequence[ScoutConfig | None],
    asked: Sequence[dict[str, Any]],
    journal: Journal,
    tick: Callable[[int], Any],
    tell: Callable[[str], Any],
) -> None:
    """One document: read if anything is missing."""
    missing = [(config, one) for config, one in zip(every, asked) if journal.get(one) is None]
    there = len(every) - len(missing)
    if there:
        tell(f"{asked[0]['tokens']} tokens: {there} of {len(every)} measured before")
    if not missing:
        tick(cost_of_reading(exam) + cost_of_asking(exam) * (len(every) - 1))
        return

    def keep(one: dict[str, Any], answers: Answers, stats: scout_hf.Stats | None) -> None:
        said = exam.extraction.read(tokenizer.decode(answers.written, skip_special_tokens=True))
        journal.add(one, _result(exam, answers, said, seconds := time.perf_counter() - begin, stats))
        setting = "full attention" if one["setting"] is None else label(one["setting"])
        tell(f"{one['tokens']} tokens: {setting}: {seconds:.0f} s")

    begin = time.perf_counter()
    reading = Reading(model, exam, tick)
    if missing[0][0] is None:
        keep(missing[0][1], reading.full, None)
        missing = missing[1:]
    else:
        there -= 1
    tick(cost_of_asking(exam) * there)
    for config, one in missing:
        begin = time.perf_counter()
        keep(one, *reading.under(config, tick))


def _result(
    exam: Exam, answers: Answers, said: dict[str, str], seconds: float, stats: scout_hf.Stats | None
) -> dict[str, Any]:
    return {
        "outcomes": [
            {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(one).items()}
            for one in answers.outcomes
        ],
        "wanted": exam.extraction.wanted,
        "said": {name: value[:100] for name, value in said.items()},
        "attended": stats and stats.attended_tokens,
        "context": stats.context_tokens if stats else float(len(exam.document)),
        "seconds": seconds,
        "layers": [{"layer": one.layer, "attended": one.attended_tokens} | _inside(one) for one in stats.layers]
        if stats
        else [],
    } | _inside(stats)


def _inside(stats: Any) -> dict[str, float | None]:
    """What was seen of the attention itself, of all layers or of one."""
    fidelity = stats and stats.fidelity
    found = {name: getattr(stats, name, None) for name in ("cosine", "cpu_ratio")}
    return found | {name: getattr(fidelity, name, None) for name in _INSIDE if name not in found}


def _said(config: ScoutConfig | None) -> dict[str, Any] | None:
    # As a file gives it back: lists for tuples.
    return None if config is None else parse_json(json.dumps(asdict(config)))
