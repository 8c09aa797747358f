"""The statistics of a patched model: what its counters come to, as one frozen value."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from scout_hf.stats_tables import percent, tables

if TYPE_CHECKING:
    from scout_hf.counters import Counters


@dataclass(frozen=True)
class Fidelity:
    """What sparse decoding lost on the samples of the monitor (``ScoutConfig(monitor=...)``), as means over them.

    A sample is one KV head of one row in one decode step of a layer: exact attention of the real query over all keys
    and values as they are stored (with ``host_dtype="int8"`` the rounded ones), for the query heads of its GQA group.
    Learnt sinks without a key (gpt-oss) are left out on both sides. Sums are those of the kernels in use: what loses
    nothing has an error of their rounding.

    Attributes
    ----------
    samples, skipped : int
        Samples measured, and those left out because the CPU had no idle time for them, or failed.
    mass : float
        Attention mass captured: the share of the real query's softmax on tokens that the step attended. What is
        missing to 1 is lost by selection.
    output_error : float
        ``|o - o_exact| / |o_exact|`` (L2 over the channels of a query head) of the layer's attention output.
    selection_error : float
        The same if every attended block had been attended with the real query: the part that selection is to blame
        for. Equal to ``output_error`` but for rounding where nothing was predicted.
    prediction_error : float or None
        ``|o - o_real| / |o_exact|``, ``o_real`` being that output: what the CPU's share adds by using a predicted
        query. Only over samples in which it did.
    block_recall : float or None
        Share of the attended whole blocks that are among the blocks of largest true mass, as many as were attended.
    cost_ms : float
        CPU time per decode step, of all threads.
    """

    samples: int
    skipped: int
    mass: float
    output_error: float
    selection_error: float
    prediction_error: float | None
    block_recall: float | None
    cost_ms: float

    def __str__(self) -> str:
        text = f"captured attention mass {self.mass:.3f}, output error {percent(self.output_error)}"
        return f"{text}, {self.samples} samples"


@dataclass(frozen=True)
class LayerStats:
    """One layer's means per decode step; None where nothing was measured."""

    layer: int
    context_tokens: float
    attended_tokens: float
    cpu_ratio: float | None
    cosine: float | None
    join_wait_ms: float
    recalled_blocks: int
    recalled_bytes: int
    fidelity: Fidelity | None = None


