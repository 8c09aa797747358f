"""Hand-over of a layer's CPU attention between device and CPU: the shared memory, and two ways to synchronise.

``join``: a Python thread waits for an event that marks the arrival of query and lists, and starts the CPU; the main
thread waits for the result before it launches work that needs it. ``flags``: the stream sets a flag that CPU threads
poll, and polls theirs; the main thread only launches.
"""

from __future__ import annotations

import contextlib
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from scout_hf.fusion import Partial
from scout_hf.kernels.cpu import Attended, BlockLists, CpuBackend, PagedStore, StepSums, StepTotals, Ticket
from scout_hf.step import Step
from scout_hf.stores.streams import Mark

if TYPE_CHECKING:
    from scout_hf.counters import Counters
    from scout_hf.methods.base import Scoring


class Mailbox:
    """Host buffers for query and block lists to the CPU, and its result back; pinned if the device is a GPU.

    Parameters
    ----------
    query : Tensor (batch, query_heads, 1, head_dim)
        For sizes, dtype and device.
    kv_heads, capacity : int
        Lists per row, and blocks that a list can hold.
    late : Tensor (1,) of int64
        Word of a ``LateShares``: the number of a job that timed out.

    Attributes
    ----------
    query : Tensor (batch, query_heads, 1, head_dim)
    missing : Tensor (batch, kv_heads, capacity) of int32
        Blocks for the CPU to attend.
    missing_counts, chosen_counts : Tensor (batch, kv_heads) of int32
        Entries of ``missing``; number of all chosen blocks.
    counts_here : array (2, batch, kv_heads) of int32
        Both, to be read without torch.
    out, lse : Tensor (batch, query_heads, 1, head_dim), (batch, query_heads, 1) of float32
        Result of CPU attention.
    capacity : int
        Blocks that a list can hold.
    flag, done : Tensor (1,) of int64
        Number of the last query that arrived, and of the last finished job.
    late : Tensor (1,) of int64
        As given.
    number : Tensor (1,) of int64
        On the device: number of queries posted.
    """

    def __init__(self, query: torch.Tensor, kv_heads: int, capacity: int, late: torch.Tensor):
        pin = query.device.type == "cuda"
        batch, heads = query.shape[:2]
        self.capacity = capacity
        self.query = torch.empty(query.shape, dtype=query.dtype, device="cpu", pin_memory=pin)
        self.missing = torch.empty((batch, kv_heads, capacity), dtype=torch.int32, device="cpu", pin_memory=pin)
        counts = torch.zeros((2, batch, kv_heads), dtype=torch.int32, device="cpu", pin_memory=pin)
        self.missing_counts, self.chosen_counts = counts
        self.counts_here = counts.numpy()
        self.out = torch.zeros(query.shape, dtype=torch.float32, device="cpu", pin_memory=pin)
        self.lse = torch.full((batch, heads, 1), -torch.inf, dtype=torch.float32, device="cpu", pin_memory=pin)
        # One CPU cache line per word, against false sharing.
        words = torch.zeros((2, 16), dtype=torch.int64, device="cpu", pin_memory=pin)
        self.flag, self.done = (line[:1] for line in words)
        self.late = late
        self.number = torch.zeros(1, dtype=torch.int64, device=query.device)
        if pin:
            # The pinned-memory allocator does not see Triton launches: with a copy on this stream, it waits for the
            # stream before it reuses this memory.
            for part in (self.query, self.missing, counts, self.out, self.lse, words):
                part.to(query.device, non_blocking=True)

    def lists(self) -> BlockLists:
        """The missing blocks as ``BlockLists``."""
        return BlockLists(self.missing, self.missing_counts)


class JobCounts:
    """Adds what the jobs of a hand-over have done to the counters, when these are read; a step is spared that.

    Parameters
    ----------
    counters : Counters
    layer : int
    handoff : Join or Flags
        While it lives, further jobs may follow.
    """

    def __init__(self, counters: Counters, layer: int, handoff: Join | Flags):
        self._counters, self._layer, self._totals = counters, layer, handoff.totals
        self._lists = handoff.mail.missing_counts.numel()
        self._owner: Callable[[], Any] = weakref.ref(handoff)
        counters.follow(self)

    @property
    def over(self) -> bool:
        """Whether no further jobs can follow."""
        return self._owner() is None

    def fold(self) -> None:
        """Add the jobs that ended since the last call."""
        done = self._totals.take()
        if done.chosen:
            self._counters.add("attended", self._layer, done.tokens / self._lists)
            self._counters.cpu_share(self._layer, done.listed, done.chosen)


class Handoff(ABC):
    """CPU attention of one layer, at most one job at a time; lists and query go through ``mail``.

    ``lost`` is True if host and device have lost sync; then no further job may be started. ``counted`` is False while
    jobs are left out of the statistics.
    """

    mail: Mailbox
    lost = False
    counted = True

    def serves(self, query: torch.Tensor, capacity: int, backend: CpuBackend) -> bool:
        """Whether the next job may be of such a query, lists of ``capacity`` blocks, and this backend."""
        if self.lost:
            return False
        known = self.mail.query
        return known.shape == query.shape and known.dtype == query.dtype and capacity <= self.mail.capacity

    @abstractmethod
    def start(
        self, step: Step, query: torch.Tensor, store: PagedStore, scoring: Scoring, padding_mask: torch.Tensor | None
    ) -> None:
        """In stream order, after the lists were written to ``mail``: start the CPU job with this query."""

    def post(self, query: torch.Tensor) -> None:
        """The device's part of ``start``, for captured steps; only with flags."""
        raise NotImplementedError

    @abstractmethod
    def result(self, step: Step) -> Partial | None:
        """In stream order, once: the job's result, readable by the device; None if the lists are empty."""

    @abstractmethod
    def drain(self) -> None:
        """Block until the CPU job of this layer has ended, and drop its result."""


