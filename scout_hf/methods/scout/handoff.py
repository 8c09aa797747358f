"""How device and CPU hand a layer's CPU attention to each other: the memory between them, and two ways to wait.

``join``: an event says when query and lists have arrived, a Python thread waits for it and starts the CPU, and the main
thread waits for the result before it launches anything that needs it. ``flags``: the stream itself raises a word that
the CPU's threads watch, and waits for theirs; the main thread only launches.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from types import ModuleType
from typing import NamedTuple

import torch

from scout_hf.errors import CacheStateError
from scout_hf.kernels.cpu import Attended, BlockLists, CpuBackend, PagedStore, Ticket
from scout_hf.step import Step
from scout_hf.stores.streams import Mark


class Mailbox:
    """Lists and query on their way to the CPU, its share on the way back; pinned where the device is a GPU.

    Parameters
    ----------
    query : Tensor (batch, query_heads, 1, head_dim)
        For its sizes, dtype and device.
    kv_heads, capacity : int
        Lists per row, and blocks that a list can hold.

    Attributes
    ----------
    query : Tensor as given
    missing : Tensor (batch, kv_heads, capacity) of int32
        Blocks that the CPU is to attend.
    missing_counts, chosen_counts : Tensor (batch, kv_heads) of int32
        Entries of ``missing``; blocks chosen in all.
    out, lse : Tensor (batch, query_heads, 1, head_dim), (batch, query_heads, 1) of float32
        The CPU's share.
    flag, done, late : Tensor (1,) of int64
        Number of the query that has arrived, of the share that is finished, and of one that did not come in time.
    number : Tensor (1,) of int64
        On the device: queries posted.
    """

    def __init__(self, query: torch.Tensor, kv_heads: int, capacity: int):
        pin = query.device.type == "cuda"
        batch, heads = query.shape[:2]
        self.query = torch.empty(query.shape, dtype=query.dtype, device="cpu", pin_memory=pin)
        self.missing = torch.empty((batch, kv_heads, capacity), dtype=torch.int32, device="cpu", pin_memory=pin)
        counts = torch.zeros((2, batch, kv_heads), dtype=torch.int32, device="cpu", pin_memory=pin)
        self.missing_counts, self.chosen_counts = counts
        self.out = torch.zeros(query.shape, dtype=torch.float32, device="cpu", pin_memory=pin)
        self.lse = torch.full((batch, heads, 1), -torch.inf, dtype=torch.float32, device="cpu", pin_memory=pin)
        # A line of the CPU's cache each: the one that a thread watches is not the one that another writes.
        words = torch.zeros((3, 16), dtype=torch.int64, device="cpu", pin_memory=pin)
        self.flag, self.done, self.late = (line[:1] for line in words)
        self.number = torch.zeros(1, dtype=torch.int64, device=query.device)
        if pin:
            # The allocator of pinned memory does not see what Triton launches: a copy on this stream lets it wait for
            # the stream before it gives this memory to others.
            for part in (self.query, self.missing, self.missing_counts, self.out, self.lse, words):
                part.to(query.device, non_blocking=True)

    @property
    def capacity(self) -> int:
        """Blocks that a list can hold."""
        return self.missing.shape[2]

    def fits(self, query: torch.Tensor, capacity: int) -> bool:
        """Whether such a query and lists of that many blocks have their place here."""
        return self.query.shape == query.shape and self.query.dtype == query.dtype and capacity <= self.capacity

    def lists(self) -> BlockLists:
        """The lists as attention on the CPU takes them."""
        return BlockLists(self.missing, self.missing_counts)


class Job(NamedTuple):
    """What the CPU needs beside lists and query, as ``CpuBackend.attend_blocks`` takes it."""

    store: PagedStore
    scale: float
    softcap: float | None
    padding_mask: torch.Tensor | None


class Handoff(ABC):
    """CPU attention of one layer, at most one job at a time; its lists and query go through ``mail``.

    ``lost``: host and device no longer agree; nothing more may be started.
    """

    mail: Mailbox
    lost = False

    @abstractmethod
    def start(self, step: Step, query: torch.Tensor, job: Job) -> None:
        """In stream order, after the lists were written to ``mail``: give the CPU this query."""

    @abstractmethod
    def result(self, step: Step) -> tuple[torch.Tensor, torch.Tensor] | None:
        """In stream order, once: out and LSE of the share, where the device reads them; None where it is empty."""

    @abstractmethod
    def finished(self) -> int | None:
        """Tokens that the last share attended, over rows and KV heads, once; None while it is not known."""

    def uncounted(self) -> None:
        """The running job is not to be told of by ``finished``."""

    @abstractmethod
    def drain(self) -> None:
        """Block until the CPU has nothing of this layer to do, and forget its result."""

    # -- both halves of ``start``, for a step that is captured; only where the device waits by itself ----------------

    def check(self) -> None:
        """Raise CacheStateError if the stream once gave up waiting for the CPU."""

    def post(self, query: torch.Tensor) -> None:
        """The device's part of ``start``."""
        raise NotImplementedError

    def expect(self, step: Step, job: Job) -> None:
        """The CPU's part of ``start``."""
        raise NotImplementedError


