"""The state of a training run after each of its stages, so that a run can go on after an interruption."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from transformers import PreTrainedModel

from scout_hf.errors import ConfigError
from scout_hf.files import whole_file
from scout_hf.rules import number


def state_file(folder: Path, number: int) -> Path:
    """Where the weights after stage `number` are kept."""
    return folder / f"stage{number}.safetensors"


def save_state(model: PreTrainedModel, path: Path, minutes: float) -> None:
    """Keep the weights of `model` and the `minutes` that they took."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, binary=True) as file:
        file.write(save(model.state_dict(), {"minutes": str(minutes)}))


def load_state(model: PreTrainedModel, path: Path) -> float:
    """Take back the weights that `save_state` kept; returns the minutes that they took."""
    try:
        with safe_open(path, "pt") as file:
            minutes = float((file.metadata() or {}).get("minutes", 0.0))
        number(0, 1e9)(minutes)
        model.load_state_dict(load_file(path))
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{path} holds no state of this training: {error}; delete it to train it anew") from error
    return minutes