@dataclass(frozen=True)
class Stats:
    """What a patched model did since ``patch`` or the last ``reset_stats``.

    Attributes
    ----------
    method, exact
        The method, and whether every decode step was exact by its settings.
    steps : int
        Decode steps.
    prefill_tokens : int
        Tokens per row that came in several at a time.
    context_tokens, attended_tokens : float
        Means per decode step over layers, rows and KV heads; padding is not counted.
    cpu_ratio : float or None
        Share of the selected blocks that the CPU attended, on two tiers.
    cosine : float or None
        Cosine of predicted to real query, sampled, over the layers that predict.
    join_wait_ms : float
        Time per decode step that the model waited for the CPU's share, all layers together.
    recalled_blocks, recalled_bytes : int
        Copied to the device in decode steps, in all: recalled blocks, or what else the method brings there.
    kv_bytes : dict
        Bytes of the newest cache by tier: ``host``, ``device``, ``digests``, ``stock`` (layers left to transformers);
        measured after a prompt and every 16 decode steps, and told also when it is gone.
    huge_page_bytes : int
        Of its host memory, what lies on huge pages, which scattered blocks are read faster from; read after a prompt.
    layers : tuple of LayerStats
    fidelity : Fidelity or None
        What was lost, over all samples of all layers; None without a monitor, and until its first sample. Each layer
        has its own.
    notes : tuple of str
        What the method has to say, such as why it does not do what it is for.
    stock_passes : dict
        Forward passes that ran stock attention instead, by the reason; none of the other numbers counts them.
    alive_bytes, alive_caches : dict, int
        Bytes by tier of all caches of this patch that hold tokens and that somebody still has, forks included, and how
        many these are. Pages that forks share count once; as it is when asked, ``reset_stats`` or not.
    prefill_tokens_per_second, decode_tokens_per_second : float or None
        Of passes with several tokens per row (prompts, next turns, drafts to verify) and of decode steps; all rows
        together, padding included. A pass takes until the next one of the same ``generate()`` begins, so that sampling
        and all else in between is in it; the last one of a call takes until its own end, and on a device, which would
        have to be waited for, is left out. The first pass, which warms up, is in it.
    """

    method: str
    exact: bool
    steps: int
    prefill_tokens: int
    context_tokens: float
    attended_tokens: float
    cpu_ratio: float | None
    cosine: float | None
    join_wait_ms: float
    recalled_blocks: int
    recalled_bytes: int
    kv_bytes: dict[str, int]
    huge_page_bytes: int
    layers: tuple[LayerStats, ...] = field(repr=False)
    fidelity: Fidelity | None = None
    notes: tuple[str, ...] = ()
    stock_passes: dict[str, int] = field(default_factory=dict)
    alive_bytes: dict[str, int] = field(default_factory=dict)
    alive_caches: int = 0
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, those of the layers and of the monitor too; ``json.dumps`` takes it."""
        return asdict(self)

    def __str__(self) -> str:
        from rich.console import Console

        sink = io.StringIO()
        console = Console(file=sink, width=80, color_system=None)
        for part in tables(self):
            console.print(part)
        return sink.getvalue().rstrip()

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        yield from tables(self)


def summarise(
    counters: Counters, method: str, exact: bool, kv_bytes: dict[str, int], huge_page_bytes: int = 0
) -> Stats:
    """Turn running sums into :class:`Stats`."""
    counters.collect()
    alive_caches, alive_bytes = counters.alive.held()
    sums = {name: {layer: float(n) for layer, n in per.items()} for name, per in list(counters.sums.items())}

    def total(name: str) -> float:
        return sum(sums.get(name, {}).values())

    def mean(name: str, samples: str, layer: int | None = None) -> float:
        return ratio(name, samples, layer) or 0.0

    def ratio(top: str, bottom: str, layer: int | None = None) -> float | None:
        if layer is None:
            return total(top) / total(bottom) if total(bottom) else None
        below = sums.get(bottom, {}).get(layer, 0.0)
        return sums.get(top, {}).get(layer, 0.0) / below if below else None

    def fidelity(layer: int | None = None) -> Fidelity | None:
        def count(name: str) -> float:
            return total(name) if layer is None else sums.get(name, {}).get(layer, 0.0)

        if not count("monitor_samples"):
            return None
        return Fidelity(
            samples=int(count("monitor_samples")),
            skipped=int(count("monitor_skipped")),
            mass=mean("monitor_mass", "monitor_samples", layer),
            output_error=mean("monitor_output_error", "monitor_samples", layer),
            selection_error=mean("monitor_selection_error", "monitor_samples", layer),
            prediction_error=ratio("monitor_prediction_error", "monitor_predicted_samples", layer),
            block_recall=ratio("monitor_block_recall", "monitor_recall_samples", layer),
            cost_ms=count("monitor_ms") / max(counters.steps, 1),
        )

    layers = tuple(
        LayerStats(
            layer=layer,
            context_tokens=mean("context", "decodes", layer),
            attended_tokens=mean("attended", "decodes", layer),
            cpu_ratio=ratio("cpu_blocks", "selected_blocks", layer),
            cosine=ratio("cosine", "cosine_samples", layer),
            join_wait_ms=mean("join_ms", "decodes", layer),
            recalled_blocks=int(sums.get("recalled_blocks", {}).get(layer, 0)),
            recalled_bytes=int(sums.get("recalled_bytes", {}).get(layer, 0)),
            fidelity=fidelity(layer),
        )
        for layer in sorted(sums.get("decodes", {}))
    )
    return Stats(
        method=method,
        exact=exact,
        steps=counters.steps,
        prefill_tokens=counters.prefill_tokens,
        context_tokens=mean("context", "decodes"),
        attended_tokens=mean("attended", "decodes"),
        cpu_ratio=ratio("cpu_blocks", "selected_blocks"),
        cosine=ratio("cosine", "cosine_samples"),
        join_wait_ms=total("join_ms") / counters.steps if counters.steps else 0.0,
        recalled_blocks=int(total("recalled_blocks")),
        recalled_bytes=int(total("recalled_bytes")),
        kv_bytes=kv_bytes,
        huge_page_bytes=huge_page_bytes,
        layers=layers,
        fidelity=fidelity(),
        notes=tuple(counters.all_notes()),
        stock_passes=dict(counters.stock_passes),
        alive_bytes=alive_bytes,
        alive_caches=alive_caches,
        prefill_tokens_per_second=counters.pace.tokens_per_second("prefill"),
        decode_tokens_per_second=counters.pace.tokens_per_second("decode"),
    )
