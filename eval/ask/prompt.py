"""The prompt of a question about a text, whose beginning is the same for every question.

Beginning and end are tokenized apart, so that the one never depends on the other, and so are the text and the question:
what looks like a special token in them is ordinary text to the model.
"""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass
from typing import Any

from scout_hf.errors import ConfigError

INTRODUCTION, REQUEST = "Here is a text.\n\n", "\n\nAnswer from the text.\n\n"
TEXT, QUESTION = "[[the-text-of-scout-hf]]", "[[the-question-of-scout-hf]]"
TODAY = datetime.datetime(2024, 7, 26)
"""For templates that tell the model which day it is: with the real one, a text would be new every day. Llama's own."""

_DATE = re.compile(r"""strftime_now\(\s*(["'])(.+?)\1\s*\)""")


@dataclass(frozen=True)
class Frame:
    """What stands around text and question.

    Attributes
    ----------
    head, middle, end : str
        Before the text, between text and question, and behind the question.
    """

    head: str
    middle: str
    end: str


def frame_of(tokenizer: Any, plain: bool = False) -> Frame:
    """By the chat template of the tokenizer, if it has one and ``plain`` is not asked for.

    Raises
    ------
    ConfigError
        If the template does not pass on what the user says, text first.
    """
    content = f"{INTRODUCTION}{TEXT}{REQUEST}{QUESTION}"
    if plain or not getattr(tokenizer, "chat_template", None):
        whole = content + "\n"
    else:
        chat = [{"role": "user", "content": content}]
        try:
            template = _DATE.sub(lambda found: repr(TODAY.strftime(found[2])), tokenizer.get_chat_template())
            whole = tokenizer.apply_chat_template(
                chat,
                chat_template=template,
                add_generation_prompt=True,
                tokenize=False,
                date_string=TODAY.strftime("%d %b %Y"),
            )
        except Exception as error:  # whatever a template raises
            raise ConfigError(f"the chat template of this model cannot be used ({error}); try --plain") from error
    head, text, rest = whole.partition(TEXT)
    middle, question, end = rest.partition(QUESTION)
    if not text or not question or TEXT in rest or QUESTION in end:
        raise ConfigError("the chat template of this model does not pass on text and question once each; try --plain")
    return Frame(head, middle, end)


def begin_ids(tokenizer: Any, text: str, plain: bool = False, most: int | None = None) -> list[int]:
    """Token ids of all prompts up to the end of the text, or of its first ``most`` tokens."""
    frame = frame_of(tokenizer, plain)
    templated = not plain and bool(getattr(tokenizer, "chat_template", None))
    first = [] if templated else _first_ids(tokenizer)
    return first + _ids(tokenizer, frame.head) + _ids(tokenizer, text, ordinary=True)[:most]


def end_ids(tokenizer: Any, question: str, plain: bool = False) -> list[int]:
    """Token ids of what follows the text in a prompt."""
    frame = frame_of(tokenizer, plain)
    asked = _ids(tokenizer, frame.middle + question, ordinary=True)
    return asked + _ids(tokenizer, frame.end)


def _first_ids(tokenizer: Any) -> list[int]:
    """The token that this tokenizer puts before every text, if it does."""
    added = tokenizer("").input_ids
    return added[:1] if added and added[0] == tokenizer.bos_token_id else []


def _ids(tokenizer: Any, content: str, ordinary: bool = False) -> list[int]:
    if not content:
        return []
    # Not verbose: it would warn of lengths, which are looked at elsewhere.
    options = {"split_special_tokens": True} if ordinary else {}
    return tokenizer(content, add_special_tokens=False, verbose=False, **options).input_ids
