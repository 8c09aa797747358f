"""The document of the demo: paragraphs of Python's own reference, and facts between them.

``facts.json`` names the paragraphs by checksum: those that Python 3.10 to 3.14 have word for word, so that the document
is the same everywhere. A later Python that lacks some has a shorter document.
"""

from __future__ import annotations

import hashlib
import os.path
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scout_hf.errors import ConfigError
from scout_hf.files import read_json
from scout_hf.rules import fields, items, number, text

FACTS = Path(__file__).parent / "facts.json"
_FACT = fields({"before": number(low=0), "text": text(), "question": text(), "begin": text(), "answer": text()})
RULE = fields({"topic": text(), "title": text(), "paragraphs": items(text()), "facts": items(_FACT, fewest=1)})

INTRODUCTION = "Here is a text. Facts stand in it.\n\n"
REQUEST = "Answer from the text.\n\n"


@dataclass(frozen=True)
class Fact:
    """A hidden paragraph, the question for it, how the answer begins, and how it ends."""

    text: str
    question: str
    begin: str
    answer: str


@dataclass(frozen=True)
class Document:
    """A text, its title, and the facts in it in their order."""

    title: str
    text: str
    facts: tuple[Fact, ...]


@dataclass(frozen=True)
class Prompts:
    """Token ids: what all prompts share, and of every fact the whole prompt and the beginning of the answer."""

    shared: list[int]
    whole: list[list[int]]
    begins: list[list[int]]


def read_document() -> Document:
    """The document of ``facts.json``; ConfigError where this Python was installed without its reference."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ConfigError("this Python was installed without pydoc_data, whose text the demo asks about") from error
    return make_document(topics, read_json(FACTS, RULE, "install scout_hf again"))


def make_document(topics: dict[str, str], plan: dict[str, Any]) -> Document:
    """The paragraphs that are there, with every fact before its paragraph.

    Parameters
    ----------
    topics : dict
        As ``pydoc_data.topics`` has them.
    plan : dict
        As ``facts.json`` has it.
    """
    there = {checksum(one): one for one in paragraphs(topics.get(plan["topic"], ""))}
    if not set(plan["paragraphs"]) & set(there):
        raise ConfigError(f"the topic {plan['topic']} of this Python's reference is another text")
    parts, facts = [], sorted(plan["facts"], key=lambda one: one["before"])
    for index, name in enumerate(plan["paragraphs"]):
        parts += [one["text"] for one in facts if one["before"] == index]
        parts += [there[name]] if name in there else []
    told = tuple(Fact(one["text"], one["question"], one["begin"], one["answer"]) for one in facts)
    return Document(plan["title"], "\n\n".join(parts), told)


def paragraphs(topic: str) -> list[str]:
    """On a line each, without marks of emphasis, which differ between releases."""
    return [" ".join(re.sub(r"[*`]", "", one).split()) for one in re.split(r"\n\s*\n", topic)]


def checksum(paragraph: str) -> str:
    """Of a paragraph, ten digits."""
    return hashlib.sha256(paragraph.encode()).hexdigest()[:10]


def make_prompts(tokenizer: Any, document: Document) -> Prompts:
    """Every question after the document, by the tokenizer's chat template if it has one."""
    whole = [_ids(tokenizer, _prompt(tokenizer, document, fact)) for fact in document.facts]
    begins = []
    for fact, ids in zip(document.facts, whole):
        both = _ids(tokenizer, _prompt(tokenizer, document, fact) + fact.begin)
        begins.append(both[len(ids) :])
    # One token is left to every question.
    shared = os.path.commonprefix([ids[:-1] for ids in whole])
    return Prompts(list(shared), whole, begins)


def place(tokenizer: Any, document: Document, fact: Fact) -> int:
    """About how many tokens stand before a fact."""
    return len(_ids(tokenizer, document.text[: document.text.index(fact.text)]))


def _prompt(tokenizer: Any, document: Document, fact: Fact) -> str:
    content = f"{INTRODUCTION}{document.text}\n\n{REQUEST}{fact.question}"
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": content}]
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return content + "\n"


def _ids(tokenizer: Any, content: str) -> list[int]:
    return tokenizer(content, add_special_tokens=False).input_ids
