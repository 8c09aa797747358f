"""Training sequences for a pocket model: drills (statements and questions mixed) and exams (a document, questions).

Drills give many answers per token and start retrieval; a model trained on them alone fails on a fresh document that is
followed by its first question, which is why longer stages are mostly exams.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np

from scout_hf.eval.pocket import vocabulary as vocab
from scout_hf.eval.pocket.documents import filler_sentences
from scout_hf.eval.pocket.tasks import STATEMENTS, Case, deal, draw_cases
from scout_hf.eval.training.tokenizers import words

IDS = {word: index for index, word in enumerate(words())}
TEXT_WEIGHT = 0.05
_NUMBER_WEIGHT = 0.1
_MOST_STATEMENTS = 64
_SAID = {*vocab.KEY_ADJECTIVES, *vocab.KEY_NOUNS, *vocab.NAMES, *vocab.VALUES, *vocab.DIGITS}
# Where a case takes several statements, most draws tell, so that questions do not use up the cases.
_TELL = {task: 0.55 + 0.05 * min(6, count) for task, count in STATEMENTS.items()}


@dataclass(frozen=True)
class Batch:
    """`ids`, `positions` int64, `weights` float32, all (sequences, length); a weight counts where its token is due."""

    ids: np.ndarray
    positions: np.ndarray
    weights: np.ndarray


def make_batch(
    rng: random.Random, length: int, sequences: int, exams: float, filler: bool, jumps: float, tasks: dict[str, float]
) -> Batch:
    """A batch of sequences of `length` tokens; `exams` and `jumps` are the shares of exams and of position jumps.

    `tasks` gives each task's weight in the draw of a sequence's one task.
    """
    rows = []
    for _ in range(sequences):
        (task,) = rng.choices(tuple(tasks), tuple(tasks.values()))
        items = exam(rng, length, task) if rng.random() < exams else drill(rng, length, filler, task)
        ids = [IDS[word] for words, _ in items for word in words][:length]
        weights = [weight for _, weights in items for weight in weights][:length]
        bounds = np.cumsum([len(words) for words, _ in items])
        farthest = _farthest(rng, length) if rng.random() < jumps else length
        rows.append((ids, positions(rng, length, bounds, farthest), weights))
    ids, places, weights = zip(*rows, strict=True)
    return Batch(np.array(ids), np.stack(places), np.array(weights, dtype=np.float32))


def exam(rng: random.Random, length: int, task: str) -> list[tuple[list[str], list[float]]]:
    """A document and then one question per case, in random order: (words, weights) items of `length` words in all."""
    most = min(_MOST_STATEMENTS // STATEMENTS[task], int(0.65 * length) // _size(task))
    cases = draw_cases(rng, task, rng.randint(max(1, most // 4), most))
    told = [_statement(cases[case].statements[number]) for case, number in deal(rng, cases)]
    asked = [_question(case) for case in cases]
    rng.shuffle(asked)
    items = [_filler(words) for words in filler_sentences(rng, length - sum(len(item[0]) for item in told + asked))]
    last = items.pop()
    places = sorted(rng.choices(range(len(items) + 1), k=len(told)))
    for place, item in zip(reversed(places), reversed(told), strict=True):
        items.insert(place, item)
    return [*items, last, *asked]


def drill(rng: random.Random, length: int, filler: bool, task: str) -> list[tuple[list[str], list[float]]]:
    """Statements, questions whose statements all came before, and optional filler, in turn; `length` words or more."""
    most = min(_MOST_STATEMENTS // STATEMENTS[task], length // _size(task) + 2)
    cases = draw_cases(rng, task, most)
    # Cases come in small groups, or all questions would wait for the end of the sequence.
    group = max(1, 6 // STATEMENTS[task])
    pending = []
    for start in range(0, most, group):
        pending += [(start + case, number) for case, number in deal(rng, cases[start : start + group])]
    pending.reverse()
    told: list[int] = []
    items: list = []
    size = 0
    while size < length:
        draw = rng.random()
        if filler and draw < 0.4 or not (pending or told):
            items.append(_filler(filler_sentences(rng, 24)[0]))
        elif pending and (draw < _TELL[task] or not told):
            case, number = pending.pop()
            items.append(_statement(cases[case].statements[number]))
            if number + 1 == len(cases[case].statements):
                told.append(case)
        else:
            items.append(_question(cases[told.pop(rng.randrange(len(told)))]))
        size += len(items[-1][0])
    return items


def positions(rng: random.Random, length: int, bounds: np.ndarray, farthest: int) -> np.ndarray:
    """Position ids (length,) that jump ahead at some item bounds, so that the last one is `farthest` - 1."""
    steps = np.ones(length, dtype=np.int64)
    steps[0] = 0
    inside = [int(bound) for bound in bounds if bound < length]
    if farthest > length and inside:
        places = rng.choices(inside, k=rng.randint(1, 16))
        shares = np.array([rng.random() + 1e-3 for _ in places])
        np.add.at(steps, places, ((farthest - length) * shares / shares.sum()).astype(np.int64))
    return np.cumsum(steps)


def _farthest(rng: random.Random, length: int, limit: int = 16384) -> int:
    return int(math.exp(rng.uniform(math.log(length), math.log(limit))))


def _size(task: str) -> int:
    """Words that one case takes, question and answer included."""
    (case,) = draw_cases(random.Random(0), task, 1)
    return sum(map(len, case.statements)) + len(case.question) + len(case.answer) + 1


def _filler(words: list[str]) -> tuple[list[str], list[float]]:
    return words, [TEXT_WEIGHT] * len(words)


def _statement(words: tuple[str, ...]) -> tuple[list[str], list[float]]:
    # Nothing can predict what a statement says, so learning from it would only be noise.
    return list(words), [0.0 if word in _SAID else TEXT_WEIGHT for word in words]


def _question(case: Case) -> tuple[list[str], list[float]]:
    asked = [0.0 if word in _SAID else TEXT_WEIGHT for word in case.question]
    answer = [_NUMBER_WEIGHT if word in vocab.DIGITS else 1.0 for word in case.answer]
    return [*case.question, *case.answer, "."], [*asked, *answer, TEXT_WEIGHT]
