"""Native attention that is described once and started in every decode step; the jobs of all layers in one call."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_void_p
from typing import TYPE_CHECKING, Any

import torch

from scout_hf.fusion import Partial
from scout_hf.kernels.cpu.addresses import address
from scout_hf.kernels.cpu.backend import BlockLists
from scout_hf.kernels.cpu.library import StepArgs
from scout_hf.kernels.cpu.pool import NativePool, PoolTicket
from scout_hf.kernels.cpu.protocols import PagedStore, StepSums

if TYPE_CHECKING:
    from scout_hf.kernels.cpu.native_backend import NativeBackend


class NativeStepTotals:
    """See :class:`StepTotals`."""

    def __init__(self, args: StepArgs):
        self._args, self._taken = args, StepSums(0, 0, 0)

    def take(self) -> StepSums:
        """What jobs have done that ended since the last call."""
        args, taken = self._args, self._taken
        self._taken = now = StepSums(args.tokens, args.listed_blocks, args.chosen_blocks)
        return StepSums(*(one - other for one, other in zip(now, taken)))


class NativeStepJob:
    """The jobs of one layer, one per decode step; see :meth:`CpuBackend.prepare`.

    Attributes
    ----------
    args : StepArgs
        What the library submits.
    memory : tuple
        What owns the memory that the next job uses.
    """

    def __init__(
        self,
        backend: NativeBackend,
        words: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        into: Partial,
        query: torch.Tensor,
        lists: BlockLists,
        chosen: torch.Tensor,
        layer: int,
    ):
        self.layer = layer
        self.memory: tuple[Any, ...] = ()
        self._backend, self._words, self._into = backend, words, into
        self._query, self._lists, self._chosen = query, lists, chosen
        flag, self._done, trouble = (address(word, torch.int64) for word in words)
        self.args = StepArgs(flag=flag, chosen=address(chosen, torch.int32), trouble=trouble, counted=1)
        self.pool_ticket: PoolTicket | None = None
        self._known: tuple[Any, ...] = ()
        self._mask: torch.Tensor | None = None
        self.totals = NativeStepTotals(self.args)

    @property
    def number(self) -> int:
        """Jobs started so far."""
        return int(self.args.attend.number)

    @property
    def counted(self) -> bool:
        """Whether the next jobs count in ``totals``."""
        return bool(self.args.counted)

    @counted.setter
    def counted(self, value: bool) -> None:
        self.args.counted = value

    def describe(
        self, store: PagedStore, scale: float, softcap: float | None, padding_mask: torch.Tensor | None
    ) -> None:
        """What the next jobs attend to, as in ``attend_blocks``; costs little where that is what they did."""
        native = store.native()
        known: tuple[Any, ...] = ()
        if native is not None:
            known = (native.pages, native.length, native.batch, native.pages_stride, scale, softcap)
        if known and known == self._known and padding_mask is self._mask:
            return
        found = self._backend.described(self._query, store, self._lists, scale, softcap, padding_mask, self._into)
        if found is None:
            raise NotImplementedError("prepare() got inputs for which watches() is False; use start()")
        args, held = found
        args.done, args.number = self._done, self.number
        self._known = ()
        self.args.attend = args
        self.memory = (held, store.memory())
        self._known, self._mask = known, padding_mask

    def ticket(self) -> PoolTicket | None:
        """A ticket of the last job; None before the first one."""
        last = self.pool_ticket
        return None if last is None or not self.args.ticket else last.of(self.args.ticket)

    def drain(self) -> None:
        """Block until the last job has ended."""
        ticket = self.ticket()
        if ticket is not None:
            ticket.drain()


class NativeStepJobs:
    """The jobs of several layers that are started together; see :meth:`CpuBackend.start_step`."""

    def __init__(self, submit: Callable[..., int], jobs: Sequence[NativeStepJob]):
        self.jobs = tuple(jobs)
        self._pointers = (c_void_p * len(self.jobs))(*(ctypes.addressof(job.args) for job in self.jobs))
        count = len(self.jobs)
        # In the form that the pool calls.
        self._submit = lambda handle, pointers, flag, value: submit(handle, pointers, count)

    def start(self, pool: NativePool) -> PoolTicket:
        """Submit one job of each; a ticket of the last."""
        memory = [job.memory for job in self.jobs]
        return pool.submit(self._submit, self._pointers, keep=(self, memory), before=self._expect)

    def _expect(self, ticket: PoolTicket) -> None:
        """The native call writes the jobs' numbers itself: after an interrupt right behind it they can be drained."""
        for job in self.jobs:
            last = job.pool_ticket
            if last is not None and last.threads is not ticket.threads:
                job.args.ticket = 0  # of threads that have ended
            job.pool_ticket = ticket