class NoHandoff(Handoff):
    """Before the first step of a batch: there is no mailbox, and nothing to wait for."""

    lost = True

    def start(self, step: Step, query: torch.Tensor, job: Job) -> None:
        raise NotImplementedError

    def result(self, step: Step) -> tuple[torch.Tensor, torch.Tensor] | None:
        return None

    def finished(self) -> int | None:
        return None

    def drain(self) -> None:
        pass


class Join(Handoff):
    """The main thread waits."""

    def __init__(self, mail: Mailbox):
        self.mail = mail
        self._ticket: Ticket[Attended | None] | None = None
        self._tokens: int | None = None

    def start(self, step: Step, query: torch.Tensor, job: Job) -> None:
        self.mail.query.copy_(query, non_blocking=True)
        arrived = step.links.mark(query.device)
        self._ticket = step.movers.submit(_attend_when, arrived, step.backend, self.mail, job)

    def result(self, step: Step) -> tuple[torch.Tensor, torch.Tensor] | None:
        mail = self.mail
        share = None if self._ticket is None else self._ticket.wait()
        # Only then: after an interrupt, a rollback must find the job to wait for it.
        self._ticket = None
        self._tokens = 0 if share is None else share.tokens
        if share is None:
            return None
        mail.out.copy_(share.partial.out)
        mail.lse.copy_(share.partial.lse)
        device = mail.number.device
        return mail.out.to(device, non_blocking=True), mail.lse.to(device, non_blocking=True)

    def finished(self) -> int | None:
        tokens, self._tokens = self._tokens, None
        return tokens

    def uncounted(self) -> None:
        self._tokens = None

    def drain(self) -> None:
        if self._ticket is not None:
            self._ticket.drain()
            self._ticket = None


class Flags(Handoff):
    """The stream and the CPU's threads wait for each other's words."""

    def __init__(self, mail: Mailbox, kernels: ModuleType):
        self.mail, self._kernels = mail, kernels
        self._ticket: Ticket[Attended] | None = None
        self._posted, self._counts = 0, True

    def start(self, step: Step, query: torch.Tensor, job: Job) -> None:
        self.check()
        self.lost = True  # half way the device counts one more than the host
        # First the device: a word that comes before anybody watches for it is seen all the same.
        self.post(query)
        self.expect(step, job)
        self.lost = False

    def check(self) -> None:
        mail = self.mail
        if int(mail.late):
            raise CacheStateError(
                f"CPU attention number {int(mail.late)} of a layer timed out, and outputs since then are invalid: did "
                "its threads get no core, or was the process stopped? Start a new cache, or use hand_over='join', "
                "which never gives up"
            )

    def post(self, query: torch.Tensor) -> None:
        self._kernels.post(query, self.mail.query, self.mail.flag, self.mail.number)

    def expect(self, step: Step, job: Job) -> None:
        mail = self.mail
        self._posted += 1
        words = (mail.flag, self._posted, mail.done)
        self._counts = True
        self._ticket = step.backend.start_at(words, (mail.out, mail.lse), mail.query, job[0], mail.lists(), *job[1:])

    def result(self, step: Step) -> tuple[torch.Tensor, torch.Tensor] | None:
        mail = self.mail
        self._kernels.wait(mail.done, mail.number, mail.late)
        return mail.out, mail.lse

    def finished(self) -> int | None:
        if self._ticket is None or not self._ticket.done():
            return None
        ticket, self._ticket = self._ticket, None
        tokens = ticket.wait().tokens
        return tokens if self._counts else None

    def uncounted(self) -> None:
        self._counts = False

    def drain(self) -> None:
        number, flag = self.mail.number, self.mail.flag
        if number.is_cuda:
            # What was posted arrives, and nothing on the device still waits for this mailbox; from a broken device
            # nothing comes any more.
            with contextlib.suppress(RuntimeError):
                torch.cuda.synchronize(number.device)
        if int(flag) < self._posted:
            # What was expected will never be posted: let the CPU's threads go on, over lists that are still right.
            self.lost = True
            flag.fill_(self._posted)
        if self._ticket is not None:
            self._ticket.drain()
            self._ticket = None


def make_handoff(
    wanted: str, mail: Mailbox, kernels: ModuleType, backend: CpuBackend, store: PagedStore, device: torch.device
) -> Handoff:
    """The way of that name; ``auto`` is ``join``, and so are the others where one side cannot watch words."""
    knows_words = device.type != "cuda" or torch.version.hip is None
    if wanted in ("flags", "graph") and knows_words and backend.watches(mail.query, store):
        return Flags(mail, kernels)
    return Join(mail)


def _attend_when(arrived: Mark, backend: CpuBackend, mail: Mailbox, job: Job) -> Attended | None:
    arrived.finish()
    if not bool(mail.missing_counts.any()):
        return None
    return backend.attend_blocks(mail.query, job.store, mail.lists(), *job[1:])
