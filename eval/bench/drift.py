"""Selection that drifts as in a real text, for models with random weights, whose own scores do not.

From one token of a real text to the next, 5 to 15 % of the blocks that matter change (ScoutAttention). Here scores
follow a stationary random walk on the device, so large that the real scores beside it decide nothing; these are
computed too, so that a step costs the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from scout_hf.kernels import find_kernels
from scout_hf.methods import InfiniGen, method_names, register_method
from scout_hf.selection import Digest, digest_names, make_digest, mean_share, register_digest

PREFIX = "drifting-"
# Above any real score, and small enough for float32 to tell neighbours of the walk apart.
SIZE = 1e6
SPARE_BLOCKS = 64


class Drifting(Digest):
    """A real digest whose scores get a random walk added, at the cost of the real scores and three small kernels.

    ``correlation`` (of the walk from one step to the next) and ``gpu_kernels`` are shared by all drifting digests: set
    them before decoding, with :func:`settings_for`.
    """

    correlation = 1.0
    gpu_kernels = "auto"
    # Native code would score by itself, and nothing could be added.
    native = None
    # The walk is added to what blocks are ranked by.
    per_head = False
    real: type[Digest]

    _walk: torch.Tensor | None = None

    def encode(self, keys: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
        kernels, real = find_kernels(self.gpu_kernels, keys.device), self._as_real()
        codes = None if kernels is None else kernels.encode(real, keys, padding_mask)
        return real.encode(keys, padding_mask) if codes is None else codes

    def score(self, query: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        kernels, real, scores = find_kernels(self.gpu_kernels, codes.device), self._as_real(), None
        if kernels is not None and real.native is not None:
            size = self._block_size(query, codes)
            scores = kernels.score(real.native, real.prepare(query), codes, block_size=size)
        scores = real.score(query, codes) if scores is None else scores
        scores = mean_share(scores, codes.shape[1], None) if self.real.per_head else scores
        scores.add_(self.advance(scores))
        return scores

    def advance(self, like: torch.Tensor) -> torch.Tensor:
        """One step of the walk, a view that is valid until the next step; does not synchronise with the device."""
        blocks = like.shape[2]
        held = 0 if self._walk is None else self._walk.shape[2]
        if blocks > held:
            if like.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "the walk of scores cannot begin while a graph is captured: every run would begin again"
                )
            # More than the capacity of the table of codes, since a captured step scores all of it.
            capacity = blocks + SPARE_BLOCKS + blocks // 4
            grown = torch.empty((*like.shape[:2], capacity), dtype=torch.float32, device=like.device)
            grown.normal_(0, SIZE)
            if held:
                grown[:, :, :held] = self._walk
            self._walk = grown
        walk, fresh = self._walk[:, :, :blocks], 1.0 - self.correlation
        if fresh > 0:
            # (1 - fresh) * walk + fresh * noise, whose variance stays what it is.
            spread = SIZE * math.sqrt(1.0 - self.correlation**2) / fresh
            walk.lerp_(torch.empty_like(like).normal_(0, spread), fresh)
        return walk

    def best(self, count: int, blocks: int) -> torch.Tensor:
        """The ``count`` highest of the first ``blocks`` blocks in the last step: (batch, kv_heads, blocks) of bool."""
        walk = self._walk[:, :, :blocks]
        return torch.zeros_like(walk, dtype=torch.bool).scatter_(2, walk.topk(count, dim=2).indices, True)

    def _as_real(self) -> Digest:
        twin = object.__new__(self.real)
        twin.__dict__.update(self.__dict__)
        return twin

    def _block_size(self, query: torch.Tensor, codes: torch.Tensor) -> int:
        return codes.shape[3] // (self.bits * query.shape[3] // 8 + 1) if self.real.native == "sign" else 1


def drifting(name: str) -> str:
    """Register a drifting version of a digest, unless it is there; its name, for ``ScoutConfig(digest=...)``."""
    made = PREFIX + name
    if made not in digest_names():
        real = type(make_digest(name))
        register_digest(type(f"Drifting{real.__name__}", (Drifting, real), {"name": made, "real": real}))
    return made


def watched_change(digests: list[Drifting], count: int, blocks: int, step: Callable[[], Any], steps: int) -> float:
    """Take some steps, and measure which share of the best blocks is new in each; the mean over steps and layers.

    The best ``count`` of the first ``blocks`` blocks are compared, by a digest per layer. The walk is read, not what
    Python code chose: a captured step runs no Python.
    """
    shares, old = [], [digest.best(count, blocks) for digest in digests]
    for _ in range(steps):
        step()
        new = [digest.best(count, blocks) for digest in digests]
        shares += [1.0 - (one & other).sum() / other.sum() for one, other in zip(old, new)]
        old = new
    return float(torch.stack(shares).mean())


def correlation_for(share: float, chosen: float) -> float:
    """The correlation of the walk with which a share, in [0, 1), of the chosen blocks changes per step.

    ``chosen`` is the share of all blocks that is chosen. ValueError if so many cannot change.

    >>> 0.99 < correlation_for(0.1, 0.05) < 1.0
    True
    """
    if not 0 <= share < 1.0 - chosen:
        raise ValueError(
            f"--drift {share}: {chosen:.0%} of the blocks are chosen, so at most {1 - chosen:.0%} of them can change "
            "in a step; take 0.05 to 0.15 as in real texts, or a smaller --budget"
        )
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _changing(middle, chosen) > share else (low, middle)
    return high


def _changing(correlation: float, chosen: float) -> float:
    """1 - P(both in the upper share | one is) of two normal numbers of that correlation, by integration."""
    edge = math.sqrt(2) * float(torch.erfinv(torch.tensor(1 - 2 * chosen, dtype=torch.float64)))
    x = torch.linspace(edge, edge + 10.0, 20001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    scale = math.sqrt(max(1e-18, 1 - correlation**2))
    stays = torch.special.ndtr((correlation * x - edge) / scale)
    return 1.0 - float(torch.trapezoid(density * stays, x)) / chosen


def settings_for(correlation: float, gpu_kernels: str) -> None:
    """Set the correlation, see :func:`correlation_for`, and ``gpu_kernels`` of all drifting digests."""
    Drifting.correlation, Drifting.gpu_kernels = correlation, gpu_kernels


NAME = "drifting-infinigen"


class DriftingInfiniGen(InfiniGen):
    """InfiniGen whose chosen tokens drift: as many as the real scores choose, at their cost, but from shuffled tokens.

    ``share`` of a head's tokens is replaced per step. It is shared by all objects: set it before decoding.
    """

    name = NAME
    share = 0.1

    _shuffled: torch.Tensor | None = None
    _first = 0

    def choose_tokens(self, step, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids, valid = super().choose_tokens(step, query)
        if self._shuffled is None:
            self._shuffled = torch.rand(
                (*ids.shape[:2], self.kv.host.length), dtype=torch.float32, device=ids.device
            ).argsort(-1)
        held, count = self._shuffled.shape[2], ids.shape[2]
        self._first += round(self.share * count)
        window = (self._first + torch.arange(min(count, held), dtype=torch.int64, device=ids.device)) % held
        return self._shuffled[:, :, window], valid[:, :, : len(window)]


def drifting_infinigen() -> str:
    """Register :class:`DriftingInfiniGen`, unless it is there; its name, for ``ScoutConfig(method=...)``."""
    if NAME not in method_names():
        register_method(DriftingInfiniGen)
    return NAME
