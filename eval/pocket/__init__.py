"""Pocket models: real decoders of one million parameters that answer questions about long text, with no download.

They are what examples and tests run on when no hub can be reached: `load_pocket()` gives a model and a tokenizer made
by the ordinary `from_pretrained` code, `make_document()` a readable text with facts to ask about, and `make_exercise()`
the same for each of `TASKS`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .documents import ANSWER_WORDS, Document, Fact, questions
from .tasks import TASKS, make_document, make_exercise

__all__ = [
    "ANSWER_WORDS",
    "POCKET_MODELS",
    "TASKS",
    "TRAINED_TOKENS",
    "WEIGHTS",
    "Document",
    "Fact",
    "load_pocket",
    "make_document",
    "make_exercise",
    "questions",
]

WEIGHTS = Path(__file__).parent / "weights"
POCKET_MODELS = ("llama", "qwen3")
"""Names of the packaged models; `weights/<name>/training.json` says how each was trained and what it can do."""
TRAINED_TOKENS = 4096
"""The longest text, in tokens, the packaged models were trained on; they are measured at twice that."""


PLAIN_CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""A chat, for models that were not trained on any: the messages, one after the other."""


def load_pocket(
    name: str = "llama", dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a packaged model in eval mode on the CPU, with its tokenizer (one word is one token; padding on the left).

    Parameters
    ----------
    name : str
        One of ``POCKET_MODELS``.
    dtype : torch.dtype

    Returns
    -------
    PreTrainedModel
    PreTrainedTokenizerBase

    Raises
    ------
    ValueError
        If the name is unknown.
    FileNotFoundError
        If the weights are not installed.

    Examples
    --------
    >>> model, tokenizer = load_pocket()
    >>> tokenizer("they call the velvet panther lemon").input_ids
    """
    if name not in POCKET_MODELS:
        raise ValueError(f"no pocket model {name!r}: there are {', '.join(POCKET_MODELS)}")
    model, tokenizer = load_trained(WEIGHTS / name, f"pocket --arch {name}", dtype)
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_CHAT
    return model, tokenizer


def load_trained(folder: Path, recipe: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A packaged model and its tokenizer; FileNotFoundError without weights, which says how to get them."""
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"no model in {folder}: install the package with its data files, or train one with "
            f"`python -m scout_hf.eval.training.{recipe} --out {folder}`"
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)
