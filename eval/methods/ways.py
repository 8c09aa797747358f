"""What is held side by side: every registered method, scout's ablations, and what transformers itself offers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache, DynamicCache

import scout_hf
from scout_hf.eval.bench.drift import drifting
from scout_hf.eval.methods.drifting_tokens import NAME, drifting_infinigen
from scout_hf.methods import method_names

FOLDED = "stock folded"
"""Stock with the GQA group folded into one query tensor: on a CPU stock attention is far from the speed of memory."""

STOCK = ("stock", FOLDED, "stock offloaded", "stock quantized")
KVPRESS = "kvpress"
"""Its KeyDiffPress cuts a prompt's KV down for good, in a process of its own: :mod:`scout_hf.eval.methods.pressed`."""

KEPT = "infinigen, kept"
"""Of the budget only what is not on the device yet crosses. InfiniGen recalls all of it in every step; ScoutAttention's
figures of it (381 tokens/s in figure 8) are more than its link could carry so."""

PREDICTED = "scout, predicted"
"""The paper's rule: the CPU always attends ahead, with the predicted query.

As shipped, ``scout`` does so where that query is seen to change little, and random weights are no place for that.
"""

ABLATIONS = ("scout, predicted, no recall", "scout, neither")

SAME_ANSWERS = {KEPT: "infinigen"}
"""Ways that attend to the same tokens as another one, and are not asked themselves."""

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
    known = ("scout", "hgca", "infinigen", "kvpr", "dense", NAME)
    rest = [name for name in method_names() if name not in known]
    return (
        *STOCK,
        KVPRESS,
        "scout, one tier",
        "scout",
        PREDICTED,
        *ABLATIONS,
        "hgca",
        "infinigen",
        KEPT,
        "kvpr",
        "dense",
        *rest,
    )


def rank(name: str) -> tuple[bool, int]:
    """Sorts ways as tables have them; those that a record has from elsewhere come last."""
    known = names()
    return name not in known, known.index(name) if name in known else 0


def parse(given: Sequence[str] | None) -> tuple[str, ...] | None:
    """Names from options, each of which may be several with commas between; None for all.

    A name may hold a comma itself: the longest that is known counts. ValueError for an unknown one.
    """
    found: list[str] = []
    for text in given or ():
        left = text.strip()
        while left:
            known = [name for name in names() if left == name or left.startswith(f"{name},")]
            if not known:
                find(left.split(",")[0].strip())
            name = max(known, key=len)
            found.append(name)
            left = left[len(name) + 1 :].strip()
    return tuple(dict.fromkeys(found)) or None


def find(name: str, weights: str = "trained") -> Way:
    """The way of that name; ValueError with the names there are.

    Parameters
    ----------
    name : str
    weights : str
        ``random``: scout's choice of blocks drifts synthetically, as in a real text, and InfiniGen fills its budget.
    """
    if name not in names():
        raise ValueError(f"no way {name!r} to decode; there are: {', '.join(map(repr, names()))}")
    if name in STOCK:
        return Way(name, None, takes_budget=False)
    if name == KVPRESS:
        return Way(name, None)
    if name == "scout, one tier":
        return Way(name, {"split": "off"}, emulated=False)
    method = name.split(",")[0]
    options: dict[str, Any] = {"method": method}
    if method == "scout":
        options |= {"split": "cpu"} | ({"digest": drifting("minmax")} if weights == RANDOM else {})
        if name == "scout, neither":
            options |= {"layer_ahead": False, "recall": None}
        elif name.startswith(PREDICTED):
            options |= {"cpu_query": "predicted"} | ({"recall": None} if name != PREDICTED else {})
    elif method == "infinigen":
        options["method_options"] = ({"alpha": None} if weights == RANDOM else {}) | {"keep": name == KEPT}
        if name == KEPT and weights == RANDOM:
            options["method"] = drifting_infinigen()
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
