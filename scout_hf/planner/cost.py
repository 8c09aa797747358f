"""A cost model: memory and step time of every method.

A step runs the layers in sequence. CPU attention and transfers over the link overlap with as much device work as the
method allows: Scout and all transfers start one layer ahead, HGCA's CPU attention in the same layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from scout_hf.errors import ConfigError
from scout_hf.planner.machine import Machine
from scout_hf.planner.shape import ModelShape
from scout_hf.split import Rates, best_split, layer_seconds

GIB = 2**30
FINE, WORTH = 6, 2
"""Of ``scout_hf.selection.coarse``, which needs torch: blocks that are scored by whole codes, and where it pays."""


@dataclass(frozen=True)
class Load:
    """A workload: context length, batch and settings.

    Attributes
    ----------
    context : int
        Tokens per row.
    batch : int
        Rows.
    budget : int
        Tokens attended per row and KV head.
    block_size : int
        Tokens per block.
    cpu_ratio : float
        Share of the chosen blocks that the CPU attends (ScoutAttention reports 8 % at a recall threshold of 12 %).
    recalled : float
        Share of the chosen blocks that is recalled per step.
    partial : float
        InfiniGen's share of channels.

    Examples
    --------
    >>> from scout_hf.planner import Load
    >>> Load(context=65536, batch=4).budget
    2048
    """

    context: int
    batch: int = 1
    budget: int = 2048
    block_size: int = 32
    cpu_ratio: float = 0.1
    recalled: float = 0.02
    partial: float = 0.2


@dataclass(frozen=True)
class Plan:
    """Estimated memory and step time of a method; made by :func:`plan`.

    Attributes
    ----------
    method : str
    device_bytes, host_bytes : float
        Bytes per tier, weights included.
    parts : dict
        Milliseconds of a step by cause: ``weights``, ``overhead``, ``attention``, ``selection``, ``recomputed``, and
        ``waiting`` (CPU and link time that does not overlap with device work).
    fits : bool
        Whether both tiers fit into the machine's memory.
    note : str

    Examples
    --------
    >>> from scout_hf.planner import Plan
    >>> Plan("scout", 1e9, 4e9, {"weights": 5.0, "attention": 1.5}, fits=True).step_ms
    6.5
    """

    method: str
    device_bytes: float
    host_bytes: float
    parts: dict[str, float]
    fits: bool
    note: str = ""

    @property
    def step_ms(self) -> float:
        """Milliseconds of a step: the sum of ``parts``."""
        return sum(self.parts.values())


_Cost = tuple[dict[str, float], float, float] | tuple[dict[str, float], float, float, str]
"""Milliseconds of a layer by cause; bytes of KV and digests on the device and on the host; a note."""


def plan(method: str, shape: ModelShape, machine: Machine, load: Load) -> Plan:
    """Estimate memory and step time of one method.

    Parameters
    ----------
    method : str
        One of :func:`methods`.
    shape : ModelShape
    machine : Machine
    load : Load

    Returns
    -------
    Plan

    Raises
    ------
    ConfigError
        If the planner does not know the method.

    Examples
    --------
    >>> from scout_hf.planner import MACHINES, SHAPES, Load, plan
    >>> plan("scout", SHAPES["llama-3-8b"], MACHINES["h100"], Load(context=131072)).fits
    True
    """
    if method not in _METHODS:
        raise ConfigError(f"method={method!r} is not known to the planner; it knows {', '.join(_METHODS)}")
    return _Sum(shape, machine, load).of(method, *_METHODS[method](shape, machine, load))


def methods() -> tuple[str, ...]:
    """The methods that :func:`plan` knows.

    Examples
    --------
    >>> from scout_hf.planner import methods
    >>> "scout" in methods() and "stock" in methods()
    True
    """
    return tuple(_METHODS)


def largest_batch(method: str, shape: ModelShape, machine: Machine, load: Load, most: int = 4096) -> int:
    """The largest batch that fits, up to ``most``; 0 if not even one row does.

    Other parameters as in :func:`plan`.

    Examples
    --------
    >>> from scout_hf.planner import MACHINES, SHAPES, Load, largest_batch
    >>> given = SHAPES["llama-3-8b"], MACHINES["h100"], Load(context=65536)
    >>> largest_batch("scout", *given) > largest_batch("stock", *given)
    True
    """
    return _largest(lambda batch: plan(method, shape, machine, replace(load, batch=batch)).fits, most)


def longest_context(method: str, shape: ModelShape, machine: Machine, load: Load, most: int = 1 << 24) -> int:
    """The longest context that fits, in tokens, up to ``most``.

    Other parameters as in :func:`plan`.

    Examples
    --------
    >>> from scout_hf.planner import MACHINES, SHAPES, Load, longest_context
    >>> given = SHAPES["llama-3-8b"], MACHINES["rtx-4090"], Load(context=1)
    >>> longest_context("scout", *given) > longest_context("stock", *given)
    True
    """
    return _largest(lambda context: plan(method, shape, machine, replace(load, context=context)).fits, most)


def break_even(method: str, shape: ModelShape, machine: Machine, load: Load, most: int = 1 << 22) -> int | None:
    """The shortest context at which the method is faster than stock: a power of two from 1024 to ``most``, or None.

    Other parameters as in :func:`plan`.

    Examples
    --------
    >>> from scout_hf.planner import MACHINES, SHAPES, Load, break_even
    >>> break_even("stock", SHAPES["llama-3-8b"], MACHINES["h100"], Load(context=1024)) is None
    True
    """
    context = 1024
    while context <= most:
        at = replace(load, context=context)
        if plan(method, shape, machine, at).step_ms < plan("stock", shape, machine, at).step_ms:
            return context
        context *= 2
    return None


def _largest(fits: Callable[[int], bool], most: int) -> int:
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


class _Sum:
    """Sums the layers of a step."""

    def __init__(self, shape: ModelShape, machine: Machine, load: Load):
        self.shape, self.machine, self.load = shape, machine, load

    def of(self, method: str, layer: dict[str, float], device: float, host: float, note: str = "") -> Plan:
        """The plan, from the parts of one full layer in ms, and bytes of KV on the device and the host."""
        shape, machine, load = self.shape, self.machine, self.load
        windowed = load.batch * shape.window * shape.kv_bytes
        parts = {name: shape.full * ms for name, ms in layer.items()}
        parts["attention"] += shape.windowed * windowed / machine.attend_gbps / 1e6
        parts = {"weights": _weights_ms(shape, machine, load.batch), "overhead": _overhead_ms(shape, machine), **parts}
        device += shape.weights + shape.windowed * windowed
        if not machine.gpu:
            device, host = device + host, 0.0
        fits = device <= machine.device_gib * GIB and host <= machine.host_gib * GIB
        return Plan(method, device, host, parts, fits, note)


def _weights_ms(shape: ModelShape, machine: Machine, rows: int) -> float:
    read = shape.layers * shape.layer_weights + shape.head_weights
    return max(read / machine.weights_gbps / 1e6, rows * read / shape.item * 2 / machine.products_tflops / 1e9)


def _overhead_ms(shape: ModelShape, machine: Machine) -> float:
    return (shape.layers * machine.layer_us + machine.step_us) / 1e3


def _layer_ms(shape: ModelShape, machine: Machine, rows: int) -> float:
    """Device time of a layer without attention and selection."""
    weights = max(
        shape.layer_weights / machine.weights_gbps / 1e6,
        rows * shape.layer_weights / shape.item * 2 / machine.products_tflops / 1e9,
    )
    return weights + machine.layer_us / 1e3


def _stock(shape: ModelShape, machine: Machine, load: Load) -> _Cost:
    held = load.batch * load.context * shape.kv_bytes
    group = shape.heads // shape.kv_heads
    # On a CPU: stock copies the cache to grow it, and writes and reads repeated KV heads.
    traffic = (3 + 2 * group if group > 1 else 3) / 11 if not machine.gpu else 1.0
    return {"attention": traffic * held / machine.stock_gbps / 1e6}, shape.full * held, 0.0


def _link_ms(machine: Machine, nbytes: float) -> float:
    return nbytes / machine.link_gbps / 1e6 + machine.link_us / 1e3


def _dense(shape: ModelShape, machine: Machine, load: Load) -> _Cost:
    held = load.batch * load.context * shape.kv_bytes
    attention = held / machine.attend_gbps / 1e6
    waiting = max(0.0, _link_ms(machine, held) - attention - _layer_ms(shape, machine, load.batch))
    return {"attention": attention, "waiting": waiting}, 2 * held, shape.full * held


def _kvpr(shape: ModelShape, machine: Machine, load: Load) -> _Cost:
    rows, tokens = load.batch, load.context
    held, inputs = rows * tokens * shape.kv_bytes, rows * tokens * shape.hidden * shape.item
    attention = held / machine.attend_gbps / 1e6
    products = rows * 2 * shape.hidden * 2 * shape.kv_heads * shape.head_dim  # FLOP of the keys and values of a token
    rates = Rates(
        input_s=inputs / tokens / machine.link_gbps / 1e9,
        kv_s=held / tokens / machine.link_gbps / 1e9,
        compute_s=products / machine.products_tflops / 1e12,
        other_s=(attention + _layer_ms(shape, machine, rows)) / 1e3,
    )
    split = best_split(rates, tokens, tokens)
    again = 1e3 * split * rates.compute_s
    waiting = max(0.0, 1e3 * layer_seconds(rates, tokens, split) - 1e3 * rates.other_s - again)
    parts = {"attention": attention, "recomputed": again, "waiting": waiting}
    if inputs >= held:
        # The method then stores no inputs.
        return parts, 2 * held, shape.full * held, "nothing recomputed: inputs are no smaller than KV"
    note = f"{split} tokens recomputed" if split else "nothing recomputed: the link is faster than that"
    return parts, 2 * held, shape.full * (held + inputs), note


def _infinigen(shape: ModelShape, machine: Machine, load: Load) -> _Cost:
    chosen = min(load.budget, load.context)
    partial = load.batch * load.context * shape.kv_heads * shape.head_dim * shape.item * load.partial
    recalled = load.batch * chosen * shape.kv_bytes
    attention, selection = recalled / machine.attend_gbps / 1e6, partial / machine.score_gbps / 1e6
    busy = attention + selection + _layer_ms(shape, machine, load.batch)
    parts = {"attention": attention, "selection": selection, "waiting": max(0.0, _link_ms(machine, recalled) - busy)}
    host = load.batch * load.context * shape.kv_bytes
    return parts, shape.full * partial + 2 * recalled, shape.full * host


def _hgca(shape: ModelShape, machine: Machine, load: Load) -> _Cost:
    chosen = min(load.budget, load.context)
    window, kept = chosen / 2, chosen / 2
    attention = load.batch * window * shape.kv_bytes / machine.attend_gbps / 1e6
    share = load.batch * kept * shape.kv_bytes / machine.cpu_gbps / 1e6 + 2 * machine.link_us / 1e3
    parts = {"attention": attention, "waiting": max(0.0, share - attention)}
    host = load.batch * (load.context + kept) * shape.kv_bytes
    return parts, shape.full * load.batch * window * shape.kv_bytes, shape.full * host


def _scout(shape: ModelShape, machine: Machine, load: Load) -> _Cost:
    chosen = min(load.budget, load.context)
    held = load.batch * load.context * shape.kv_bytes
    resident = load.batch * chosen * shape.kv_bytes
    # Sign codes, as digest="auto" takes them: bits per channel of a key, and a byte per token.
    bits = 2 if shape.head_dim <= (128 if machine.gpu else 288) else 1
    digests = load.batch * load.context * shape.kv_heads * (bits * shape.head_dim / 8 + 1)
    if not machine.gpu:
        plane = shape.head_dim / 8
        read = digests if bits == 1 else _coarse_first(load, digests, (plane + 1) / (bits * plane + 1))
        parts = {"attention": resident / machine.cpu_gbps / 1e6, "selection": read / machine.score_gbps / 1e6}
        return parts, 0.0, shape.full * (held + digests)
    attention, selection = resident / machine.attend_gbps / 1e6, digests / machine.score_gbps / 1e6
    share = load.cpu_ratio * resident / machine.cpu_gbps / 1e6 + 2 * machine.link_us / 1e3
    # A recall may take a whole step, but the recalls of all layers share the link.
    share = max(share, _link_ms(machine, load.recalled * resident))
    busy = attention + selection + _layer_ms(shape, machine, load.batch)
    parts = {"attention": attention, "selection": selection, "waiting": max(0.0, share - busy)}
    return parts, shape.full * (resident + digests), shape.full * held


def _coarse_first(load: Load, digests: float, first: float) -> float:
    """Bytes of digests that a step reads, where their ``first`` share tells which blocks are read whole."""
    candidates = FINE * load.budget
    return digests * (first + candidates / load.context) if load.context >= WORTH * candidates else digests


_METHODS: dict[str, Callable[[ModelShape, Machine, Load], _Cost]] = {
    "stock": _stock,
    "offloaded": _dense,
    "scout": _scout,
    "hgca": _hgca,
    "infinigen": _infinigen,
    "kvpr": _kvpr,
    "dense": _dense,
}
