"""How the small models are trained: Muon for matrices, stages, and their states, so that a run can be interrupted."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from tqdm import tqdm
from transformers import PreTrainedModel

from scout_hf.errors import ConfigError
from scout_hf.files import whole_file, write_text
from scout_hf.rules import number

MATRIX_RATE, OTHER_RATE = 0.003, 3e-3


def orthogonalise(updates: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Push all singular values of `updates` (matrices, rows, columns) towards one, by Newton-Schulz steps."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = updates.shape[-2] > updates.shape[-1]
    x = updates.mT if tall else updates
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with orthogonalised updates, in float32 for the CPU; all parameters must be matrices."""

    def __init__(self, matrices: list[torch.nn.Parameter], lr: float = 0.02, momentum: float = 0.95):
        # One group per shape: equal matrices are orthogonalised in one batch, several times faster on small ones.
        shapes = sorted({tuple(matrix.shape) for matrix in matrices})
        groups = [{"params": [matrix for matrix in matrices if tuple(matrix.shape) == shape]} for shape in shapes]
        super().__init__(groups, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of every matrix from its gradient."""
        for group in self.param_groups:
            gradients = torch.stack([matrix.grad for matrix in group["params"]])
            state = self.state[group["params"][0]]
            velocity = state.setdefault("velocity", torch.zeros_like(gradients))
            velocity.lerp_(gradients, 1 - group["momentum"])
            update = orthogonalise(gradients.lerp(velocity, group["momentum"]))
            rows, columns = gradients.shape[-2:]
            update *= -group["lr"] * max(1.0, rows / columns) ** 0.5
            for matrix, change in zip(group["params"], update, strict=True):
                matrix.add_(change)


def train_stages(
    model: PreTrainedModel, stages: Sequence[Any], run: Callable[[int, Any, int], Any], folder: Path | None
) -> float:
    """Call `run(number, stage, tokens before)` for every stage; returns the minutes they took.

    With a `folder`, the state after each stage is kept there as `stage<number>.safetensors`, and a later call continues
    after the last one it finds. Momentum starts again with each stage, so that an interrupted run ends with the same
    weights as one that was not, where stages draw texts of their own.
    """
    finished = [number for number in range(len(stages)) if folder and state_file(folder, number).is_file()]
    first = 1 + max(finished, default=-1)
    minutes = load_state(model, state_file(folder, first - 1)) if first else 0.0
    done = sum(stage.tokens for stage in stages[:first])
    for index in range(first, len(stages)):
        began = time.time()
        run(index, stages[index], done)
        done += stages[index].tokens
        minutes += (time.time() - began) / 60
        if folder:
            save_state(model, state_file(folder, index), minutes)
    return minutes


def train_stage(
    model: PreTrainedModel,
    stage: Any,
    sequences: int,
    loss_of: Callable[[], torch.Tensor],
    rate_of: Callable[[int, int], float],
    held: Callable[[int], Sequence[torch.nn.Parameter]],
    glance: Callable[[int], str],
    glance_tokens: int,
) -> None:
    """Train `model` in place for one stage of `stage.tokens` tokens, so many sequences of `stage.length` per step.

    `loss_of()` is the loss of one step, `rate_of(steps, read)` a factor on all learning rates, `held(read)` are weights
    that stay as they are, and `glance(read)` is a progress message that is printed now and then.
    """
    matrices = [weight for weight in model.model.layers.parameters() if weight.dim() == 2]
    chosen = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in chosen]
    adam = torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    optimizers = (Muon(matrices, lr=MATRIX_RATE), adam)
    starts = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    bar = tqdm(
        total=stage.tokens, desc=f"length {stage.length}", unit="tok", mininterval=10, unit_scale=True, disable=None
    )
    # A bar that nobody sees does not count.
    steps = read = 0
    while read < stage.tokens:
        loss = loss_of()
        rate = rate_of(steps, read)
        for optimizer, firsts in zip(optimizers, starts, strict=True):
            for group, first in zip(optimizer.param_groups, firsts, strict=True):
                group["lr"] = rate * first
        loss.backward()
        for weight in held(read):
            weight.grad.zero_()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        steps += 1
        before, read = read, read + sequences * stage.length
        bar.update(sequences * stage.length)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if read // glance_tokens > before // glance_tokens:
            bar.write(glance(read))
    bar.close()


def write_training(folder: Path, record: dict[str, Any], shown: str) -> None:
    """Write `training.json`, how a model was made and what it can do, and print the part of that name."""
    write_text(folder / "training.json", json.dumps(record, indent=1) + "\n")
    print(json.dumps(record[shown]))


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
        raise ConfigError(f"{path} holds no state of this training: {error}; delete it to train it again") from error
    return minutes
