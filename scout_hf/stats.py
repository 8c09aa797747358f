"""``Stats``: the statistics of a patched model, from its counters."""

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
    """What sparse decoding lost: means over the samples of the monitor (``ScoutConfig(monitor=...)``).

    A sample is one KV head of one row, in one decode step of one layer. It compares the step's attention output with
    exact attention of the real query, for the query heads of that GQA group. Exact attention reads keys and values as
    they are stored, with ``host_dtype="int8"`` the rounded ones. Learnt sinks (gpt-oss) are left out on both sides.
    Where nothing was lost, errors are rounding errors of the kernels in use.

    Attributes
    ----------
    samples, skipped : int
        Samples measured, and samples skipped because the CPU had no idle time or the measurement failed.
    mass : float
        Captured attention mass: the real query's softmax weight, in [0, 1], on tokens that the step attended.
    output_error : float
        ``|o - o_exact| / |o_exact|`` of the layer's attention output, L2 norm over the channels of a query head.
    selection_error : float
        The same for ``o_real``, the output over the attended blocks with the real query: the error of selection alone.
    prediction_error : float or None
        ``|o - o_real| / |o_exact|``: the error added by attending with a predicted query. None if no sample did.
    block_recall : float or None
        Share of the attended whole blocks that are among the same number of blocks of largest true attention mass.
    cost_ms : float
        Milliseconds of CPU time per decode step, all threads together.

    Examples
    --------
    >>> handle = scout_hf.patch(model, budget=64, monitor=1.0)
    >>> tokens = model.generate(**inputs, max_new_tokens=8)
    >>> handle.stats().fidelity.mass
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
    """Means of one layer per decode step, fields as in :class:`Stats`; None where nothing was measured."""

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
    """What a patched model did since ``patch`` or the last ``reset_stats``; prints as a table.

    Attributes
    ----------
    method : str
    exact : bool
        Whether the settings of all decode steps were exact.
    steps : int
        Decode steps, drafts included; the exact passes that check drafts are not.
    prefill_tokens : int
        Tokens per row in passes with several new tokens (prompts, next turns, drafts of assisted decoding).
    context_tokens, attended_tokens : float
        Tokens in the context and tokens attended: means per decode step over layers, rows and KV heads, without
        padding.
    cpu_ratio : float or None
        Share of the selected blocks that the CPU attended, in [0, 1]; None on one tier.
    cosine : float or None
        Cosine similarity of predicted and real query, sampled, over the layers that predict.
    join_wait_ms : float
        Milliseconds per decode step that the main thread waited for the CPU or a copy, all layers together.
    recalled_blocks, recalled_bytes : int
        Blocks and bytes that decode steps copied to the device, in all.
    kv_bytes : dict of str to int
        Bytes of the newest cache by tier: ``host``, ``device``, ``digests``, ``stock`` (layers left to transformers).
        Measured after a prompt and every 16 decode steps; kept when the cache is deleted.
    huge_page_bytes : int
        Bytes of that cache's host memory on huge pages, where scattered blocks are read faster. Measured after a
        prompt.
    layers : tuple of LayerStats
    fidelity : Fidelity or None
        What sparse decoding lost, over the samples of all layers; None without a monitor or before its first sample.
    notes : tuple of str
        Remarks, such as why a method does not save anything on this model.
    stock_passes : dict of str to int
        Forward passes that ran stock attention, by reason. No other number counts them.
    alive_bytes : dict of str to int
        Bytes by tier, now, of all caches of this patch that hold tokens and are still referenced, forks included. A
        page that forks share counts once. ``reset_stats`` does not change it.
    alive_caches : int
        How many caches these are.
    found_tokens, kept_tokens : int
        Tokens per row that the prefix store knew, so that they were not read; tokens that were added to it.
    prefill_tokens_per_second, decode_tokens_per_second : float or None
        Tokens of all rows, padding included, per second of wall time in passes with several new tokens and in decode
        steps. A pass lasts until the next one of the same ``generate()`` begins, so that sampling is included. The
        last pass of a call lasts until its own end; on a GPU it is left out. Warm-up passes are included. With drafts,
        the tokens that ``generate()`` took, and the time of the drafts and of their check.
    drafted_tokens, accepted_tokens, draft_checks : int
        With ``patch(draft=...)``: tokens that sparse steps drafted, those of them that ``generate()`` took, and exact
        passes that checked them. A position counts once for all rows, which take it together.
    acceptance : float or None
        ``accepted_tokens / drafted_tokens``; those behind the end of a text count as not accepted.
    tokens_per_exact_pass : float or None
        Tokens that a check gave, with its own.

    Examples
    --------
    >>> stats = handle.stats()
    >>> print(stats)
    >>> share = stats.attended_tokens / stats.context_tokens
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
    found_tokens: int = 0
    kept_tokens: int = 0
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    draft_checks: int = 0
    acceptance: float | None = None
    tokens_per_exact_pass: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, layers and fidelity included.

        Returns
        -------
        dict
            Of numbers, strings, lists, tuples and dicts; ``json.dumps`` accepts it.

        Examples
        --------
        >>> json.dumps(handle.stats().to_dict())
        """
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
        found_tokens=counters.found_tokens,
        kept_tokens=counters.kept_tokens,
        prefill_tokens_per_second=counters.pace.tokens_per_second("prefill"),
        decode_tokens_per_second=counters.pace.tokens_per_second("decode"),
        drafted_tokens=counters.drafted,
        accepted_tokens=counters.accepted,
        draft_checks=counters.checks,
        acceptance=counters.accepted / counters.drafted if counters.drafted else None,
        tokens_per_exact_pass=1.0 + counters.accepted / counters.checks if counters.checks else None,
    )
