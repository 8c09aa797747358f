"""The state of a training run after each of its stages, so that a run can go on after an interruption."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save
from transformers import PreTrainedModel

from scout_hf.files import whole_file


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
    model.load_state_dict(load_file(path))
    with safe_open(path, "pt") as file:
        return float((file.metadata() or {}).get("minutes", 0.0))
