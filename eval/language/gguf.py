"""A GGUF file as a folder of safetensors with plain linear layers, by transformers' own reader."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from scout_hf.errors import ConfigError

NEEDED = ("gguf", "accelerate")


def convert(file: Path, folder: Path) -> None:
    """Dequantise ``file`` and write model (bfloat16) and tokenizer to ``folder``.

    Raises ConfigError where a package is missing or transformers does not know the file's architecture.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model, tokenizer = read(file)
    # A new model of the same shape knows nothing of a quantised file.
    config = model.config
    config.__dict__.pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def must_be_readable(name: str) -> None:
    """ConfigError without a package that transformers reads GGUF files with."""
    if missing := [one for one in NEEDED if importlib.util.find_spec(one) is None]:
        packages = " ".join(missing)
        raise ConfigError(f"{name} cannot be read without {packages}: pip install 'scout_hf[demo]', or {packages}")


def read(file: Path) -> tuple[Any, Any]:
    """Model, in float32, and tokenizer of a GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    must_be_readable(file.name)
    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    quiet = not logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where, **_dequantised(file))
    except MemoryError:
        raise
    except Exception as error:  # a broken file can end its readers anywhere
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ConfigError(
            f"transformers cannot read {file.name}: {reason}; is it whole, and of an architecture that it knows?"
        ) from error
    finally:
        if quiet:
            logging.disable_progress_bar()
    return model.eval(), tokenizer


def _dequantised(file: Path) -> dict[str, Any]:
    """Newer releases keep weights quantised unless they are told."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(gguf_file=file.name, dequantize=True)}
