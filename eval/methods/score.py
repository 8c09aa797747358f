"""A trained pocket model's answers, and the speed of the very steps that gave them."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import Cache, PreTrainedModel, QuantizedCache

from scout_hf.eval import arms
from scout_hf.eval.arms import Missing
from scout_hf.eval.caches import stats_and_bytes
from scout_hf.eval.decode_path import Answers, Quiz, answers, decode, prefill, quiz
from scout_hf.eval.methods import kvpress_apart
from scout_hf.eval.methods.options import Methods
from scout_hf.eval.pocket import WEIGHTS, load_pocket
from scout_hf.eval.pocket.tasks import exercises
from scout_hf.files import read_json
from scout_hf.rules import count, fields, items, number, table, text

_ANSWER = fields(
    {"ids": items(items(count())), "prefill_s": number(0), "seconds": number(0), "steps": count(1), "kept": count()}
    | {"versions": table(text(200))}
)
REMEDY = "pip install kvpress, here, or in a separate environment that --kvpress-python names"


def kvpress(model: Path, quizzes: Sequence[Quiz], share: float, python: str | None) -> dict[str, Any]:
    """One cell, as :func:`measure` gives it, of a model's folder.

    All questions have one length, and all answers; a ``share`` of a document's tokens stays. Raises Missing where that
    interpreter (None: this one) has no kvpress, RuntimeError with the last line that it wrote if it failed.
    """
    wanted = [answer for _, _, expected in quizzes for answer in expected]
    parts = [{"document": ids[0].tolist(), "questions": asked} for ids, asked, _ in quizzes]
    request = {"model": str(model), "quizzes": parts, "length": len(wanted[0]), "share": share}
    request |= {"rows": ROWS, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(request))
        call = [python or sys.executable, kvpress_apart.__file__, str(asked), str(answered)]
        try:
            done = subprocess.run(call, capture_output=True, text=True)
        except OSError as error:
            raise Missing(f"not installed: --kvpress-python {python}: {error.strerror}") from error
        if done.returncode:
            raise RuntimeError(f"kvpress failed: {(done.stderr.splitlines() or ['without a word'])[-1]}")
        found = read_json(answered, _answer, "is --kvpress-python an interpreter of this machine?")
    if "absent" in found:
        raise Missing(f"not installed: {REMEDY}")
    right = sum(given == answer for given, answer in zip(found["ids"], wanted))
    return {
        "right": right,
        "questions": len(wanted),
        "prefill_s": found["prefill_s"],
        "row_step_ms": 1e3 * found["seconds"] / found["steps"],
        "exact": False,
        "attended_tokens": float(found["kept"]),
        "by": found["versions"],
    }


def _answer(value: Any) -> None:
    if not isinstance(value, dict) or "absent" not in value:
        _ANSWER(value)


ROWS = 16
FIRST_SEED = 50_000
"""Away from the seeds that the pocket models' own evaluation uses."""

subject = lru_cache(maxsize=2)(load_pocket)


@torch.no_grad()
def measure(cell: dict[str, Any], options: Methods, questions: int) -> dict[str, Any]:
    """One cell, with nothing emulated: right answers of how many, and per step of up to 16 rows the time."""
    model, tokenizer = subject(options.model)
    context, budget = cell["context"], cell["budget"]
    quizzes = [quiz(tokenizer, document) for document in exercises(cell["task"], context, questions, FIRST_SEED)]
    found: dict[str, Any] = {"right": 0, "questions": questions}
    total, cpu, read = Answers([]), 0.0, 0.0
    try:
        if cell["way"] == arms.KVPRESS:
            return kvpress(WEIGHTS / options.model, quizzes, budget / context, options.kvpress_python)
        size = {"budget": budget, "block_size": options.block_size // 2}
        with arms.find(cell["way"]).caches(model, **size) as caches:
            for ids, asked, wanted in quizzes:
                begin = time.perf_counter()
                cache = prefill(model, caches.new(), ids)
                read += time.perf_counter() - begin
                busy, length = time.process_time(), max(map(len, wanted))
                if isinstance(cache, QuantizedCache):
                    given = _read_by_row(model, caches.new, ids, asked, length)
                else:
                    given = answers(model, cache, asked, length, ROWS)
                # With the copies of the cache, which its time leaves out.
                cpu += time.process_time() - busy
                found["right"] += given.right(wanted)
                total.seconds, total.steps = total.seconds + given.seconds, total.steps + given.steps
            held = stats_and_bytes(caches.handle, cache)
    except arms.Missing as why:
        return {"missing": str(why)}
    found |= {"prefill_s": read / len(quizzes), "row_step_ms": 1e3 * total.seconds / total.steps}
    found["cpu_row_ms"] = 1e3 * cpu / total.steps
    # What is held is that of the document alone: the copies that decoded are gone.
    return found | {name: value for name, value in held.items() if not name.endswith("_bytes")}


def _read_by_row(
    model: PreTrainedModel, new_cache: Callable[[], Cache], document: torch.Tensor, questions: Sequence, length: int
) -> Answers:
    """As :func:`answers`, for caches whose rows cannot be copied: every row reads the document."""
    found = Answers([])
    for first in range(0, len(questions), ROWS):
        ids = torch.tensor(questions[first : first + ROWS])
        cache = prefill(model, new_cache(), document.expand(len(ids), -1))
        begin = time.perf_counter()
        found.ids += decode(model, cache, ids, length).tolist()
        found.seconds += time.perf_counter() - begin
        found.steps += len(ids) * (ids.shape[1] + length - 1)
    return found
