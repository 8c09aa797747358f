"""Hand-over of a layer's CPU attention between device and CPU: the shared memory, and two ways to synchronise.

``join``: a Python thread waits for an event that marks the arrival of query and lists, and starts the CPU; the main
thread waits for the result before it launches work that needs it. ``flags``: the stream sets a flag that CPU threads
poll, and polls theirs; the main thread only launches.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from types import ModuleType
from typing import NamedTuple

import torch

from scout_hf.fusion import Partial
from scout_hf.kernels.cpu import Attended, BlockLists, CpuBackend, PagedStore, StepSums, Ticket
from scout_hf.step import Step
from scout_hf.stores.streams import Mark


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

    @property
    def capacity(self) -> int:
        """Blocks that a list can hold."""
        return self.missing.shape[2]

    def fits(self, query: torch.Tensor, capacity: int) -> bool:
        """Whether the buffers fit such a query and lists of ``capacity`` blocks."""
        return self.query.shape == query.shape and self.query.dtype == query.dtype and capacity <= self.capacity

    def lists(self) -> BlockLists:
        """The missing blocks as ``BlockLists``."""
        return BlockLists(self.missing, self.missing_counts)


class Job(NamedTuple):
    """The arguments of ``CpuBackend.attend_blocks`` other than query and lists."""

    store: PagedStore
    scale: float
    softcap: float | None
    padding_mask: torch.Tensor | None


class Handoff(ABC):
    """CPU attention of one layer, at most one job at a time; lists and query go through ``mail``.

    ``lost`` is True if host and device have lost sync; then no further job may be started. ``counted`` is False while
    jobs are left out of ``finished``.
    """

    mail: Mailbox
    lost = False
    counted = True

    def serves(self, query: torch.Tensor, capacity: int, backend: CpuBackend) -> bool:
        """Whether the next job may be of such a query, lists of ``capacity`` blocks, and this backend."""
        return not self.lost and self.mail.fits(query, capacity)

    @abstractmethod
    def start(self, step: Step, query: torch.Tensor, job: Job) -> None:
        """In stream order, after the lists were written to ``mail``: start the CPU job with this query."""

    def post(self, query: torch.Tensor) -> None:
        """The device's part of ``start``, for captured steps; only with flags."""
        raise NotImplementedError

    @abstractmethod
    def result(self, step: Step) -> tuple[torch.Tensor, torch.Tensor] | None:
        """In stream order, once: output and LSE of the job, readable by the device; None if the lists are empty."""

    @abstractmethod
    def finished(self) -> StepSums | None:
        """What jobs have done that ended since the last call; None if none has."""

    @abstractmethod
    def drain(self) -> None:
        """Block until the CPU job of this layer has ended, and drop its result."""


class NoHandoff(Handoff):
    """The state before the first step of a batch: no mailbox, no job."""

    lost = True

    def start(self, step: Step, query: torch.Tensor, job: Job) -> None:
        raise NotImplementedError

    def result(self, step: Step) -> tuple[torch.Tensor, torch.Tensor] | None:
        return None

    def finished(self) -> StepSums | None:
        return None

    def drain(self) -> None:
        pass


class Join(Handoff):
    """Hand-over in which the main thread waits for the result."""

    def __init__(self, mail: Mailbox):
        self.mail = mail
        self._ticket: Ticket[Attended | None] | None = None
        self._sums: StepSums | None = None

    def start(self, step: Step, query: torch.Tensor, job: Job) -> None:
        self.mail.query.copy_(query, non_blocking=True)
        arrived = step.links.mark(query.device)
        self._ticket = step.movers.submit(_attend_when, arrived, step.backend, self.mail, job)

    def result(self, step: Step) -> tuple[torch.Tensor, torch.Tensor] | None:
        mail = self.mail
        share = None if self._ticket is None else self._ticket.wait()
        # Cleared only now: after an interrupt, a rollback must still find the job to wait for.
        self._ticket = None
        tokens = 0 if share is None else share.tokens
        if self.counted:
            self._sums = StepSums(tokens, *(int(counts.sum()) for counts in mail.counts_here))
        if share is None:
            return None
        mail.out.copy_(share.partial.out)
        mail.lse.copy_(share.partial.lse)
        device = mail.number.device
        return mail.out.to(device, non_blocking=True), mail.lse.to(device, non_blocking=True)

    def finished(self) -> StepSums | None:
        sums, self._sums = self._sums, None
        return sums

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
        words, into = (mail.flag, mail.done, mail.late), Partial(mail.out, mail.lse)
        self.job = backend.prepare(words, into, mail.query, mail.lists(), mail.chosen_counts, layer)
        self._alone = backend.together([self.job])

    def serves(self, query: torch.Tensor, capacity: int, backend: CpuBackend) -> bool:
        return super().serves(query, capacity, backend) and backend is self._backend

    def start(self, step: Step, query: torch.Tensor, job: Job) -> None:
        self.job.describe(*job)
        self.job.counted = self.counted
        self.lost = True  # between the two calls the device's count is ahead of the host's
        # The device first: a flag that is set before the job polls it is still seen.
        self.post(query)
        step.backend.start_step(self._alone)
        self.lost = False

    def post(self, query: torch.Tensor) -> None:
        self._kernels.post(query, self.mail.query, self.mail.flag, self.mail.number)

    def result(self, step: Step) -> tuple[torch.Tensor, torch.Tensor] | None:
        mail = self.mail
        self._kernels.wait(mail.done, mail.number, mail.late)
        return mail.out, mail.lse

    def finished(self) -> StepSums | None:
        return self.job.totals.take()

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
) -> Handoff:
    """Create the hand-over of that name. ``auto`` is ``join``, as are the others where a side cannot poll flags."""
    knows_words = device.type != "cuda" or torch.version.hip is None
    if name in ("flags", "graph") and knows_words and backend.watches(mail.query, store):
        return Flags(mail, kernels, backend, layer)
    return Join(mail)


def _attend_when(arrived: Mark, backend: CpuBackend, mail: Mailbox, job: Job) -> Attended | None:
    arrived.finish()
    if not mail.counts_here[0].any():
        return None
    return backend.attend_blocks(mail.query, job.store, mail.lists(), *job[1:])
