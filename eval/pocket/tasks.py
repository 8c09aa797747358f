"""Five kinds of questions about a long document, in the style of RULER (arXiv 2404.06654), each from a seed.

Every task hides short statements between filler sentences and asks about them at the end:

`needle`     they call the amber falcon seven kilo mango .     what do they call the amber falcon
`values`     note zoe 1 seven .  note zoe 2 kilo .  ...        list all of zoe            1 seven 2 kilo 3 mango
`trace`      value of falcon seven kilo .  value of zoe falcon .   find the value of zoe      seven kilo
`copy`       copy zoe seven kilo mango lemon iron zinc .       repeat zoe
`aggregate`  answer of zoe kilo .  (three times, others once)  which is often the answer of zoe      kilo

All cases of one document are of one task, so each is the others' distractor.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from . import vocabulary as vocab
from .documents import Document, Fact, draw_facts, fact_words, filler_sentences, question_words, weave

TASKS = ("needle", "values", "trace", "copy", "aggregate")

VALUES_PER_KEY = 3
HOPS = 2
TRACED_WORDS = 2
SPAN_WORDS = 6
COUNTS = (3, 1, 1, 1)
STATEMENTS = {"needle": 1, "values": VALUES_PER_KEY, "trace": HOPS, "copy": 1, "aggregate": sum(COUNTS)}
"""How many statements of the text one question is about."""

_KEYS = vocab.NAMES + vocab.KEY_NOUNS


@dataclass(frozen=True)
class Case:
    """One question, its answer, and its statements in the order in which the text must have them.

    The answer starts at word ``offset`` of statement number ``home``.
    """

    statements: tuple[tuple[str, ...], ...]
    question: tuple[str, ...]
    answer: tuple[str, ...]
    home: int
    offset: int


def usual_statements(tokens: int) -> int:
    """The usual number of statements in a text: one in 128 tokens, from 8 to 32.

    >>> usual_statements(4096)
    32
    """
    return min(32, max(8, tokens // 128))


def make_document(tokens: int, facts: int, seed: int) -> Document:
    """Make a document with facts at random places; the same arguments make the same document.

    Parameters
    ----------
    tokens : int
        Exact length.
    facts : int
    seed : int

    Returns
    -------
    Document

    Raises
    ------
    ValueError
        If the facts do not fit the length or the vocabulary.

    Examples
    --------
    >>> document = make_document(tokens=512, facts=4, seed=1)
    >>> len(document.text.split())
    512
    """
    rng = random.Random(f"document-{seed}")
    return _document(rng, draw_cases(rng, "needle", facts), tokens, seed, as_drawn=True)


def make_exercise(task: str, tokens: int, seed: int) -> Document:
    """Make a document with statements of one task; the same arguments make the same document.

    Parameters
    ----------
    task : str
        One of ``TASKS``.
    tokens : int
        Exact length.
    seed : int

    Returns
    -------
    Document

    Raises
    ------
    ValueError
        If there is no such task, or the statements do not fit the length or the vocabulary.

    Examples
    --------
    >>> document = make_exercise("trace", tokens=512, seed=1)
    >>> len(document.facts)
    4
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r}: allowed are {', '.join(TASKS)}")
    count = usual_statements(tokens) // STATEMENTS[task]
    if task == "needle":
        return make_document(tokens, count, seed)
    rng = random.Random(f"{task}-{seed}")
    return _document(rng, draw_cases(rng, task, max(1, count)), tokens, seed)


def exercises(task: str, tokens: int, questions: int, seed: int) -> list[Document]:
    """Documents from ``seed`` on that have ``questions`` facts in all."""
    found: list[Document] = []
    while left := questions - sum(len(one.facts) for one in found):
        document = make_exercise(task, tokens, seed + len(found))
        found.append(replace(document, facts=document.facts[:left]))
    return found


