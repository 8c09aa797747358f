"""One way to a language model from what a user names: a packaged model, a folder, a GGUF file, a name of the hub."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from scout_hf.errors import ConfigError, MissingFileError
from scout_hf.eval.language import gguf
from scout_hf.eval.language.packaged import PACKAGED, fetched

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(
    name: str,
    ask: Callable[[str], bool] = lambda question: True,
    tell: Callable[[str], object] = print,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in eval mode, and its tokenizer.

    Parameters
    ----------
    name : str
        A name of :data:`~scout_hf.eval.language.PACKAGED`, a folder as ``save_pretrained`` leaves it, the path of a
        GGUF file, or a name of the model hub.
    ask, tell : callable
        See :func:`~scout_hf.eval.language.fetched`.
    dtype : torch.dtype, optional
        By default :func:`usual_dtype` of the device.
    device : str

    Raises
    ------
    ConfigError
        If it is no causal language model, lacks weights or a tokenizer, is broken, or was not to be fetched.
    MissingFileError
        If the path leads nowhere, or nobody has the name.

    Examples
    --------
    >>> model, tokenizer = load("smollm2-135m")  # doctest: +SKIP
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    dtype = dtype or usual_dtype(device)
    if name.endswith(".gguf"):
        if not Path(name).is_file():
            raise MissingFileError(f"{name} is not there, or no file")
        model, tokenizer = gguf.read(Path(name))
        return model.to(device, dtype), tokenizer
    name = located(name, ask, tell)
    try:
        model, told = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, SafetensorError) as error:
        known = f"the packaged models are {', '.join(PACKAGED)}"
        raise ConfigError(
            f"{name} cannot be loaded as a causal language model: {_first_line(error)}; {known}"
        ) from error
    if missing := sorted(told["missing_keys"]):
        raise ConfigError(
            f"{name} lacks {len(missing)} of the weights of {type(model).__name__}, such as {missing[0]}, which "
            "would be random; save the whole model with save_pretrained(folder), as a causal language model"
        )
    return model.eval().to(device), _tokenizer(name)


def load_tokenizer(
    name: str, ask: Callable[[str], bool] = lambda question: True, tell: Callable[[str], object] = print
) -> PreTrainedTokenizerBase:
    """The tokenizer of :func:`load`, without the model where that is possible."""
    if name.endswith(".gguf"):
        return load(name)[1]
    return _tokenizer(located(name, ask, tell))


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{name} has no tokenizer that transformers can load ({_first_line(error)}); save one beside it with "
            "tokenizer.save_pretrained(folder)"
        ) from error


def located(
    name: str, ask: Callable[[str], bool] = lambda question: True, tell: Callable[[str], object] = print
) -> str:
    """What ``from_pretrained`` takes: the folder of a packaged model, fetched if need be; else the name itself.

    ConfigError if it was not to be fetched, MissingFileError for a path that leads to no model.
    """
    if name in PACKAGED:
        folder = fetched(name, ask, tell)
        if folder is None:
            raise ConfigError(f"{name} was not to be fetched; name a folder, a GGUF file, or another model")
        return str(folder)
    if _is_path(name) and not Path(name, "config.json").is_file():
        raise MissingFileError(f"{name} is not the folder of a model: {Path(name, 'config.json')} is missing")
    return name


def ask_at_terminal(question: str) -> bool:
    """Yes or no; ConfigError where nobody can be asked."""
    if not sys.stdin.isatty():
        raise ConfigError(f"{question} There is nobody to ask: say --yes")
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def usual_dtype(device: str = "cpu") -> torch.dtype:
    """bfloat16 on a GPU; float32 on a CPU, where most have no fast bfloat16."""
    import torch

    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def _is_path(name: str) -> bool:
    return os.sep in name and (name.startswith((os.sep, ".", "~")) or Path(name).exists()) or Path(name).is_dir()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
