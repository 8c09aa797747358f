"""Tensor parallel by transformers (``tp_plan="auto"``): which part of a model is on this rank, and what ranks agree on.

Each rank has some of the KV heads, with their queries, so that almost all that scout_hf does concerns its own rank
alone. Ranks wait for each other in every layer, and must therefore take the same steps over the same tokens.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

LOCAL = frozenset(
    {"colwise", "rowwise", "replicate", "replicated_with_grad_allreduce", "local_params", "mla_kv_a_proj"}
)
"""Rules of a plan under which a module makes what its own rank needs from what every rank has, up to the attention."""

FOLDERS = "rank-*-of-*"


class Ranks:
    """The ranks of one model; one of size 1 for a model in one process.

    Parameters
    ----------
    model : PreTrainedModel

    Attributes
    ----------
    size, rank : int
    """

    def __init__(self, model: Any):
        self.size, self.rank = getattr(model, "tp_size", None) or 1, 0
        self._mesh: Any = None
        if self.size > 1:
            mesh = model._device_mesh
            self._mesh = mesh if mesh.ndim == 1 else mesh["tp"]
            self.rank = self._mesh.get_local_rank()

    def slowest(self, *seconds: float) -> tuple[float, ...]:
        """Each number as the slowest rank measured it, so that ranks conclude the same; all of them must call this."""
        if self.size == 1:
            return seconds
        told = torch.tensor(seconds, dtype=torch.float64, device=self._mesh.device_type)
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX, group=self._mesh.get_group())
        return tuple(told.tolist())

    def folder(self, path: str | os.PathLike[str]) -> Path:
        """Where the part of this rank lies in a folder."""
        return Path(path) / f"rank-{self.rank}-of-{self.size}" if self.size > 1 else Path(path)

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size}"


def here(weight: Any) -> Any:
    """A weight, or the part of it that this rank has: transformers 5.17 and newer spread DTensors.

    Without gradients, the same object each time.
    """
    return weight.to_local() if hasattr(weight, "to_local") else weight


def rules_of_attention(model: Any, family: Any) -> dict[str, str]:
    """The rules of the model's plan for the attention of a layer, by module or parameter in it.

    Empty for a model in one process.
    """
    if (getattr(model, "tp_size", None) or 1) == 1:
        return {}
    for layer in family.layers(family.decoder(model)):
        try:
            attention = family.attention(layer)
        except AttributeError:  # a layer without softmax attention
            continue
        name = next(name for name, module in model.named_modules() if module is attention)
        home = re.sub(r"\.\d+(?=\.|$)", ".*", name) + "."
        return {rule.removeprefix(home): kind for rule, kind in (model.tp_plan or {}).items() if rule.startswith(home)}
    return {}
