"""The 512 words a pocket model knows, by what they are in a sentence: those of ``vocabulary.json``.

One word is one token, so a document's length in tokens is its number of words, and every position can be named
before anything is tokenized.
"""

from pathlib import Path

from scout_hf.files import read_json
from scout_hf.rules import table, text

PAD, UNKNOWN, BEGIN, END = "<pad>", "<unk>", "<bos>", "<eos>"
SPECIAL = (PAD, UNKNOWN, BEGIN, END)
SIZE = 512

_WORDS = read_json(Path(__file__).with_suffix(".json"), table(text()), "install the package again")
GROUPS = (SPECIAL, *(tuple(words.split()) for words in _WORDS.values()))
"""All of them, in the order of token ids."""

PUNCTUATION, DIGITS, TEMPLATE = GROUPS[1:4]
KEY_ADJECTIVES, KEY_NOUNS, VALUES = GROUPS[4:7]
DETERMINERS, ADJECTIVES, SUBJECTS, VERBS, ADVERBS = GROUPS[7:12]
PREPOSITIONS, POSSESSIVES, OBJECTS, CONJUNCTIONS, NAMES = GROUPS[12:]
