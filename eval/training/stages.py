"""How the small models are trained: Muon for matrices, in stages of longer and longer texts."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from scout_hf.files import write_text

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
    model: PreTrainedModel,
    stages: Sequence[Any],
    name: str,
    step_tokens: int,
    held: tuple[Sequence[torch.nn.Parameter], int],
    loss_of: Callable[[Any, int, random.Random], torch.Tensor],
    rate_of: Callable[[Any, int, int], float],
) -> float:
    """Train `model` in place through stages of `tokens` tokens in sequences of `length`; returns the minutes it took.

    `loss_of(stage, sequences, random)` is the loss of one step, with numbers drawn from the `name` and the stage.
    `rate_of(stage, steps, read)` is a factor on all learning rates, from the steps of the stage and all tokens read;
    `held` are weights that stay as they are for so many tokens. Momentum starts again with each stage.
    """
    began, done = time.time(), 0
    matrices = [weight for weight in model.model.layers.parameters() if weight.dim() == 2]
    chosen = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in chosen]
    for number, stage in enumerate(stages):
        adam = torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0)
        optimizers = (Muon(matrices, lr=MATRIX_RATE), adam)
        groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
        drawn, sequences = random.Random(f"{name}-{number}"), max(1, step_tokens // stage.length)
        steps, end, desc = 0, done + stage.tokens, f"length {stage.length}"
        with tqdm(total=stage.tokens, desc=desc, unit="tok", mininterval=10, unit_scale=True, disable=None) as bar:
            while done < end:
                loss, rate = loss_of(stage, sequences, drawn), rate_of(stage, steps, done)
                for group, first in groups:
                    group["lr"] = rate * first
                loss.backward()
                for weight in held[0] if done < held[1] else ():
                    weight.grad.zero_()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                steps, done = steps + 1, done + sequences * stage.length
                bar.update(sequences * stage.length)
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        # What a last step read beyond the stage does not count.
        done = end
    return (time.time() - began) / 60


def write_training(folder: Path, record: dict[str, Any], shown: str) -> None:
    """Write `training.json`, how a model was made and what it can do, and print the part of that name."""
    write_text(folder / "training.json", json.dumps(record, indent=1) + "\n")
    print(json.dumps(record[shown]))
