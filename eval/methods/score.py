"""A trained pocket model's answers, and the speed of the very steps that gave them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import Cache, PreTrainedModel, QuantizedCache

import scout_hf
from scout_hf import CACHE
from scout_hf.eval.decode_path import tokenize
from scout_hf.eval.fidelity.asking import Answers, answers, decode
from scout_hf.eval.fidelity.subjects import load_subject, quizzes
from scout_hf.eval.methods import pressed
from scout_hf.eval.methods.held import told
from scout_hf.eval.methods.speed import Emulation
from scout_hf.eval.methods.ways import KVPRESS, Missing, cache_maker, find
from scout_hf.eval.pocket import WEIGHTS

ROWS = 16


@torch.no_grad()
def measure(
    model_name: str,
    way_name: str,
    task: str,
    context: int,
    budget: int,
    block_size: int,
    questions: int,
    emulation: Emulation,
    kvpress_python: str | None = None,
) -> dict[str, Any]:
    """One cell: right answers of how many, and per step of up to 16 rows the time."""
    model, tokenizer = load_subject(model_name, "none")
    way = find(way_name)

    def ids(text: str) -> list[int]:
        return tokenize(tokenizer, text)[0].tolist()

    if way_name == KVPRESS:
        asked = quizzes(model_name, task, context, questions, 0, False)
        texts = [
            [[ids(getattr(fact, name)) for fact in quiz.facts] for quiz in asked] for name in ("question", "answer")
        ]
        documents = [quiz.ids[0].tolist() for quiz in asked]
        try:
            return pressed.measure(WEIGHTS / model_name, documents, *texts, budget / context, ROWS, kvpress_python)
        except Missing as why:
            return {"missing": str(why)}
    handle = None
    if way.patched:
        options = way.options | {"block_size": block_size} | (emulation.options() if way.emulated else {})
        handle = scout_hf.patch(model, budget=budget, **options)
    found: dict[str, Any] = {"right": 0, "questions": 0}
    seconds = rows = cpu = 0.0
    prefill: list[float] = []
    try:
        new_cache = cache_maker(way, model, handle)
        for quiz in quizzes(model_name, task, context, questions, 0, False):
            cache = new_cache()
            begin = time.perf_counter()
            model(quiz.ids, **{CACHE: cache}, logits_to_keep=1)
            prefill.append(time.perf_counter() - begin)
            asked, expected = ([ids(getattr(fact, name)) for fact in quiz.facts] for name in ("question", "answer"))
            busy = time.process_time()
            length = max(map(len, expected))
            if isinstance(cache, QuantizedCache):
                given = _read_by_row(model, new_cache, quiz.ids, asked, length)
            else:
                given = answers(model, cache, asked, [0] * len(asked), length, ROWS)
            found["right"] += sum(ids[: len(want)] == want for ids, want in zip(given.ids, expected))
            found["questions"] += len(asked)
            # With the copies of the cache, which its time leaves out.
            cpu += time.process_time() - busy
            seconds, rows = seconds + given.seconds, rows + given.steps
    except Missing as why:
        return {"missing": str(why)}
    finally:
        if handle is not None:
            handle.remove()
    found |= {"prefill_s": sum(prefill) / len(prefill), "row_step_ms": 1e3 * seconds / rows}
    found["cpu_row_ms"] = 1e3 * cpu / rows
    # What is held is that of the document alone: the copies that decoded are gone.
    return found | {name: value for name, value in told(handle, cache).items() if not name.endswith("_bytes")}


def _read_by_row(
    model: PreTrainedModel, new_cache: Callable[[], Cache], document: torch.Tensor, questions: Sequence, length: int
) -> Answers:
    """As :func:`answers`, for caches whose rows cannot be copied: every row reads the document."""
    found = Answers([])
    for first in range(0, len(questions), ROWS):
        ids = torch.tensor(questions[first : first + ROWS])
        cache = new_cache()
        model(document.expand(len(ids), -1), **{CACHE: cache}, logits_to_keep=1)
        begin = time.perf_counter()
        found.ids += decode(model, cache, ids, length).tolist()
        found.seconds += time.perf_counter() - begin
        found.steps += len(ids) * (ids.shape[1] + length - 1)
    return found
