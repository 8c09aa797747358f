"""Will it fit, will it pay: memory and step time of every method from a small cost model, for any machine.

A step is layers one after the other. What a method does beside the device (the CPU's share, the link) overlaps with as
much of the device's work as its structure allows: Scout and whatever crosses the link begin one layer ahead, HGCA's
CPU in the same layer. Rates are constants of a machine, from data sheets or measured (``scout-hf plan --measure``).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from scout_hf.errors import ConfigError
from scout_hf.methods.split import Rates, best_split, layer_seconds

GIB = 2**30
# What kernels reach of a data sheet's bandwidth and arithmetic.
REACHED = {"weights": 0.85, "attention": 0.8, "scoring": 0.7, "products": 0.6}


@dataclass(frozen=True)
class Machine:
    """Constants of a machine.

    Attributes
    ----------
    name : str
    device_gib, host_gib : float
        Memory beside the model, and of the host; equal memory counts once on a machine without a GPU.
    weights_gbps, attend_gbps, score_gbps : float
        GB/s at which the device reads weights in a step, KV in attention, and digests in scoring.
    stock_gbps : float
        GB/s of KV of stock attention with its cache; on a CPU, where it copies keys and values for every query head, of
        a model with 4 query heads per KV head.
    products_tflops : float
        Of matrix products with many rows.
    layer_us, step_us : float
        What a layer and a step cost besides: launches, Python, norms.
    link_gbps, link_us : float
        Host to device, and what a transfer takes to begin.
    cpu_gbps : float
        GB/s of KV that the host attends.
    gpu : bool
        Without one there is one tier, and nothing crosses a link.
    """

    name: str
    device_gib: float
    host_gib: float
    weights_gbps: float
    attend_gbps: float
    score_gbps: float
    stock_gbps: float
    products_tflops: float
    layer_us: float
    step_us: float
    link_gbps: float
    link_us: float
    cpu_gbps: float
    gpu: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in ("float", float) and not (isinstance(value, (int, float)) and value > 0):
                raise ConfigError(f"{field.name}={value!r} is not allowed: a positive number; see Machine")

    def save(self, path: Path, **facts: Any) -> None:
        """Write as JSON, with more facts beside the constants."""
        path.write_text(json.dumps({"machine": asdict(self), **facts}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Machine:
        """Read what ``save`` wrote; ConfigError if it is something else."""
        try:
            return cls(**json.loads(path.read_text())["machine"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path} holds no machine: make one with `scout-hf plan --measure`") from error


def _gpu(name: str, memory: float, bandwidth: float, tflops: float, link: float) -> Machine:
    return Machine(
        name, memory, 512, bandwidth * REACHED["weights"], bandwidth * REACHED["attention"],
        bandwidth * REACHED["scoring"], bandwidth * REACHED["attention"], tflops * REACHED["products"], 300, 1000, link,
        10, 100,
    )  # fmt: skip


MACHINES = {
    machine.name: machine
    for machine in (
        _gpu("h200", 141, 4800, 989, 50), _gpu("h100", 80, 3350, 989, 50), _gpu("a100-80", 80, 2039, 312, 24),
        _gpu("a100-40", 40, 1555, 312, 24), _gpu("l40s", 48, 864, 362, 24), _gpu("rtx-5090", 32, 1792, 210, 50),
        _gpu("rtx-4090", 24, 1008, 165, 24), _gpu("rtx-3090", 24, 936, 71, 24),
    )
}  # fmt: skip
"""By name: data-sheet memory, bandwidth and dense bf16 arithmetic times what kernels reach of them; PCIe as it goes in
practice; 100 GB/s of attention on the CPU and 0.3 ms of launches per layer, the figures of ScoutAttention and of plain
transformers. Better measured."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder; ``windowed`` layers keep a window of tokens whatever the context."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False
    item: int = 2
    windowed: int = 0
    window: int = 0

    @property
    def kv_bytes(self) -> int:
        """Of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.item

    @property
    def layer_weights(self) -> int:
        """Bytes of one layer: attention and a gated MLP."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.item * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_weights(self) -> int:
        """Bytes of the output head."""
        return self.item * self.vocabulary * self.hidden

    @property
    def weights(self) -> int:
        """Bytes of the whole model."""
        return self.layers * self.layer_weights + self.head_weights * (1 if self.tied else 2)

    @property
    def full(self) -> int:
        """Layers that attend to the whole context."""
        return self.layers - self.windowed

    @classmethod
    def of(cls, config: Any, name: str = "") -> ModelShape:
        """From a config of transformers, or the dict of its JSON.

        Raises
        ------
        ConfigError
            For a config that lacks sizes, or a mixture of experts, whose weights per step depend on the routing.
        """
        given = config if isinstance(config, dict) else config.get_text_config(decoder=True).to_dict()
        given = given.get("text_config", given)
        if any(given.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
            raise ConfigError(f"{name or 'this config'} is a mixture of experts, which the planner does not know")
        try:
            heads, hidden = given["num_attention_heads"], given["hidden_size"]
            types = given.get("layer_types") or []
            return cls(
                name or given.get("model_type", "model"),
                given["num_hidden_layers"],
                hidden,
                given.get("intermediate_size") or given.get("ffn_dim") or 4 * hidden,
                heads,
                given.get("num_key_value_heads") or heads,
                given.get("head_dim") or hidden // heads,
                given["vocab_size"],
                bool(given.get("tie_word_embeddings", False)),
                windowed=sum(kind == "sliding_attention" for kind in types),
                window=given.get("sliding_window") or 0,
            )
        except KeyError as error:
            raise ConfigError(f"{name or 'this config'} has no {error}; give the config.json of a decoder") from error


SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape("llama-2-7b", 32, 4096, 11008, 32, 32, 128, 32000),
        ModelShape("llama-3.2-1b", 16, 2048, 8192, 32, 8, 64, 128256, tied=True),
        ModelShape("llama-3-8b", 32, 4096, 14336, 32, 8, 128, 128256),
        ModelShape("llama-3-70b", 80, 8192, 28672, 64, 8, 128, 128256),
        ModelShape("qwen3-8b", 36, 4096, 12288, 32, 8, 128, 151936),
        ModelShape("qwen3-14b", 40, 5120, 17408, 40, 8, 128, 151936),
        ModelShape("qwen3-32b", 64, 5120, 25600, 64, 8, 128, 151936),
    )
}


