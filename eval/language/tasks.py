"""Questions that any text can be made to ask: hidden facts, records, far repetition, and the text's own continuation.

After a shared document comes a prompt, which a model reads in one pass, then the words with which the answer begins and
the answer, which are decode steps. A document holds the facts of all its cases, so that one reading serves them all.
Answers are forced; the records are also extracted, which is to say generated.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scout_hf.errors import ConfigError
from scout_hf.eval.language.facts import JOBS, NAMES, Fact, facts

REPEATED, SHOWN, CONTINUED = 32, 32, 64
"""Tokens of a passage that count, tokens of it that come before, and tokens of a continuation."""

RECORDS, REPETITION, CONTINUATION = "records", "repetition", "continuation"
TOKENS_PER_RECORD, MOST_RECORDS, SHOWN_RECORDS = 128, 24, 2
"""The last: how many begin the answer, which no case counts."""

_RECORD = "{} works as a {}."
_LINE = re.compile(r"^\W*(\w+) works as an? (\w+)", re.MULTILINE)
INSTRUCTION = "Here is a text. Facts about some people stand in it.\n\n"


@dataclass(frozen=True)
class Case:
    """One question.

    ``prompt`` is read in one pass; ``forced`` is what follows, a decode step each: the words that lead to an answer,
    and the answer. ``fields`` says which of these are answers: first and last + 1 of each.
    """

    task: str
    prompt: tuple[int, ...]
    forced: tuple[int, ...]
    fields: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Extraction:
    """Records to be written down, many in one answer, which is generated.

    The prompt, read in one pass, ends with the records that begin the answer as an example. ``wanted`` has the values
    of those that are left to write, by name; ``most`` is the tokens to generate.
    """

    prompt: tuple[int, ...]
    wanted: dict[str, str]
    most: int

    def read(self, text: str) -> dict[str, str]:
        """What an answer says of each name that is wanted; without those that it does not name."""
        said: dict[str, str] = {}
        for name, value in _LINE.findall(text):
            if name in self.wanted:
                said.setdefault(name, value.lower())
        return said


@dataclass(frozen=True)
class Exam:
    """A document as token ids, cases that go on from it, and the extraction of all its records."""

    document: tuple[int, ...]
    cases: tuple[Case, ...]
    extraction: Extraction


def make_exam(tokenizer: Any, text: str, tokens: int, each: int, seed: int) -> Exam:
    """An exam over a stretch of a user's text, which ``seed`` chooses, with ``each`` cases of every task.

    The document has about so many ``tokens``, facts and instruction included. ConfigError if the text is too short for
    ``tokens``, or ``tokens`` for the cases.
    """
    random_ = random.Random(seed)
    hidden = facts(random_, each)
    people = random_.sample(NAMES, max(4, min(MOST_RECORDS, tokens // TOKENS_PER_RECORD)))
    records = {name: random_.choice(JOBS) for name in people}
    sentences = [sentence for fact in hidden for sentence in fact.sentences]
    sentences += [_RECORD.format(name, job) for name, job in records.items()]
    cost = len(_ids(tokenizer, " ".join(sentences))) + 64
    capacity = tokens - cost
    if capacity < 8 * len(sentences):
        raise ConfigError(
            f"{tokens} tokens are too few for {each} cases of each task; try {2 * cost + 8 * len(sentences)}"
        )
    ids = _ids(tokenizer, text)
    needed = capacity + each * (SHOWN // 2 + CONTINUED)
    if len(ids) < needed:
        raise ConfigError(
            f"the text has {len(ids)} tokens and {needed} are needed for a document of {tokens}; give more --text"
        )
    first = random_.randrange(len(ids) - needed + 1)
    body = tokenizer.decode(ids[first : first + capacity])
    document = _hide(body, sentences, random_)
    asked = [(fact.task, _prompt(tokenizer, document, fact.question), _answered(tokenizer, fact)) for fact in hidden]
    order = random_.sample(people, len(people))
    listing = _prompt(tokenizer, document, _listing(order))
    asked.append((RECORDS, listing, _recorded(tokenizer, records, order)))
    shared = _shared([prompt for _, prompt, _ in asked])
    cases = [Case(task, tuple(prompt[len(shared) :]), *given) for task, prompt, given in asked]
    cases += _passages(REPETITION, _far(shared, each, random_))
    cases += _passages(CONTINUATION, _onward(ids[first + capacity : first + needed], each))
    return Exam(tuple(shared), tuple(cases), _extraction(tokenizer, tuple(listing[len(shared) :]), records, order))


def _hide(body: str, sentences: Sequence[str], random_: random.Random) -> str:
    """The sentences at random ends of paragraphs or sentences, in a random order."""
    pieces = body.split(". ")
    order = random_.sample(list(sentences), len(sentences))
    places = sorted(random_.choices(range(1, max(2, len(pieces))), k=len(order)), reverse=True)
    for place, sentence in zip(places, order):
        pieces.insert(place, sentence.removesuffix("."))
    return ". ".join(pieces)


def _prompt(tokenizer: Any, document: str, question: str) -> list[int]:
    content = f"{INSTRUCTION}{document}\n\n{question}"
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": content}]
        return _ids(tokenizer, tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
    return list(tokenizer(content + "\n").input_ids)


Given = tuple[tuple[int, ...], tuple[tuple[int, int], ...]]
"""What is forced, and which of it are answers; see :class:`Case`."""


def _answered(tokenizer: Any, fact: Fact) -> Given:
    lead = len(_ids(tokenizer, fact.lead))
    whole = _ids(tokenizer, f"{fact.lead} {fact.answer}")
    return tuple(whole), ((lead, len(whole)),)


def _listing(people: Sequence[str]) -> str:
    return f"What do these people work as? Write a sentence for each: {', '.join(people)}."


def _recorded(tokenizer: Any, records: dict[str, str], order: Sequence[str]) -> Given:
    """All records, a field each but for those that are shown."""
    forced, fields = [], []
    for number, name in enumerate(order):
        forced += _ids(tokenizer, _RECORD.format(name, "").removesuffix(" ."))
        value = _ids(tokenizer, f" {records[name]}")
        if number >= SHOWN_RECORDS:
            fields.append((len(forced), len(forced) + len(value)))
        forced += [*value, *_ids(tokenizer, ".\n")]
    return tuple(forced), tuple(fields)


def _extraction(tokenizer: Any, prompt: tuple[int, ...], records: dict[str, str], order: Sequence[str]) -> Extraction:
    lines = [_RECORD.format(name, records[name]) + "\n" for name in order]
    shown, wanted = "".join(lines[:SHOWN_RECORDS]), {name: records[name] for name in order[SHOWN_RECORDS:]}
    whole = _ids(tokenizer, "".join(lines[SHOWN_RECORDS:]))
    return Extraction((*prompt, *_ids(tokenizer, shown)), wanted, len(whole) + len(whole) // 8)


def _far(document: Sequence[int], each: int, random_: random.Random) -> list[Sequence[int]]:
    """Passages from far back: what follows their beginning is in the text, word for word."""
    firsts = [random_.randrange(len(document) // 8, len(document) * 3 // 4) for _ in range(each)]
    return [document[first : first + SHOWN + REPEATED] for first in firsts]


def _onward(ids: Sequence[int], each: int) -> list[Sequence[int]]:
    """Passages with which the text goes on after the document."""
    length = SHOWN // 2 + CONTINUED
    return [ids[length * number : length * (number + 1)] for number in range(each)]


def _passages(task: str, passages: Sequence[Sequence[int]]) -> list[Case]:
    """The beginning of each is a prompt; of a repetition as much again only leads to what counts."""
    half = SHOWN // 2
    lead = half if task == REPETITION else 0
    return [Case(task, tuple(one[:half]), tuple(one[half:]), ((lead, len(one) - half),)) for one in passages]


def _shared(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The tokens with which all begin; at least one of each is left."""
    most = min(map(len, prompts)) - 1
    first = prompts[0]
    end = next((place for place in range(most) if any(one[place] != first[place] for one in prompts)), most)
    return list(first[:end])


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids
