"""Facts to hide in a text: sentences, a question for each, and the answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

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
COLOURS = "red green blue yellow black white brown purple orange grey".split()
JOBS = (
    "baker doctor teacher farmer painter singer lawyer nurse pilot sailor tailor butcher carpenter chemist dentist "
    "driver gardener hunter judge mason porter clerk"
).split()
THINGS = (
    "piano guitar telescope mirror blanket basket candle hammer ladder umbrella compass drum violin saddle "
    "lantern wagon carpet barrel"
).split()
_ALLERGIC, _SCARED = "strawberries oranges peanuts onions carrots tomatoes".split(), "spiders dogs horses mice".split()
_PLACES, _STUFFS = "garden cellar kitchen attic library stable".split(), "copper silver wood glass marble straw".split()
_NAMED = "Robert Julia Martin Helen Thomas Laura".split()

STORIES: tuple[tuple[str, str, str, Sequence[str]], ...] = (
    ("What is the giant allergic to?", "The giant is allergic to", "One bowl of {} sends the giant to bed", _ALLERGIC),
    ("Where did the pirates hide their gold?", "The pirates hid their gold in the", "They sleep beside the {}", THINGS),
    ("What is the mayor afraid of?", "The mayor is afraid of", "Because of {} the mayor stays at home", _SCARED),
    ("What did the monkey steal?", "The monkey stole the", "Everybody looks for the {} and the monkey", THINGS),
    ("What does the statue show?", "The statue shows a", "The {} of the statue is famous", THINGS),
    ("What is the roof of the palace made of?", "The roof of the palace is made of", "The {} shines", _STUFFS),
    ("Where does the cat sleep?", "The cat sleeps in the", "The {} belongs to the cat", _PLACES),
    ("Who won the race?", "The winner of the race was", "All people of the town cheered for {}", _NAMED),
    ("Which colour is the garden gate?", "The colour of the garden gate is", "The {} gate is always open", COLOURS),
    ("What did the ghost break?", "The ghost broke the", "Nobody can mend the {} of the ghost", THINGS),
    ("What does the queen collect?", "The queen collects", "Her room is full of {}", _STUFFS),
    ("What did the wizard forget?", "The wizard forgot his", "Without his {} the wizard is lost", THINGS),
    ("Where was the painter born?", "The painter was born in", "The people of {} are proud of the painter", CITIES),
    ("What does the dragon eat?", "The dragon eats", "A dragon without {} is a hungry dragon", FOODS),
    ("What did the princess sell?", "The princess sold her", "A merchant bought the {} of the princess", THINGS),
    ("Which colour is the boat of the captain?", "The boat of the captain is", "The {} boat is fast", COLOURS),
)
"""Question, how its answer begins, a second sentence of the same, and what the answer may be: no two are alike."""

RETRIEVAL = ("fact", "word", "number", "two values", "two hops")
"""Tasks whose answers are facts hidden in the text, asked for one by one.

A fact is said twice and like no other; the others have as many rivals as there are cases.
"""


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
    for question, lead, more, values in random_.sample(STORIES, each):
        value = random_.choice(values)
        made.append(Fact("fact", (f"{lead} {value}. {more.format(value)}.",), question, lead, value))
    for name, city in zip(random_.sample(NAMES, each), random_.sample(CITIES, each)):
        made.append(
            Fact("word", (f"{name} was born in {city}.",), f"Where was {name} born?", f"{name} was born in", city)
        )
    for name in random_.sample(NAMES, each):
        number = str(random_.randrange(1_000, 10_000))
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
