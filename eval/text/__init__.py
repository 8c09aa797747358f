"""A small causal language model of Python source, for perplexity against context length on real text, with no download.

It is trained on the standard library of the Python that ran the training and measured on that of the Python it runs
on: modules are held out by a hash of their name, so another version's held-out files are unseen as well.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scout_hf.eval.pocket import load_trained

__all__ = ["WEIGHTS", "load_text_model"]

WEIGHTS = Path(__file__).parent / "weights"


def load_text_model(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The packaged text model in eval mode on the CPU, with its tokenizer (byte-level BPE; padding on the left).

    FileNotFoundError if the weights are not installed.
    """
    return load_trained(WEIGHTS, "text", dtype)
