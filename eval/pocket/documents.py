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
    """One hidden fact, words joined by spaces; ``position`` is the token index of the first word of its answer."""

    question: str
    answer: str
    position: int


@dataclass(frozen=True)
class Document:
    """A text with hidden facts, in order of position; ``tokens`` is its exact length, one word is one token."""

    text: str
    facts: tuple[Fact, ...]
    tokens: int
    seed: int

    def prompt(self, fact: Fact) -> str:
        """The question to append to the text, after a space."""
        return fact.question


def questions(document: Document) -> list[tuple[str, str]]:
    """Whole prompts (document and question) and answers, for all facts of a document."""
    return [(f"{document.text} {document.prompt(fact)}", fact.answer) for fact in document.facts]


def weave(rng: random.Random, filler: list, sentences: list) -> tuple[list[str], list[int]]:
    """Put sentences, as words, at random places between filler sentences: all words, and where each begins.

    The last filler sentence may be clipped, so it stays last.
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
    """Facts with different keys (adjective, noun) and different first words of the values.

    ValueError if the vocabulary is too small.
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
    """The sentence that states a fact."""
    return ["they", "call", "the", *key, *value, "."]


def question_words(key: tuple[str, str]) -> list[str]:
    """The question that asks for a fact."""
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
    """Random sentences, as words, of so many in all; the last one is clipped, but ends in a full stop."""
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
