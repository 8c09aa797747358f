"""The online fidelity monitor: exact attention beside the sparse one, on sampled steps, layers and KV heads.

A sample holds copies, and pages that are not written to any more (``stores/snapshot.py``). So crops, forks and the end
of the cache need not wait for it.
"""

from __future__ import annotations

import functools
import math
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from scout_hf.fusion import Partial
from scout_hf.kernels.cpu.each_block import attend_each, attend_each_native, natively
from scout_hf.kernels.cpu.native_backend import NativeBackend
from scout_hf.kernels.cpu.pool import NativePool
from scout_hf.kernels.cpu.workers import Workers, WorkerTicket
from scout_hf.loss import NAMES, Sample, measure
from scout_hf.stores.snapshot import WholeBlocks

if TYPE_CHECKING:
    from scout_hf.methods import Method
    from scout_hf.step import Step
    from scout_hf.stores import PagedKV

SPARSE_EVERY = 8
MOST_PENDING = 64
"""Samples that may be queued; further ones are skipped and counted."""


class _Pending(NamedTuple):
    ticket: WorkerTicket[tuple[list[float], float]]
    layer: int
    pairs: int
    counters: Any


class Monitor:
    """Takes samples while a model decodes, and adds what was lost to the counters.

    A Python thread measures one sample at a time: with native code on a thread of the lowest priority, with torch in
    chunks that begin while the CPU backend is idle. With ``ScoutConfig(monitor=1.0)`` or KV on a GPU, samples are
    measured within the step.
    """

    def __init__(self) -> None:
        self._workers = Workers(1)
        self._pool: NativePool | None = None
        self._pending: deque[_Pending] = deque()
        self._process = os.getpid()
        # Reentrant: a signal handler may ask for statistics.
        self._lock = threading.RLock()
        self._warned = False

    def watch(
        self,
        step: Step,
        method: Method,
        query: torch.Tensor,
        result: Partial,
        attended: Callable[[], list[Any] | None],
        predicted: bool,
    ) -> None:
        """Sample a decode step of one layer if it is the turn of one of its KV heads.

        Parameters
        ----------
        step : Step
        method : Method
            Of the layer; ``result`` is its output for the real ``query`` (batch, query_heads, 1, head_dim).
        attended : callable
            Returns the attended blocks, as a list of ``BlockLists`` and ``Pick``; None for all.
        predicted : bool
            Whether some of the blocks were attended with a predicted query.
        """
        if step.watched is None:
            step.watched = planned(step.cache, step.counters.steps)
        heads = step.watched.get(method.layer_idx)
        if not heads:
            return
        counters, layer, began = step.counters, method.layer_idx, time.perf_counter()
        self.collect()
        try:
            sample = _sample(step, method, heads, query, result, attended(), predicted)
            on_cpu = sample.blocks.device.type == "cpu"
            native = on_cpu and isinstance(step.backend, NativeBackend) and natively(sample.query, sample.blocks)
            if _everything(step.cache.scout_config.monitor) or not on_cpu:
                each = functools.partial(attend_each_native, pool=None) if native else attend_each
                self._add(measure(sample, each), layer, counters)
            elif len(self._pending) >= MOST_PENDING:
                counters.add("monitor_skipped", layer, len(heads) * len(query))
            else:
                each = self._natively(sample) if native else functools.partial(attend_each, busy=step.backend.busy)
                ticket = self._workers.offer(self._measure, sample, each)
                if ticket is None:  # the interpreter is shutting down
                    counters.add("monitor_skipped", layer, len(heads) * len(query))
                else:
                    self._pending.append(_Pending(ticket, layer, len(heads) * len(query), counters))
        except Exception as error:
            self._failed(error, layer, len(heads) * len(query), counters)
        counters.add("monitor_ms", layer, (time.perf_counter() - began) * 1e3)

    def collect(self, wait: bool = False) -> None:
        """Add finished results to the counters; with ``wait``, wait for all samples taken so far."""
        if not self._pending:
            return
        with self._lock:
            if self._process != os.getpid():
                # A forked child has the list, but not the thread.
                self._pending.clear()
                self._process = os.getpid()
            while self._pending and (wait or self._pending[0].ticket.done()):
                one = self._pending[0]
                try:
                    sums, cost_ms = one.ticket.wait()
                except Exception as error:
                    self._failed(error, one.layer, one.pairs, one.counters)
                else:
                    self._add(sums, one.layer, one.counters)
                    one.counters.add("monitor_ms", one.layer, cost_ms)
                self._pending.popleft()

    def forget(self) -> None:
        """Drop all samples that are not in the counters yet."""
        with self._lock:
            self._pending.clear()

    def close(self) -> None:
        """Wait for running samples and end the threads; they start again when needed."""
        self.collect(wait=True)
        self._workers.close()
        if self._pool is not None:
            self._pool.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return Monitor, ()

    def _natively(self, sample: Sample) -> Callable[..., Partial]:
        if self._pool is None:
            self._pool = NativePool(sample.blocks.library.handle, background=True)
        return functools.partial(attend_each_native, pool=self._pool)

    def _measure(self, sample: Sample, each: Callable[..., Partial]) -> tuple[list[float], float]:
        """Runs in the Python thread: the sums, and the milliseconds of CPU time that they took."""
        pool = self._pool
        began, before = time.thread_time(), pool.cpu_ms if pool else 0.0
        sums = measure(sample, each).tolist()
        native_ms = pool.cpu_ms - before if pool else 0.0
        return sums, (time.thread_time() - began) * 1e3 + max(native_ms, 0.0)

    def _add(self, sums: Any, layer: int, counters: Any) -> None:
        for name, amount in zip(NAMES, sums):
            counters.add(f"monitor_{name}", layer, amount)

    def _failed(self, error: Exception, layer: int, pairs: int, counters: Any) -> None:
        # Whatever goes wrong here must not end somebody's generation.
        counters.add("monitor_skipped", layer, pairs)
        counters.note(
            "monitor", f"a sample was not measured, later ones are tried again ({type(error).__name__}: {error})"
        )
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"the fidelity monitor could not measure a sample of layer {layer} ({type(error).__name__}: {error}); "
                "the model's output is not affected; stats() counts such samples as skipped",
                RuntimeWarning,
                stacklevel=2,
            )


def _everything(setting: bool | float) -> bool:
    return setting is not True and setting == 1.0


def planned(cache: Any, decode_step: int) -> dict[int, tuple[int, ...]]:
    """KV heads to sample in a decode step (from 1), by layer; all pairs take turns, see ``_scattered``."""
    setting = cache.scout_config.monitor
    methods = cache.methods
    pairs = sum(method.kv_heads for method in methods)
    if not setting or not pairs:
        return {}
    per_step = 1 / SPARSE_EVERY if setting is True else setting * pairs
    first, last = math.ceil((decode_step - 1) * per_step), math.ceil(decode_step * per_step)
    if first == last:
        return {}
    order = _scattered(tuple((method.layer_idx, method.kv_heads) for method in methods))
    chosen: dict[int, tuple[int, ...]] = {}
    for turn in range(first, min(last, first + pairs)):
        layer, head = order[turn % pairs]
        chosen[layer] = tuple(sorted((*chosen.get(layer, ()), head)))
    return chosen


@functools.lru_cache(maxsize=8)
def _scattered(layers: tuple[tuple[int, int], ...]) -> list[tuple[int, int]]:
    """All pairs of a layer and a head, ordered so that a few successive pairs are spread over the model.

    Layers lose very different amounts, and in numerical order a short run would sample the first ones only.
    """
    found = []
    for turn in range(max(heads for _, heads in layers)):
        for place in range(len(layers)):
            layer, heads = layers[place * _stride(len(layers)) % len(layers)]
            if turn < heads:
                found.append((layer, (turn + place * _stride(heads)) % heads))
    return found


def _stride(count: int) -> int:
    """A step that visits all of ``count`` items before it repeats, near the golden section of ``count``."""
    able = [step for step in range(1, count + 1) if math.gcd(step, count) == 1]
    return min(able, key=lambda step: abs(step - 0.618 * count))


def _sample(
    step: Step,
    method: Method,
    heads: tuple[int, ...],
    query: torch.Tensor,
    result: Partial,
    attended: list[Any] | None,
    predicted: bool,
) -> Sample:
    kv: Any = method.kv
    store: PagedKV = getattr(kv, "host", kv)
    blocks, which = WholeBlocks(store), list(heads)

    def of_heads(tensor: torch.Tensor) -> torch.Tensor:
        grouped = tensor.squeeze(2).unflatten(1, (method.kv_heads, -1))
        return grouped[:, which].to(store.device)

    # Indexing by a list copies.
    keys, values = (part[:, which].to(store.device) for part in method.kv.read(blocks.tokens, method.length))
    padding_mask = None if step.mask is None else step.padding(store.device)[:, : method.length].clone()
    marks = _marks(attended, which, len(query), blocks.blocks, store.device)
    looked_at = (of_heads(query), of_heads(result.out), keys, values, marks, padding_mask)
    return Sample(blocks, heads, *looked_at, predicted, *method.scoring)


def _marks(attended: list[Any] | None, heads: list[int], rows: int, blocks: int, device: torch.device) -> torch.Tensor:
    """Which whole blocks were attended, (rows, heads, blocks) of bool."""
    if attended is None:
        return torch.ones((rows, len(heads), blocks), dtype=torch.bool, device=device)
    marks = torch.zeros((rows, len(heads), blocks + 1), dtype=torch.bool, device=device)
    for ids, used in attended:
        ids = ids[:, heads].to(device, torch.int64)
        if used is not None:
            used = used[:, heads].to(device)
            if used.dim() == 2:  # counts of packed lists
                used = torch.arange(ids.shape[2], dtype=torch.int64, device=device) < used.unsqueeze(2)
            ids = ids.masked_fill(~used, blocks)
        # Blocks that are not whole, and empty slots, go to an extra column.
        marks.scatter_(2, ids.masked_fill((ids < 0) | (ids > blocks), blocks), True)
    return marks[:, :, :blocks]
