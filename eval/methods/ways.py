"""What is held side by side: every registered method, scout's ablations, and what transformers itself offers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache, DynamicCache

import scout_hf
from scout_hf.eval.bench.drift import drifting
from scout_hf.methods import method_names

STOCK = ("stock", "stock offloaded", "stock quantized")
KVPRESS = "kvpress"
"""Cuts a prompt's KV down once and for all, in a process of its own; see :mod:`scout_hf.eval.methods.pressed`."""

ABLATIONS = ("scout, neither", "scout, no recall")
RANDOM = "random"
"""The settings of a way may differ where weights are random, and no score could tell."""


class Missing(Exception):
    """A way that cannot be measured here; the text is its result."""


@dataclass(frozen=True)
class Way:
    """One row of the comparison.

    Parameters
    ----------
    name : str
    options : dict or None
        For ``scout_hf.patch``; None for an unpatched model.
    takes_budget : bool
        Whether it attends to a part; else a budget changes nothing.
    """

    name: str
    options: dict[str, Any] | None = None
    takes_budget: bool = True
    emulated: bool = field(default=True)

    @property
    def patched(self) -> bool:
        """Whether a patch takes part."""
        return self.options is not None


def names() -> tuple[str, ...]:
    """All ways, in the order of tables."""
    rest = [name for name in method_names() if name not in ("scout", "hgca", "infinigen", "kvpr", "dense")]
    return (*STOCK, KVPRESS, "scout, one tier", "scout", *ABLATIONS, "hgca", "infinigen", "kvpr", "dense", *rest)


def find(name: str, weights: str = "trained") -> Way:
    """The way of that name; ValueError with the names there are.

    Parameters
    ----------
    name : str
    weights : str
        ``random``: scout's choice of blocks drifts synthetically, as in a real text, and InfiniGen fills its budget.
    """
    if name not in names():
        raise ValueError(f"no way {name!r} to decode; there are: {', '.join(names())}")
    if name in STOCK:
        return Way(name, None, takes_budget=False)
    if name == KVPRESS:
        return Way(name, None)
    if name == "scout, one tier":
        return Way(name, {"split": "off"}, emulated=False)
    method = name.split(",")[0]
    options: dict[str, Any] = {"method": method}
    if method == "scout":
        # The paper's rule: the CPU attends ahead with the predicted query.
        ahead = {} if weights != RANDOM else {"cpu_query": "predicted", "digest": drifting("minmax")}
        options |= {"split": "cpu"} | ahead
        if name == "scout, neither":
            options |= {"layer_ahead": False, "recall": None}
        elif name == "scout, no recall":
            options |= {"recall": None}
    elif method == "infinigen" and weights == RANDOM:
        options["method_options"] = {"alpha": None}
    return Way(name, options, takes_budget=method not in ("kvpr", "dense"))


def cache_maker(way: Way, model: torch.nn.Module, handle: scout_hf.Handle | None) -> Callable[[], Cache]:
    """What makes the caches of a way; Missing where it cannot here."""
    if handle is not None:
        return handle.new_cache
    if way.name == "stock offloaded":
        if model.device.type == "cpu":
            raise Missing("needs a GPU")
        return lambda: DynamicCache(config=model.config, offloading=True)
    if way.name == "stock quantized":
        return _quantized(model)
    return lambda: DynamicCache(config=model.config)


def _quantized(model: torch.nn.Module) -> Callable[[], Cache]:
    from transformers import QuantizedCache
    from transformers.utils import is_hqq_available, is_optimum_quanto_available

    reason = "not installed: pip install hqq, or optimum-quanto"
    for backend, there, axes in (
        ("quanto", is_optimum_quanto_available(), {}),
        ("hqq", is_hqq_available(), {"axis_key": 1, "axis_value": 1}),
    ):
        try:
            if there:
                QuantizedCache(backend, model.config, nbits=4, **axes)
                return lambda: QuantizedCache(backend, model.config, nbits=4, **axes)
        except ImportError as error:  # it is there, but not for this transformers
            reason = f"not installed: {backend}: {error}".splitlines()[0]
    raise Missing(reason)
