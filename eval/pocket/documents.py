"""Seeded documents: readable filler sentences with facts hidden between them, and the questions that ask for them.

A fact reads "they call the amber falcon seven kilo mango ." and its question "what do they call the amber falcon". Some
facts of a document share the animal or the colour, so neither word alone finds the answer. The answer follows the
key at once, in the fact as after the question: then finding a fact and reading on in it are the same skill.
"""

import random
from dataclasses import dataclass
from functools import cache

from . import vocabulary as vocab

ANSWER_WORDS = 3
_LANGUAGE_SEED = 20240229
_SUCCESSORS = 6


@dataclass(frozen=True)
class Fact:
    """One hidden fact.

    Attributes
    ----------
    question, answer : str
        Words joined by spaces.
    position : int
        Token index of the first word of the answer in the document.
    """

    question: str
    answer: str
    position: int


@dataclass(frozen=True)
class Document:
    """A text with hidden facts.

    Attributes
    ----------
    text : str
    facts : tuple of Fact
        In order of position.
    tokens : int
        Exact length; one word is one token.
    seed : int
    """

    text: str
    facts: tuple[Fact, ...]
    tokens: int
    seed: int

    def prompt(self, fact: Fact) -> str:
        """The question to append to the text, after a space.

        Parameters
        ----------
        fact : Fact

        Returns
        -------
        str
        """
        return fact.question


def questions(document: Document) -> list[tuple[str, str]]:
    """Whole prompts for all facts of a document.

    Parameters
    ----------
    document : Document

    Returns
    -------
    list of (str, str)
        Prompt (document and question) and answer.
    """
    return [(f"{document.text} {document.prompt(fact)}", fact.answer) for fact in document.facts]


def weave(rng: random.Random, filler: list, sentences: list) -> tuple[list[str], list[int]]:
    """Put sentences at random places between filler sentences, in their order.

    The last filler sentence may be clipped, so it stays last.

    Parameters
    ----------
    rng : random.Random
    filler, sentences : list of list of str
        Sentences as words.

    Returns
    -------
    list of str
        All words.
    list of int
        Index of the first word of each of ``sentences``.
    """
    places = sorted(rng.choices(range(max(1, len(filler))), k=len(sentences)))
    words: list[str] = []
    starts: list[int] = []
    for index in range(max(1, len(filler))):
        while len(starts) < len(sentences) and places[len(starts)] == index:
            starts.append(len(words))
            words += sentences[len(starts) - 1]
        words += filler[index] if filler else []
    return words, starts


def draw_facts(rng: random.Random, count: int) -> list[tuple[tuple[str, str], tuple[str, ...]]]:
    """Draw facts with different keys and different first words of the values.

    Parameters
    ----------
    rng : random.Random
    count : int

    Returns
    -------
    list of (tuple of str, tuple of str)
        Key (adjective, noun) and value (``ANSWER_WORDS`` words).

    Raises
    ------
    ValueError
        If ``count`` is larger than the vocabulary.
    """
    if count > len(vocab.VALUES):
        raise ValueError(f"at most {len(vocab.VALUES)} facts fit one document, {count} asked")
    keys: dict[tuple[str, str], None] = {}
    while len(keys) < count:
        keys[rng.choice(vocab.KEY_ADJECTIVES), rng.choice(vocab.KEY_NOUNS)] = None
    firsts = rng.sample(vocab.VALUES, count)
    values = []
    for first in firsts:
        rest = rng.sample([word for word in vocab.VALUES if word != first], ANSWER_WORDS - 1)
        values.append((first, *rest))
    return list(zip(keys, values, strict=True))


def fact_words(key: tuple[str, str], value: tuple[str, ...]) -> list[str]:
    """The sentence that states a fact.

    Parameters
    ----------
    key, value : tuple of str

    Returns
    -------
    list of str
    """
    return ["they", "call", "the", *key, *value, "."]


def question_words(key: tuple[str, str]) -> list[str]:
    """The question that asks for a fact.

    Parameters
    ----------
    key : tuple of str

    Returns
    -------
    list of str
    """
    return ["what", "do", "they", "call", "the", *key]


@cache
def _language() -> dict[str, list[str]]:
    """The words that may follow each word: a fixed first-order Markov chain that makes plausible sentences."""
    rng = random.Random(_LANGUAGE_SEED)
    order = (
        (vocab.DETERMINERS, vocab.ADJECTIVES),
        (vocab.ADJECTIVES, vocab.SUBJECTS),
        (vocab.SUBJECTS, vocab.VERBS),
        (vocab.VERBS, vocab.PREPOSITIONS + vocab.ADVERBS),
        (vocab.ADVERBS, vocab.PREPOSITIONS),
        (vocab.PREPOSITIONS, vocab.POSSESSIVES),
        (vocab.POSSESSIVES, vocab.OBJECTS),
        (vocab.OBJECTS, (*vocab.CONJUNCTIONS, *".....")),
        (vocab.CONJUNCTIONS, vocab.DETERMINERS),
        ((".",), vocab.DETERMINERS),
    )
    return {word: rng.sample(after, min(_SUCCESSORS, len(after))) for before, after in order for word in before}


def filler_sentences(rng: random.Random, tokens: int) -> list[list[str]]:
    """Random filler sentences.

    Parameters
    ----------
    rng : random.Random
    tokens : int
        Words in all; the last sentence is clipped, but ends in a full stop.

    Returns
    -------
    list of list of str
    """
    language = _language()
    sentences: list[list[str]] = []
    while tokens > 0:
        sentence, word = [], "."
        while not sentence or word != ".":
            word = language[word][int(rng.random() * len(language[word]))]
            sentence.append(word)
        if len(sentence) > tokens:
            sentence = [*sentence[: tokens - 1], "."]
        sentences.append(sentence)
        tokens -= len(sentence)
    return sentences
