"""The kvpress row: its process started, its answers judged."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from scout_hf.eval.methods import kvpress_apart
from scout_hf.eval.methods.ways import Missing
from scout_hf.files import read_json
from scout_hf.rules import count, fields, items, number, table, text

_ANSWER = fields(
    {"ids": items(items(count())), "prefill_s": number(0), "seconds": number(0), "steps": count(1), "kept": count()}
    | {"versions": table(text(200))}
)
REMEDY = "pip install kvpress, here or in an environment of its own that --kvpress-python names"


def measure(
    model: Path,
    documents: Sequence[list[int]],
    questions: Sequence[list[list[int]]],
    expected: Sequence[list[list[int]]],
    share: float,
    rows: int,
    python: str | None,
) -> dict[str, Any]:
    """One cell, as :func:`scout_hf.eval.methods.score.measure` gives it.

    Parameters
    ----------
    model : Path
        A folder for ``from_pretrained``.
    documents, questions, expected : sequence
        Token ids; all questions of one length, and all answers.
    share : float
        Of a document's tokens that stay.
    rows : int
        Questions decoded together, at most.
    python : str or None
        The interpreter; None for this one.

    Raises
    ------
    Missing
        Where that interpreter has no kvpress.
    RuntimeError
        With the last line that it wrote, if it failed.
    """
    quizzes = [{"document": ids, "questions": asked} for ids, asked in zip(documents, questions)]
    request = {"model": str(model), "quizzes": quizzes, "length": len(expected[0][0]), "share": share}
    request |= {"rows": rows, "threads": torch.get_num_threads()}
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
    wanted = [answer for row in expected for answer in row]
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
