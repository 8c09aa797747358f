"""Questions that any text can be made to ask: hidden facts and far repetition. Answers are forced, not judged.

After a shared document comes a prompt, which a model reads in one pass, then the words with which the answer begins and
the answer, which are decode steps. A document holds the facts of all its cases, so that one reading serves them all.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scout_hf.errors import ConfigError

NAMES = (
    "Alice Bruno Clara David Elena Frank Grace Henry Irene Jacob Karen Lucas Maria Nadia Oscar Paula Quentin Rosa "
    "Simon Tara Ursula Victor Wanda Xavier Yvonne Zoe Amir Bella Carlos Dora Emil Fiona"
).split()
CITIES = (
    "Paris London Berlin Madrid Rome Vienna Prague Dublin Oslo Athens Warsaw Lisbon Cairo Tokyo Delhi Lima Boston "
    "Chicago Denver Miami Geneva Naples Munich Seville"
).split()
FOODS = (
    "bread cheese apples rice soup fish honey butter coffee grapes pears plums nuts beans corn sugar eggs milk "
    "potatoes carrots lemons cherries mushrooms tomatoes"
).split()
REPEATED, SHOWN = 32, 32
COLOURS = "red green blue yellow black white brown purple orange grey".split()
TABLE = "List the secret numbers of all people as a table with the columns name and number."
INSTRUCTION = "Here is a text. Facts about some people stand in it.\n\n"


@dataclass(frozen=True)
class Case:
    """One question.

    Attributes
    ----------
    task : str
    prompt : tuple of int
        Token ids that are read in one pass.
    forced : tuple of int
        What follows, a decode step each: the words that lead to an answer, and the answer.
    fields : tuple of (int, int)
        Which of ``forced`` are answers: first and last + 1 of each.
    """

    task: str
    prompt: tuple[int, ...]
    forced: tuple[int, ...]
    fields: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Exam:
    """A document as token ids, and cases that go on from it."""

    document: tuple[int, ...]
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class Fact:
    """A sentence to hide, the question for it, and how the answer begins and ends."""

    task: str
    sentences: tuple[str, ...]
    question: str
    lead: str
    answer: str


def facts(random_: random.Random, each: int) -> list[Fact]:
    """``each`` facts of every kind, with names of their own kind by kind."""
    made: list[Fact] = []
    for name, city in zip(random_.sample(NAMES, each), random_.sample(CITIES, each)):
        made.append(
            Fact("word", (f"{name} was born in {city}.",), f"Where was {name} born?", f"{name} was born in", city)
        )
    for name in random_.sample(NAMES, each):
        number = str(random_.randrange(1_000_000, 10_000_000))
        lead = f"The secret number of {name} is"
        made.append(Fact("number", (f"{lead} {number}.",), f"What is the secret number of {name}?", lead, number))
    for name in random_.sample(NAMES, each):
        first, second = random_.sample(FOODS, 2)
        lead = f"The favourite foods of {name} are"
        question = f"What are the favourite foods of {name}?"
        made.append(Fact("two values", (f"{lead} {first} and {second}.",), question, lead, f"{first} and {second}"))
    names = random_.sample(NAMES, 2 * each)
    for name, friend in zip(names[:each], names[each:]):
        colour = random_.choice(COLOURS)
        sentences = (f"The best friend of {name} is {friend}.", f"The house of {friend} is {colour}.")
        lead = f"The house of the best friend of {name} is"
        made.append(
            Fact("two hops", sentences, f"Which colour is the house of the best friend of {name}?", lead, colour)
        )
    return made


def make_exam(tokenizer: Any, text: str, tokens: int, each: int, seed: int) -> Exam:
    """An exam over a stretch of a text.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    text : str
        The user's own; a stretch of it, chosen by ``seed``, becomes the document.
    tokens : int
        Of the document, facts and instruction included; about.
    each : int
        Cases of each task.

    Raises
    ------
    ConfigError
        If the text is too short for ``tokens``, or ``tokens`` for the cases.
    """
    random_ = random.Random(seed)
    hidden = facts(random_, each)
    sentences = [sentence for fact in hidden for sentence in fact.sentences]
    cost = len(_ids(tokenizer, " ".join(sentences))) + 64
    room = tokens - cost
    if room < 16 * len(sentences):
        raise ConfigError(
            f"{tokens} tokens are too few for {each} cases of each task; try {2 * cost + 16 * len(sentences)}"
        )
    ids = _ids(tokenizer, text)
    if len(ids) < room:
        raise ConfigError(
            f"the text has {len(ids)} tokens and {room} are needed for a document of {tokens}; give more --text"
        )
    first = random_.randrange(len(ids) - room + 1)
    body = tokenizer.decode(ids[first : first + room])
    document = _hide(body, sentences, random_)
    asked = [(fact.task, _prompt(tokenizer, document, fact.question), _answered(tokenizer, fact)) for fact in hidden]
    numbers = [fact for fact in hidden if fact.task == "number"]
    asked.append(("table", _prompt(tokenizer, document, TABLE), _tabulated(tokenizer, numbers)))
    shared = _shared([prompt for _, prompt, _ in asked])
    cases = [Case(task, tuple(prompt[len(shared) :]), *given) for task, prompt, given in asked]
    return Exam(tuple(shared), (*cases, *_repeated(shared, each, random_)))


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


def _answered(tokenizer: Any, fact: Fact) -> Given:
    lead = len(_ids(tokenizer, fact.lead))
    whole = _ids(tokenizer, f"{fact.lead} {fact.answer}")
    return tuple(whole), ((lead, len(whole)),)


def _tabulated(tokenizer: Any, facts_: Sequence[Fact]) -> Given:
    """All facts of one kind as a table, a field each."""
    forced, fields = _ids(tokenizer, "| name | number |\n|---|---|\n"), []
    for fact in facts_:
        name = fact.lead.removeprefix("The secret number of ").removesuffix(" is")
        forced += _ids(tokenizer, f"| {name} |")
        value = _ids(tokenizer, f" {fact.answer}")
        fields.append((len(forced), len(forced) + len(value)))
        forced += [*value, *_ids(tokenizer, " |\n")]
    return tuple(forced), tuple(fields)


def _repeated(document: Sequence[int], each: int, random_: random.Random) -> list[Case]:
    """A passage from far back, begun again: what follows its beginning is in the text, word for word."""
    made = []
    for _ in range(each):
        first = random_.randrange(len(document) // 8, len(document) * 3 // 4)
        passage = tuple(document[first : first + SHOWN + REPEATED])
        half = SHOWN // 2
        made.append(Case("repetition", passage[:half], passage[half:], ((half, half + REPEATED),)))
    return made


def _shared(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The tokens with which all begin; at least one of each is left."""
    most = min(map(len, prompts)) - 1
    first = prompts[0]
    end = next((place for place in range(most) if any(one[place] != first[place] for one in prompts)), most)
    return list(first[:end])


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids
