"""Running sums of what was attended, where, and what it cost. No call here synchronises with a device."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from scout_hf.alive import AliveCaches
from scout_hf.pace import Pace

SAMPLE_EVERY = 8


class Followed(Protocol):
    """Something that counts by itself, until somebody asks."""

    @property
    def over(self) -> bool:
        """Whether it will count no more."""

    def fold(self) -> None:
        """Add to the counters what was counted since the last call."""


class Counters:
    """Running sums per layer, filled by the methods while a model decodes.

    ``sums`` are numbers. What is added as 0-dimensional tensors is summed up as such, and joins them in ``collect()``.
    """

    def __init__(self) -> None:
        self._recalls: dict[tuple[int, torch.device, int], torch.Tensor] = {}
        # These describe the present state: reset() keeps them.
        self.notes: dict[tuple[str, int | None], str] = {}
        self.alive, self.pace = AliveCaches(), Pace()
        self._followed: dict[Followed, None] = {}
        self.reset()

    def reset(self) -> None:
        """Set all sums to 0."""
        if self._followed:
            self.fold()
        self.steps = self.approximate_steps = self.prefill_tokens = self.found_tokens = self.kept_tokens = 0
        self.drafted = self.accepted = self.checks = 0
        self.sums: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
        self._tensors: dict[tuple[str, int], torch.Tensor] = {}
        self._vectors: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self.history: dict[int, list[float]] | None = None
        self.stock_passes: dict[str, int] = {}
        self.pace.reset()
        for tally in self._recalls.values():
            tally.zero_()

    def add(self, name: str, layer: int, amount: float | torch.Tensor) -> None:
        """Add to one sum of one layer."""
        if isinstance(amount, torch.Tensor):
            before = self._tensors.get((name, layer))
            self._tensors[name, layer] = amount if before is None else before + amount
        else:
            self.sums[name][layer] += amount

    def add_each(self, name: str, layers: tuple[int, ...], amounts: float | torch.Tensor) -> None:
        """Add to one sum of several layers: a number to each, or a tensor (layers,) or 0-dimensional."""
        if isinstance(amounts, torch.Tensor):
            before = self._vectors.get((name, layers))
            self._vectors[name, layers] = amounts if before is None else before + amounts
        else:
            for layer in layers:
                self.sums[name][layer] += amounts

    def note(self, about: str, text: str, layer: int | None = None) -> None:
        """A remark for the statistics; a newer one about the same subject and layer replaces it."""
        self.notes[about, layer] = text

    def fell_back(self, reason: str) -> None:
        """A forward pass ran stock attention."""
        self.stock_passes[reason] = self.stock_passes.get(reason, 0) + 1

    def all_notes(self) -> Iterator[str]:
        """All notes, one line each; equal notes about several layers are merged."""
        layers: dict[tuple[str, str], list[int]] = {}
        for (about, layer), text in self.notes.items():
            layers.setdefault((about, text), []).extend([] if layer is None else [layer])
        for (about, text), where in layers.items():
            yield f"{about}: {text}" + (f" (layers {_runs(where)})" if where else "")

    def attended(self, layer: int, context: float | torch.Tensor, tokens: float | torch.Tensor) -> None:
        """One decode step of one layer attended ``tokens`` of ``context``, means over rows and KV heads."""
        for name, amount in (("decodes", 1), ("context", context), ("attended", tokens)):
            if isinstance(amount, torch.Tensor):
                self.add(name, layer, amount)
            else:
                self.sums[name][layer] += amount

    def exact(self, layer: int, context: int) -> None:
        """A pass with several queries attended to everything."""
        self.add("exact_passes", layer, 1)

    def cpu_share(self, layer: int, blocks: float, selected: float | torch.Tensor) -> None:
        """The CPU attended ``blocks`` of ``selected`` selected blocks, over all rows and heads."""
        self.add("cpu_blocks", layer, blocks)
        self.add("selected_blocks", layer, selected)
        if self.history is not None:
            self.history.setdefault(layer, []).append(blocks / max(float(selected), 1.0))

    def recalled(self, layer: int, blocks: int, moved_bytes: int) -> None:
        """Blocks were copied to the device."""
        self.add("recalled_blocks", layer, blocks)
        self.add("recalled_bytes", layer, moved_bytes)

    def recall_tally(self, layer: int, device: torch.device, block_bytes: int) -> torch.Tensor:
        """A counter on the device, (1,) of int64, to which kernels add recalled blocks; its address never changes."""
        key = (layer, device, block_bytes)
        if key not in self._recalls:
            self._recalls.setdefault(key, torch.zeros(1, dtype=torch.int64, device=device))
        return self._recalls[key]

    def follow(self, counts: Followed) -> None:
        """Add what is counted there whenever somebody asks, until that is over."""
        self.fold()
        self._followed[counts] = None

    def fold(self) -> None:
        """Add what graphs and CPU jobs have counted."""
        for counts in list(self._followed):
            over = counts.over
            counts.fold()
            if over:
                self._followed.pop(counts, None)

    def collect(self) -> None:
        """Add the counters on devices, of graphs and of CPU jobs."""
        self.fold()
        tensors, self._tensors = self._tensors, {}
        for (name, number), sum_of_tensors in tensors.items():
            self.sums[name][number] += float(sum_of_tensors)
        vectors, self._vectors = self._vectors, {}
        for (name, layers), sums in vectors.items():
            for layer, amount in zip(layers, sums.expand(len(layers)).tolist()):
                self.sums[name][layer] += amount
        for (layer, _, block_bytes), tally in list(self._recalls.items()):
            blocks = int(tally)
            tally.sub_(blocks)
            self.recalled(layer, blocks, blocks * block_bytes)

    def predicted(self, layer: int, predicted: torch.Tensor, real: torch.Tensor) -> None:
        """A predicted query and the real one, (batch, query_heads, 1, head_dim); sampled."""
        if self.steps % SAMPLE_EVERY == 1 or SAMPLE_EVERY == 1:
            cosine = torch.cosine_similarity(predicted.float(), real.float(), dim=-1).mean()
            self.add("cosine", layer, cosine)
            self.add("cosine_samples", layer, 1)

    def timed(self, layer: int, name: str) -> AbstractContextManager[None]:
        """Context manager: add the time of the block, in milliseconds, to ``<name>_ms``."""
        return _Timed(self, layer, f"{name}_ms")

    def __reduce__(self) -> tuple[type[Counters], tuple[()]]:
        return Counters, ()


class _Timed(AbstractContextManager[None]):
    def __init__(self, counters: Counters, layer: int, name: str):
        self._counters, self._layer, self._name = counters, layer, name

    def __enter__(self) -> None:
        self._begin = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._counters.add(self._name, self._layer, (time.perf_counter() - self._begin) * 1e3)


def _runs(numbers: list[int]) -> str:
    """Sorted numbers, consecutive ones as ranges: 0 to 2, 5."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
