"""A pocket model: a real one-million-parameter Llama that answers needle questions in long text, with no download.

It is what examples and tests run on when no hub can be reached: `load_pocket()` gives a model and a tokenizer made by
the ordinary `from_pretrained` code, `make_document()` a readable text with facts to ask about.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .documents import ANSWER_WORDS, Document, Fact, make_document, questions

__all__ = [
    "ANSWER_WORDS",
    "TRAINED_TOKENS",
    "WEIGHTS",
    "Document",
    "Fact",
    "load_pocket",
    "make_document",
    "questions",
]

WEIGHTS = Path(__file__).parent / "weights"
TRAINED_TOKENS = 4096
"""The longest text, in tokens, the packaged model was trained on; `weights/training.json` measures it at twice that."""


def load_pocket(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The packaged model, in eval mode on the CPU, and its tokenizer (one word, one token; padding on the left)."""
    if not (WEIGHTS / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"no pocket model in {WEIGHTS}: install the package with its data files, or train one with "
            f"`python -m scout_hf.eval.pocket.train --out {WEIGHTS}`"
        )
    model = AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=dtype, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(WEIGHTS, local_files_only=True)
