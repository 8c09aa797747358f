"""Training sequences for a pocket model: drills (facts and questions mixed) and exams (a document, then questions).

Drills give many answers per token and start retrieval; a model trained on them alone fails on a fresh document that is
followed by its first question, which is why longer stages are mostly exams.
"""

import math
import random
from dataclasses import dataclass

import numpy as np

from . import vocabulary as vocab
from .documents import draw_facts, fact_words, filler_sentences, question_words

IDS = {word: index for index, word in enumerate(vocab.words())}
TEXT_WEIGHT = 0.05
_FACT_TOKENS = 9
_QUESTION_TOKENS = 11


@dataclass(frozen=True)
class Batch:
    """`ids`, `positions` int64, `weights` float32, all (sequences, length); a weight counts where its token is due."""

    ids: np.ndarray
    positions: np.ndarray
    weights: np.ndarray


def make_batch(rng: random.Random, length: int, sequences: int, exams: float, filler: bool, jumps: float) -> Batch:
    """A batch of sequences of `length` tokens; `exams` and `jumps` are the shares of exams and of position jumps."""
    rows = []
    for _ in range(sequences):
        items = exam(rng, length) if rng.random() < exams else drill(rng, length, filler)
        ids = [IDS[word] for words, _ in items for word in words][:length]
        weights = [weight for _, weights in items for weight in weights][:length]
        bounds = np.cumsum([len(words) for words, _ in items])
        farthest = _farthest(rng, length) if rng.random() < jumps else length
        rows.append((ids, positions(rng, length, bounds, farthest), weights))
    ids, places, weights = zip(*rows, strict=True)
    return Batch(np.array(ids), np.stack(places), np.array(weights, dtype=np.float32))


def exam(rng: random.Random, length: int) -> list[tuple[list[str], list[float]]]:
    """A document and then one question per fact, in random order: (words, weights) items of `length` words in all."""
    most = max(4, min(64, length // 30))
    drawn = draw_facts(rng, rng.randint(max(4, most // 4), most))
    room = length - len(drawn) * (_FACT_TOKENS + _QUESTION_TOKENS)
    items = [_filler(words) for words in filler_sentences(rng, room)]
    last = items.pop()
    items += [_fact(key, value) for key, value in drawn]
    rng.shuffle(items)
    rng.shuffle(drawn)
    return [*items, last, *(_question(key, value) for key, value in drawn)]


def drill(rng: random.Random, length: int, filler: bool) -> list[tuple[list[str], list[float]]]:
    """Facts, questions on earlier facts and, if wanted, filler in turn; at least `length` words in all."""
    pending = draw_facts(rng, min(64, length // (_FACT_TOKENS + _QUESTION_TOKENS) + 2))
    told: list = []
    items: list = []
    size = 0
    while size < length:
        draw = rng.random()
        if filler and draw < 0.4 or not (pending or told):
            items.append(_filler(filler_sentences(rng, 24)[0]))
        elif pending and (draw < 0.7 or not told):
            told.append(pending.pop())
            items.append(_fact(*told[-1]))
        else:
            items.append(_question(*told.pop(rng.randrange(len(told)))))
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


def _filler(words: list[str]) -> tuple[list[str], list[float]]:
    return words, [TEXT_WEIGHT] * len(words)


def _fact(key: tuple[str, str], value: tuple[str, ...]) -> tuple[list[str], list[float]]:
    # Nothing can predict a definition, so learning from it would only be noise.
    words = fact_words(key, value)
    known = {*key, *value}
    return words, [0.0 if word in known else TEXT_WEIGHT for word in words]


def _question(key: tuple[str, str], value: tuple[str, ...]) -> tuple[list[str], list[float]]:
    asked = question_words(key)
    weights = [0.0 if word in key else TEXT_WEIGHT for word in asked] + [1.0] * len(value) + [TEXT_WEIGHT]
    return [*asked, *value, "."], weights
