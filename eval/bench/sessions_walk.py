"""Decode steps of the benchmark of sessions: the same random tokens for all arms, with what they took and gave."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

import scout_hf
from scout_hf import CACHE, ScoutCache
from scout_hf.eval.bench import disk
from scout_hf.eval.bench.timing import Timing, preemptions, timed
from scout_hf.eval.caches import random_kv

SHIFT = 4099
"""Tokens by which a layer's keys are shifted against those of the layer before: drawing them anew takes long."""


@dataclass
class Walk:
    """Passes in a row: their seconds, what disks read for them, and what they gave."""

    seconds: list[float] = field(default_factory=list)
    preempted: list[bool] = field(default_factory=list)
    disk_bytes: list[int] = field(default_factory=list)
    given: list[torch.Tensor] = field(default_factory=list)

    def part(self, first: int, last: int | None = None) -> Walk:
        """Some of the passes."""
        cut = slice(first, last)
        return Walk(self.seconds[cut], self.preempted[cut], self.disk_bytes[cut], self.given[cut])

    def add(self, other: Walk) -> None:
        """Passes of another round, without what they gave."""
        self.seconds += other.seconds
        self.preempted += other.preempted
        self.disk_bytes += other.disk_bytes

    def record(self) -> dict[str, Any]:
        """For JSON."""
        times = Timing(tuple(self.seconds), tuple(self.preempted)).record()
        return times | {"disk_bytes": sum(self.disk_bytes) / len(self.disk_bytes)}


class Walker:
    """Fills caches of one model, and decodes with them."""

    def __init__(self, model: LlamaForCausalLM, handle: scout_hf.Handle, seed: int):
        self.model, self.handle, self.seed = model, handle, seed
        self._order, self._tokens = random.Random(seed), torch.Generator().manual_seed(seed)

    def ids(self, count: int) -> torch.Tensor:
        """Random tokens, others every time: steps choose other blocks than those before."""
        return torch.randint(self.model.config.vocab_size, (1, count), generator=self._tokens)

    def shuffled(self, names: Iterable[str]) -> list[str]:
        """Names in an order that is drawn every time."""
        held = list(names)
        return self._order.sample(held, len(held))

    def filled(self, tokens: int, **settings: Any) -> ScoutCache:
        """A cache that holds so many random keys and values."""
        cache = self.handle.new_cache(**settings)
        parts = random_kv(self.model.config, tokens, self.seed)
        for layer in range(self.model.config.num_hidden_layers):
            cache.update(*(part.roll(layer * SHIFT, dims=2) for part in parts), layer)
        return cache

    @torch.no_grad()
    def walk(self, cache: ScoutCache, ids: torch.Tensor, at_once: int = 1, before: Callable[[], object] = int) -> Walk:
        """Give a cache these tokens, ``at_once`` so many per pass; ``before`` is called before each, not timed."""
        made = Walk()
        # Several without the head: for the last of several tokens torch may copy all of it, which takes seconds.
        call = self.model if at_once == 1 else self.model.model
        for part in ids.split(at_once, dim=1):
            before()

            def step(part: torch.Tensor = part) -> None:
                made.given.append(call(part, **{CACHE: cache}, use_cache=True)[0])

            pushed, read = preemptions(), disk.read_bytes()
            made.seconds.append(timed(step))
            made.disk_bytes.append(disk.read_bytes() - read)
            made.preempted.append(preemptions() > pushed)
        return made


def must_be_equal(walks: Mapping[str, Walk]) -> None:
    """RuntimeError unless all arms gave the same to the bit."""
    (first, wanted), *others = walks.items()
    for name, walk in others:
        pairs = zip(walk.given, wanted.given, strict=True)
        if not all(torch.equal(one, other) for one, other in pairs):
            raise RuntimeError(f"{name} and {first} differ for the same tokens: figures would mean nothing")


def files_of(session: Path) -> list[Path]:
    """The files of a session."""
    return sorted(session.iterdir())


def make(cold: bool, files: Iterable[Path]) -> None:
    """Have files in the page cache of the system, or not."""
    if cold:
        disk.drop(files)
    else:
        disk.read(files)


def record_of(seconds: Iterable[float], size: int | None = None) -> dict[str, Any]:
    """Seconds for JSON, with the rate where bytes are given."""
    times = tuple(seconds)
    return Timing(times, (False,) * len(times)).record(size)
