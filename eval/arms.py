"""The registry of arms, which all benchmarks and studies compare.

An arm is a way to decode: a setting of ``scout_hf.patch``, or a cache and an attention that transformers itself offers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import Cache, DynamicCache, PreTrainedModel

from scout_hf.eval.bench.drift import NAME, drifting, drifting_infinigen
from scout_hf.eval.bench.models import folded
from scout_hf.eval.caches import Caches, caches_of
from scout_hf.methods import method_names


class Missing(Exception):
    """An arm that cannot be measured here; the text is its result."""


@dataclass(frozen=True)
class Arm:
    """One way to decode: a row of a comparison.

    Attributes
    ----------
    name : str
    options : dict or None
        Options of ``scout_hf.patch``; None for an unpatched model.
    takes_budget : bool
        False if a budget changes nothing, since all tokens are attended.
    emulated : bool
        Whether it uses the emulated link and CPU.
    cache : str
        Of an unpatched model, as for ``generate``: dynamic, offloaded or quantized.
    folded : bool
        Whether each GQA group is folded into one query tensor, the fastest form of stock attention on a CPU.
    """

    name: str
    options: dict[str, Any] | None = None
    takes_budget: bool = True
    emulated: bool = True
    cache: str = "dynamic"
    folded: bool = False

    @contextmanager
    def caches(self, model: PreTrainedModel, **options: Any) -> Iterator[Caches]:
        """Make the model decode this way meanwhile, and yield its caches; Missing if the arm cannot run here.

        ``options`` are further ones of ``scout_hf.patch``.
        """
        with ExitStack() as stack:
            if self.options is not None:
                yield stack.enter_context(caches_of(model, **options | self.options))
                return
            if self.folded:
                stack.enter_context(folded(model))
            yield Caches(self._stock(model))

    def _stock(self, model: PreTrainedModel) -> Callable[[], Cache]:
        offloading = {"offloading": True} if self.cache == "offloaded" else {}
        if offloading and model.device.type == "cpu":
            raise Missing("needs a GPU")
        if self.cache == "quantized":
            return _quantized(model)
        return lambda: DynamicCache(config=model.config, **offloading)


def _quantized(model: PreTrainedModel) -> Callable[[], Cache]:
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


def _by_name(*arms: Arm) -> dict[str, Arm]:
    return {arm.name: arm for arm in arms}


STOCK = _by_name(
    Arm("stock", takes_budget=False),
    Arm("stock folded", takes_budget=False, folded=True),
    Arm("stock offloaded", takes_budget=False, cache="offloaded"),
    Arm("stock quantized", takes_budget=False, cache="quantized"),
)
FOLDED = "stock folded"

# -- steps on a CPU and on a GPU ------------------------------------------------------------------------------------

CPU_DECODE = {name: STOCK[name] for name in ("stock", FOLDED)} | _by_name(
    Arm("scout", {"split": "off"}),
    Arm("scout exact", {"split": "off", "budget": None}),
    Arm("scout int8", {"split": "off", "host_dtype": "int8"}),
)

RIVALS = {name: STOCK[name] for name in ("stock", FOLDED)} | _by_name(
    Arm("scout exact", {"split": "off", "budget": None}),
    Arm("scout auto", {"split": "off", "budget": "auto"}),
    Arm("scout sparse", {"split": "off"}),
)
"""Beside other runtimes."""

GPU = _by_name(
    Arm("graph, predicted", {"hand_over": "graph", "cpu_query": "predicted"}),
    Arm("graph, real", {"hand_over": "graph", "cpu_query": "real"}),
    Arm("flags", {"hand_over": "flags", "cpu_query": "predicted"}),
    Arm("join", {"hand_over": "join", "cpu_query": "predicted"}),
    Arm("graph, not fused", {"hand_over": "graph", "cpu_query": "predicted", "fused": False}),
)
"""Of two tiers, the last one with the model's own norms, rotations and gates.

Random weights are no place for ``cpu_query="auto"``: it would see no query that changes little.
"""

# -- the comparison of methods --------------------------------------------------------------------------------------

KVPRESS = "kvpress"
"""Its KeyDiffPress drops KV of the prompt; it runs in a separate process: :mod:`scout_hf.eval.methods.score`."""

ONE_TIER = "scout, one tier"
KEPT = "infinigen, kept"
"""Of the budget only what is not on the device yet crosses. InfiniGen recalls all of it in every step; ScoutAttention's
figures of it (381 tokens/s in figure 8) are more than its link could carry so."""

PREDICTED = "scout, predicted"
"""The paper's rule: the CPU always attends ahead, with the predicted query.

As shipped, ``scout`` does so where that query is seen to change little, and random weights are no place for that.
"""

ABLATIONS = ("scout, predicted, no recall", "scout, neither")
SCOUT = {
    "scout": {},
    PREDICTED: {"cpu_query": "predicted"},
    ABLATIONS[0]: {"cpu_query": "predicted", "recall": None},
    ABLATIONS[1]: {"layer_ahead": False, "recall": None},
}
SAME_ANSWERS = {KEPT: "infinigen"}
"""Arms that attend to the same tokens as another arm, so that their answers are not measured."""

RANDOM = "random"
"""The settings of an arm may differ where weights are random, and no score could tell."""


def names() -> tuple[str, ...]:
    """The arms of the comparison, in the order of tables."""
    known = ("scout", "hgca", "infinigen", "kvpr", "dense", NAME)
    rest = [name for name in method_names() if name not in known]
    return (*STOCK, KVPRESS, ONE_TIER, *SCOUT, "hgca", "infinigen", KEPT, "kvpr", "dense", *rest)


def rank(name: str) -> tuple[bool, int]:
    """Sort key of an arm in tables; unknown arms come last."""
    known = names()
    return name not in known, known.index(name) if name in known else 0


def parse(given: Sequence[str] | None) -> tuple[str, ...] | None:
    """Names of arms from options, each one name or several with commas between; None if nothing is given.

    A name may contain a comma: the longest known name is taken. ValueError if one is unknown.
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


def find(name: str, weights: str = "trained") -> Arm:
    """The arm of a name; ValueError, with the known ones, for another.

    With ``random`` weights the choice of blocks drifts synthetically, and InfiniGen fills its budget.
    """
    if name not in names():
        raise ValueError(f"arm {name!r} is not known; available are {', '.join(map(repr, names()))}")
    if name in STOCK or name == KVPRESS:
        return STOCK.get(name) or Arm(name)
    if name == ONE_TIER:
        return Arm(name, {"split": "off"}, emulated=False)
    if name in SCOUT:
        digest = {"digest": drifting("minmax")} if weights == RANDOM else {}
        return Arm(name, {"method": "scout", "split": "cpu"} | digest | SCOUT[name])
    method, settings = name.split(",")[0], {}
    if method == "infinigen":
        settings["method_options"] = ({"alpha": None} if weights == RANDOM else {}) | {"keep": name == KEPT}
        method = drifting_infinigen() if name == KEPT and weights == RANDOM else method
    return Arm(name, {"method": method} | settings, takes_budget=method not in ("kvpr", "dense"))