def draw_cases(rng: random.Random, task: str, count: int) -> list[Case]:
    """Cases of one task with different keys; ValueError if the vocabulary is too small."""
    if task == "needle":
        return [
            Case((tuple(fact_words(key, value)),), tuple(question_words(key)), value, 0, 5)
            for key, value in draw_facts(rng, count)
        ]
    names = _distinct(rng, _KEYS, count * (HOPS if task == "trace" else 1), task)
    if task == "values":
        return [_values(rng, name) for name in names]
    if task == "trace":
        firsts = _distinct(rng, vocab.VALUES, count, task)
        return [_trace(rng, names[index * HOPS : (index + 1) * HOPS], first) for index, first in enumerate(firsts)]
    if task == "copy":
        pairs: set[tuple[str, str]] = set()
        return [_copy(rng, name, pairs) for name in names]
    return [_aggregate(rng, name) for name in names]


def _distinct(rng: random.Random, words: tuple[str, ...], count: int, task: str) -> list[str]:
    if count > len(words):
        raise ValueError(f"{task}: at most {len(words)} different words of one kind fit one document, {count} needed")
    return rng.sample(words, count)


def _values(rng: random.Random, key: str) -> Case:
    values = rng.sample(vocab.VALUES, VALUES_PER_KEY)
    numbered = [(vocab.DIGITS[number], value) for number, value in enumerate(values, 1)]
    statements = tuple(("note", key, *pair, ".") for pair in numbered)
    return Case(statements, ("list", "all", "of", key), tuple(word for pair in numbered for word in pair), 0, 2)


def _trace(rng: random.Random, chain: list[str], first: str) -> Case:
    value = (first, *rng.sample([word for word in vocab.VALUES if word != first], TRACED_WORDS - 1))
    statements = [("value", "of", chain[0], *value, ".")]
    statements += [("value", "of", name, before, ".") for before, name in zip(chain, chain[1:], strict=False)]
    return Case(tuple(statements), ("find", "the", "value", "of", chain[-1]), value, 0, 3)


def _copy(rng: random.Random, key: str, pairs: set[tuple[str, str]]) -> Case:
    # No two words follow each other twice in a document: the last two words always determine the next word of a span.
    while True:
        span = rng.sample(vocab.VALUES, SPAN_WORDS)
        fresh = set(zip(span, span[1:], strict=False))
        if not fresh & pairs:
            break
    pairs |= fresh
    return Case((("copy", key, *span, "."),), ("repeat", key), tuple(span), 0, 2)


def _aggregate(rng: random.Random, key: str) -> Case:
    words = rng.sample(vocab.VALUES, len(COUNTS))
    said = [word for word, count in zip(words, COUNTS, strict=True) for _ in range(count)]
    rng.shuffle(said)
    statements = tuple(("answer", "of", key, word, ".") for word in said)
    question = ("which", "is", "often", "the", "answer", "of", key)
    return Case(statements, question, (words[0],), said.index(words[0]), 3)


def deal(rng: random.Random, cases: list[Case]) -> list[tuple[int, int]]:
    """A random order of all statements, as numbers of case and statement, that keeps the order within each case."""
    order = [number for number, case in enumerate(cases) for _ in case.statements]
    rng.shuffle(order)
    next_statement = [0] * len(cases)
    dealt = []
    for number in order:
        dealt.append((number, next_statement[number]))
        next_statement[number] += 1
    return dealt


def _document(rng: random.Random, cases: list[Case], tokens: int, seed: int, as_drawn: bool = False) -> Document:
    needed = sum(len(statement) for case in cases for statement in case.statements)
    if needed > tokens:
        raise ValueError(f"{len(cases)} questions need {needed} tokens of statements, the document has {tokens}")
    filler = filler_sentences(rng, tokens - needed)
    dealt = [(case, 0) for case in range(len(cases))] if as_drawn else deal(rng, cases)
    words, starts = weave(rng, filler, [cases[case].statements[number] for case, number in dealt])
    facts = tuple(
        Fact(" ".join(cases[case].question), " ".join(cases[case].answer), start + cases[case].offset)
        for (case, number), start in zip(dealt, starts)
        if number == cases[case].home
    )
    return Document(" ".join(words), facts, tokens, seed)
