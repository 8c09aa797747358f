"""How many questions are answered when only a share of the context is attended, beside full attention and controls."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import scout_hf
from scout_hf.eval import baselines  # noqa: F401 (registers the digests "random" and "recent")
from scout_hf.eval.decode_path import ask_all
from scout_hf.eval.pocket import ANSWER_WORDS, Document, Fact, make_document
from scout_hf.eval.pocket.evaluate import usual_facts

FULL = "full attention"
MODES: dict[str, dict[str, Any]] = {
    "real query": {"split": "off"},
    "real query, int8": {"split": "off", "host_dtype": "int8"},
    "predicted query": {"split": "cpu", "layer_ahead": True},
    "random blocks": {"split": "off", "digest": "random"},
    "recent blocks": {"split": "off", "digest": "recent"},
}
"""Settings of every sparse mode, next to budget and block size."""

FEWEST_DOCUMENTS = 4
# Away from the seeds that the pocket model's own evaluation uses.
FIRST_SEED = 50_000


class Quiz(NamedTuple):
    """A document and the facts of it that are asked for."""

    document: Document
    facts: list[Fact]


@dataclass(frozen=True)
class Score:
    """One line of the table.

    Attributes
    ----------
    mode : str
    block_size : int or None
        None for full attention.
    right, asked : int
        Questions whose whole answer was right, and all.
    attended_share : float
        Tokens attended per decode step as a share of the context, mean over layers and KV heads.
    cosine : float or None
        Of predicted to real query, where a query is predicted.
    tokens_per_second : float
        Decode steps, see :mod:`scout_hf.eval.decode_path`.
    """

    mode: str
    block_size: int | None
    right: int
    asked: int
    attended_share: float
    cosine: float | None
    tokens_per_second: float

    @property
    def accuracy(self) -> float:
        """Share of questions answered."""
        return self.right / self.asked

    @property
    def standard_error(self) -> float:
        """Of ``accuracy``, as of independent questions."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.asked)


def quiz_count(tokens: int, questions: int) -> int:
    """Documents that so many questions are spread over."""
    return min(questions, max(FEWEST_DOCUMENTS, math.ceil(questions / usual_facts(tokens))))


def make_quizzes(tokens: int, questions: int, seed: int) -> list[Quiz]:
    """Documents of ``tokens`` tokens, at least four if that many are asked, and ``questions`` questions in all."""
    count = quiz_count(tokens, questions)
    quizzes = []
    for index in range(count):
        document = make_document(tokens, usual_facts(tokens), FIRST_SEED + 1000 * seed + index)
        asked = questions // count + (index < questions % count)
        quizzes.append(Quiz(document, random.Random(document.seed).sample(document.facts, asked)))
    return quizzes


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    quizzes: Sequence[Quiz],
    mode: str,
    config: scout_hf.ScoutConfig | None,
    tick: Callable[[], Any] = lambda: None,
) -> Score:
    """Ask all questions on the decode path; the rest as in :func:`scout_hf.eval.decode_path.ask_all`."""
    torch.manual_seed(quizzes[0].document.seed)
    documents = [(document.text, [fact.question for fact in facts]) for document, facts in quizzes]
    session = ask_all(model, tokenizer, config, documents, ANSWER_WORDS, tick)
    expected = [fact.answer for _, facts in quizzes for fact in facts]
    return Score(
        mode=mode,
        block_size=config and config.block_size,
        right=sum(given.text == wanted for given, wanted in zip(session.answers, expected)),
        asked=len(expected),
        attended_share=session.attended_share,
        cosine=session.stats and session.stats.cosine,
        tokens_per_second=session.tokens_per_second,
    )


def accuracy_table(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int = 4096,
    questions: int = 100,
    budget: int | float = 0.25,
    block_sizes: Sequence[int] = (16, 32),
    seed: int = 0,
    modes: Sequence[str] = tuple(MODES),
    tick: Callable[[], Any] = lambda: None,
) -> list[Score]:
    """Scores of full attention and of every mode at every block size, all on the same questions.

    Parameters
    ----------
    model, tokenizer
        An unpatched pocket model.
    tokens, questions, seed
        Length of a document, questions in all, and what both are drawn from.
    budget, block_sizes
        As in :class:`scout_hf.ScoutConfig`.
    modes : sequence of str
        Keys of ``MODES``.
    tick : callable
        Called after every document and every answer of every mode, for a progress bar.
    """
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise ValueError(f"unknown modes {unknown}; there are {', '.join(map(repr, MODES))}")
    runs = [(FULL, None)]
    for size in block_sizes:
        runs += [(mode, scout_hf.ScoutConfig(budget=budget, block_size=size, **MODES[mode])) for mode in modes]
    quizzes = make_quizzes(tokens, questions, seed)
    return [score(model, tokenizer, quizzes, mode, config, tick) for mode, config in runs]


def as_table(scores: Sequence[Score], title: str) -> Table:
    """The scores for a terminal of 80 columns; ``lost`` is in points below the first line."""
    table = Table(title=title, title_justify="left")
    for name in ("mode", "block", "right", "accuracy", "lost", "attended", "tok/s"):
        table.add_column(name, justify="left" if name == "mode" else "right")
    for one in scores:
        table.add_row(
            one.mode,
            str(one.block_size or "-"),
            f"{one.right}/{one.asked}",
            f"{one.accuracy:.3f} ± {one.standard_error:.3f}",
            f"{100 * (scores[0].accuracy - one.accuracy):.0f}",
            f"{one.attended_share:.0%}",
            f"{one.tokens_per_second:.1f}",
            end_section=one is scores[0],
        )
    return table


def save(path: Path, scores: Sequence[Score], settings: dict[str, Any]) -> None:
    """Write scores, settings and versions as JSON."""
    record = {
        "settings": {**settings, "modes": MODES},
        "versions": {
            "scout_hf": scout_hf.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "threads": torch.get_num_threads(),
        "scores": [{**asdict(one), "accuracy": one.accuracy, "standard_error": one.standard_error} for one in scores],
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