@dataclass(frozen=True)
class Load:
    """What is asked: tokens of context, rows, and scout's settings.

    ``cpu_ratio`` is the CPU's share of the chosen blocks with recall (ScoutAttention reports 8 % at a threshold of
    12 %), ``recalled`` the share of them that is recalled per step; ``partial`` InfiniGen's share of channels.
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
    """What a method takes.

    Attributes
    ----------
    device_bytes, host_bytes : float
        Weights included.
    parts : dict
        ms of a step, by what takes them: ``weights``, ``overhead``, ``attention``, ``selection``, ``computed anew``,
        and ``waiting``, what of CPU and link is not hidden.
    fits : bool
    note : str
    """

    method: str
    device_bytes: float
    host_bytes: float
    parts: dict[str, float]
    fits: bool
    note: str = ""

    @property
    def step_ms(self) -> float:
        """All parts together."""
        return sum(self.parts.values())


def plan(method: str, shape: ModelShape, machine: Machine, load: Load) -> Plan:
    """Memory and step time of one method; ConfigError for an unknown one."""
    if method not in _METHODS:
        raise ConfigError(f"method={method!r} is not known to the planner; it knows {', '.join(_METHODS)}")
    return _Sum(shape, machine, load).of(method, *_METHODS[method](shape, machine, load))


def methods() -> tuple[str, ...]:
    """What :func:`plan` knows."""
    return tuple(_METHODS)


def largest_batch(method: str, shape: ModelShape, machine: Machine, load: Load, most: int = 4096) -> int:
    """The most rows that fit; 0 if not even one does."""
    return _largest(lambda batch: plan(method, shape, machine, replace(load, batch=batch)).fits, most)


def longest_context(method: str, shape: ModelShape, machine: Machine, load: Load, most: int = 1 << 24) -> int:
    """The most tokens that fit."""
    return _largest(lambda context: plan(method, shape, machine, replace(load, context=context)).fits, most)


def break_even(method: str, shape: ModelShape, machine: Machine, load: Load, most: int = 1 << 22) -> int | None:
    """The least context, a power of two from 1024 on, at which the method is faster than stock; None if never."""
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
    """Puts the layers of a step together."""

    def __init__(self, shape: ModelShape, machine: Machine, load: Load):
        self.shape, self.machine, self.load = shape, machine, load

    def of(self, method: str, layer: dict[str, float], device: float, host: float, note: str = "") -> Plan:
        """From the parts of one full layer in ms, and bytes of KV on the device and the host."""
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
    """What the device does in a layer besides attention."""
    weights = max(
        shape.layer_weights / machine.weights_gbps / 1e6,
        rows * shape.layer_weights / shape.item * 2 / machine.products_tflops / 1e9,
    )
    return weights + machine.layer_us / 1e3


def _stock(shape, machine, load):
    held = load.batch * load.context * shape.kv_bytes
    group = shape.heads // shape.kv_heads
    # On a CPU: the cache grows by a copy, grouped heads are written out and read once more.
    traffic = (3 + 2 * group if group > 1 else 3) / 11 if not machine.gpu else 1.0
    return {"attention": traffic * held / machine.stock_gbps / 1e6}, shape.full * held, 0.0


def _link_ms(machine: Machine, nbytes: float) -> float:
    return nbytes / machine.link_gbps / 1e6 + machine.link_us / 1e3


def _dense(shape, machine, load):
    held = load.batch * load.context * shape.kv_bytes
    attention = held / machine.attend_gbps / 1e6
    waiting = max(0.0, _link_ms(machine, held) - attention - _layer_ms(shape, machine, load.batch))
    return {"attention": attention, "waiting": waiting}, 2 * held, shape.full * held


def _kvpr(shape, machine, load):
    rows, tokens = load.batch, load.context
    held, inputs = rows * tokens * shape.kv_bytes, rows * tokens * shape.hidden * shape.item
    attention = held / machine.attend_gbps / 1e6
    products = rows * 2 * shape.hidden * 2 * shape.kv_heads * shape.head_dim  # FLOP of a token's keys and values
    rates = Rates(
        input_s=inputs / tokens / machine.link_gbps / 1e9,
        kv_s=held / tokens / machine.link_gbps / 1e9,
        compute_s=products / machine.products_tflops / 1e12,
        other_s=(attention + _layer_ms(shape, machine, rows)) / 1e3,
    )
    split = best_split(rates, tokens, tokens)
    anew = 1e3 * split * rates.compute_s
    waiting = max(0.0, 1e3 * layer_seconds(rates, tokens, split) - 1e3 * rates.other_s - anew)
    note = f"{split} tokens computed anew" if split else "nothing computed anew: inputs are no smaller than KV"
    parts = {"attention": attention, "computed anew": anew, "waiting": waiting}
    return parts, 2 * held, shape.full * (held + inputs), note


def _infinigen(shape, machine, load):
    chosen = min(load.budget, load.context)
    partial = load.batch * load.context * shape.kv_heads * shape.head_dim * shape.item * load.partial
    recalled = load.batch * chosen * shape.kv_bytes
    attention, selection = recalled / machine.attend_gbps / 1e6, partial / machine.score_gbps / 1e6
    busy = attention + selection + _layer_ms(shape, machine, load.batch)
    parts = {"attention": attention, "selection": selection, "waiting": max(0.0, _link_ms(machine, recalled) - busy)}
    host = load.batch * load.context * shape.kv_bytes
    return parts, shape.full * partial + 2 * recalled, shape.full * host


def _hgca(shape, machine, load):
    chosen = min(load.budget, load.context)
    window, kept = chosen / 2, chosen / 2
    attention = load.batch * window * shape.kv_bytes / machine.attend_gbps / 1e6
    share = load.batch * kept * shape.kv_bytes / machine.cpu_gbps / 1e6 + 2 * machine.link_us / 1e3
    parts = {"attention": attention, "waiting": max(0.0, share - attention)}
    host = load.batch * (load.context + kept) * shape.kv_bytes
    return parts, shape.full * load.batch * window * shape.kv_bytes, shape.full * host


def _scout(shape, machine, load):
    chosen = min(load.budget, load.context)
    held = load.batch * load.context * shape.kv_bytes
    resident, digests = load.batch * chosen * shape.kv_bytes, held / load.block_size
    if not machine.gpu:
        # One tier, sign codes: a bit per channel of a key.
        codes = held / 2 / (8 * shape.item)
        parts = {"attention": resident / machine.cpu_gbps / 1e6, "selection": codes / machine.score_gbps / 1e6}
        return parts, 0.0, shape.full * (held + codes)
    attention, selection = resident / machine.attend_gbps / 1e6, digests / machine.score_gbps / 1e6
    share = load.cpu_ratio * resident / machine.cpu_gbps / 1e6 + 2 * machine.link_us / 1e3
    # A recall has a whole step, and all layers' share the link.
    share = max(share, _link_ms(machine, load.recalled * resident))
    busy = attention + selection + _layer_ms(shape, machine, load.batch)
    parts = {"attention": attention, "selection": selection, "waiting": max(0.0, share - busy)}
    return parts, shape.full * (resident + digests), shape.full * held


_METHODS: dict[str, Callable[..., tuple]] = {
    "stock": _stock,
    "offloaded": _dense,
    "scout": _scout,
    "hgca": _hgca,
    "infinigen": _infinigen,
    "kvpr": _kvpr,
    "dense": _dense,
}