class NoHandoff(Handoff):
    """The state before the first step of a batch: no mailbox, no job."""

    lost = True

    def start(
        self, step: Step, query: torch.Tensor, store: PagedStore, scoring: Scoring, padding_mask: torch.Tensor | None
    ) -> None:
        raise NotImplementedError

    def result(self, step: Step) -> Partial | None:
        return None

    def drain(self) -> None:
        pass


class JoinTotals:
    """``StepTotals`` of jobs that the main thread waits for."""

    def __init__(self) -> None:
        self.sums = (0, 0, 0)

    def take(self) -> StepSums:
        """What jobs have done that ended since the last call."""
        sums, self.sums = self.sums, (0, 0, 0)
        return StepSums(*sums)


class Join(Handoff):
    """Hand-over in which the main thread waits for the result."""

    def __init__(self, mail: Mailbox, layer: int):
        self.mail, self.totals, self._layer = mail, JoinTotals(), layer
        self._ticket: Ticket[Attended | None] | None = None

    def start(
        self, step: Step, query: torch.Tensor, store: PagedStore, scoring: Scoring, padding_mask: torch.Tensor | None
    ) -> None:
        self.mail.query.copy_(query, non_blocking=True)
        arrived = step.links.mark(query.device)
        job = arrived, step.backend, self.mail, store, scoring, padding_mask
        self._ticket = step.movers.submit(_attend_when, *job)

    def result(self, step: Step) -> Partial | None:
        if self._ticket is None:
            return None
        mail = self.mail
        with step.counters.timed(self._layer, "join"):
            share = self._ticket.wait()
        # Cleared only now: after an interrupt, a rollback must still find the job to wait for.
        self._ticket = None
        if self.counted:
            tokens, listed, chosen = self.totals.sums
            new_listed, new_chosen = mail.counts_here.sum((1, 2)).tolist()
            new_tokens = 0 if share is None else share.tokens
            self.totals.sums = tokens + new_tokens, listed + new_listed, chosen + new_chosen
        if share is None:
            return None
        mail.out.copy_(share.partial.out)
        mail.lse.copy_(share.partial.lse)
        device = mail.number.device
        return Partial(mail.out.to(device, non_blocking=True), mail.lse.to(device, non_blocking=True))

    def drain(self) -> None:
        if self._ticket is not None:
            self._ticket.drain()
            self._ticket = None


class Flags(Handoff):
    """Hand-over in which the stream and the CPU threads poll each other's flags.

    Attributes
    ----------
    job : StepJob
        The layer's CPU attention; its number is that of the last query that was or will be posted.
    """

    def __init__(self, mail: Mailbox, kernels: ModuleType, backend: CpuBackend, layer: int):
        self.mail, self._kernels, self._backend = mail, kernels, backend
        words, self._share = (mail.flag, mail.done, mail.late), Partial(mail.out, mail.lse)
        self.job = backend.prepare(words, self._share, mail.query, mail.lists(), mail.chosen_counts, layer)
        self._alone = backend.together([self.job])

    @property
    def counted(self) -> bool:
        return self.job.counted

    @counted.setter
    def counted(self, value: bool) -> None:
        self.job.counted = value

    @property
    def totals(self) -> StepTotals:
        """Sums over its jobs."""
        return self.job.totals

    def serves(self, query: torch.Tensor, capacity: int, backend: CpuBackend) -> bool:
        return backend is self._backend and super().serves(query, capacity, backend)

    def start(
        self, step: Step, query: torch.Tensor, store: PagedStore, scoring: Scoring, padding_mask: torch.Tensor | None
    ) -> None:
        self.job.describe(store, *scoring, padding_mask)
        self.lost = True  # between the two calls the device's count is ahead of the host's
        # The device first: a flag that is set before the job polls it is still seen.
        self.post(query)
        step.backend.start_step(self._alone)
        self.lost = False

    def post(self, query: torch.Tensor) -> None:
        self._kernels.post(query, self.mail.query, self.mail.flag, self.mail.number)

    def result(self, step: Step) -> Partial | None:
        self._kernels.wait(self.mail.done, self.mail.number, self.mail.late)
        return self._share

    def drain(self) -> None:
        number, flag = self.mail.number, self.mail.flag
        if number.is_cuda:
            # After the sync all posted queries have arrived, and no kernel waits for this mailbox. A broken device
            # raises, and sends nothing any more.
            with contextlib.suppress(RuntimeError):
                torch.cuda.synchronize(number.device)
        if int(flag) < self.job.number:
            # The query will never be posted: set the flag to release the CPU threads; the lists are still valid.
            self.lost = True
            flag.fill_(self.job.number)
        self.job.drain()


def make_handoff(
    name: str,
    mail: Mailbox,
    kernels: ModuleType,
    backend: CpuBackend,
    store: PagedStore,
    device: torch.device,
    layer: int,
) -> Join | Flags:
    """Create the hand-over of that name. ``auto`` is ``join``, as are the others where a side cannot poll flags."""
    knows_words = device.type != "cuda" or torch.version.hip is None
    if name in ("flags", "graph") and knows_words and backend.watches(mail.query, store):
        return Flags(mail, kernels, backend, layer)
    return Join(mail, layer)


def _attend_when(
    arrived: Mark,
    backend: CpuBackend,
    mail: Mailbox,
    store: PagedStore,
    scoring: Scoring,
    padding_mask: torch.Tensor | None,
) -> Attended | None:
    arrived.finish()
    if not mail.counts_here[0].any():
        return None
    return backend.attend_blocks(mail.query, store, mail.lists(), *scoring, padding_mask)
