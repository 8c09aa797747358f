"""A small causal language model of Python source, for perplexity against context length on real text, with no download.

It is trained on the standard library of the Python that ran the training and measured on that of the Python it runs
on: modules are held out by a hash of their name, so another version's held-out files are unseen as well.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from scout_hf.eval.pocket import installed

from . import corpus

__all__ = ["TRAINED_TOKENS", "WEIGHTS", "held_out_ids", "held_out_text", "load_text_model"]

WEIGHTS = Path(__file__).parent / "weights"
TRAINED_TOKENS = 4096
"""The longest text, in tokens, the packaged model was trained on."""


def load_text_model(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The packaged text model in eval mode on the CPU, with its tokenizer (byte-level BPE; padding on the left).

    FileNotFoundError if the weights are not installed.
    """
    model = AutoModelForCausalLM.from_pretrained(installed(WEIGHTS, "text"), dtype=dtype, local_files_only=True)
    return model.eval(), _tokenizer()


def held_out_ids(tokens: int, seed: int) -> torch.Tensor:
    """Token ids of standard library source that was not trained on: whole files, each ended by the end-of-text token.

    Parameters
    ----------
    tokens : int
    seed : int
        Determines the order of the files.

    Returns
    -------
    Tensor (1, tokens) of int64

    Raises
    ------
    ValueError
        If the held-out files of this Python are shorter.
    """
    tokenizer = _tokenizer()
    ids: list[int] = []
    for text in corpus.held_out_files(seed):
        ids += tokenizer(text).input_ids + [tokenizer.eos_token_id]
        if len(ids) >= tokens:
            return torch.tensor([ids[:tokens]], dtype=torch.int64, device="cpu")
    raise ValueError(f"tokens={tokens}: the held-out files of this Python have {len(ids)} in all")


def held_out_text(tokens: int, seed: int) -> str:
    """As :func:`held_out_ids`, as text.

    Tokenized again, the last few tokens may differ, since the text is cut there.

    Parameters
    ----------
    tokens : int
    seed : int

    Returns
    -------
    str
    """
    return _tokenizer().decode(held_out_ids(tokens, seed)[0])


def _tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(installed(WEIGHTS, "text"), local_files_only=True)
