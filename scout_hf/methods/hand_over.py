"""Ways in which the CPU's share of a layer is started from a device's stream and comes back to it.

``join``: an event says when query and lists have arrived, a Python thread waits for it and starts the CPU, and the main
thread waits for the result before it launches anything that needs it. ``flags``: the stream itself raises a word that
the CPU's threads watch, and waits for theirs; the main thread only launches.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from typing import Any

import torch

from scout_hf.errors import CacheStateError
from scout_hf.methods.mailbox import Mailbox


class HandOver(ABC):
    """One layer's share under way, at most one at a time; its lists and query go through ``mail``.

    ``lost``: host and device no longer agree; nothing more may be started.
    """

    def __init__(self, mail: Mailbox):
        self.mail, self.lost = mail, False

    @abstractmethod
    def start(self, step, query: torch.Tensor, job: tuple) -> None:
        """In stream order, after the lists were written to ``mail``: give the CPU this query.

        ``job`` is what the backend needs besides: store, scale, softcap, marks of padding or None.
        """

    @abstractmethod
    def result(self, step) -> tuple[torch.Tensor, torch.Tensor] | None:
        """In stream order, once: out and LSE of the share, where the device reads them; None where it is empty."""

    @abstractmethod
    def finished(self) -> int | None:
        """Tokens that the last share attended, over rows and KV heads, once; None while it is not known."""

    def uncounted(self) -> None:
        """The share under way is not to be told of by ``finished``."""

    @abstractmethod
    def drain(self) -> None:
        """Block until the CPU has nothing of this layer to do, and forget its result."""


class Join(HandOver):
    """The main thread waits."""

    def __init__(self, mail: Mailbox):
        super().__init__(mail)
        self._ticket: Any = None
        self._tokens: int | None = None

    def start(self, step, query, job):
        self.mail.query.copy_(query, non_blocking=True)
        arrived = step.links.mark(query.device)
        self._ticket = step.movers.submit(_attend_when, arrived, step.backend, self.mail, job)

    def result(self, step):
        mail = self.mail
        # Only then: after an interrupt, a rollback must find the job to wait for it.
        share = self._ticket.wait()
        self._ticket = None
        self._tokens = 0 if share is None else share.tokens
        if share is None:
            return None
        mail.out.copy_(share.partial.out)
        mail.lse.copy_(share.partial.lse)
        device = mail.number.device
        return mail.out.to(device, non_blocking=True), mail.lse.to(device, non_blocking=True)

    def finished(self):
        tokens, self._tokens = self._tokens, None
        return tokens

    def uncounted(self):
        self._tokens = None

    def drain(self):
        if self._ticket is not None:
            self._ticket.drain()
            self._ticket = None


class Flags(HandOver):
    """The stream and the CPU's threads wait for each other's words."""

    def __init__(self, mail: Mailbox, kernels: Any):
        super().__init__(mail)
        self._kernels = kernels
        self._ticket: Any = None
        self._posted, self._counts = 0, True

    def start(self, step, query, job):
        self.check()
        self.lost = True  # half way the device counts one more than the host
        # First the device: a word that comes before anybody watches for it is seen all the same.
        self.post(query)
        self.expect(step, job)
        self.lost = False

    def check(self) -> None:
        """Raise CacheStateError if the stream once gave up waiting for the CPU."""
        mail = self.mail
        if int(mail.late):
            raise CacheStateError(
                f"share number {int(mail.late)} of the CPU did not come in time, and what the model has put out since "
                "is wrong: did its threads get no core, or was the process stopped? Start with a new cache; with "
                "hand_over='join' nothing is ever given up"
            )

    def post(self, query: torch.Tensor) -> None:
        """The device's part of ``start``."""
        self._kernels.post(query, self.mail.query, self.mail.flag, self.mail.number)

    def expect(self, step, job: tuple) -> None:
        """The CPU's part of ``start``."""
        mail = self.mail
        self._posted += 1
        words = (mail.flag, self._posted, mail.done)
        self._counts = True
        self._ticket = step.backend.start_at(words, (mail.out, mail.lse), mail.query, job[0], mail.lists(), *job[1:])

    def result(self, step):
        mail = self.mail
        self._kernels.wait(mail.done, mail.number, mail.late)
        return mail.out, mail.lse

    def finished(self):
        if self._ticket is None or not self._ticket.done():
            return None
        ticket, self._ticket = self._ticket, None
        tokens = ticket.wait().tokens
        return tokens if self._counts else None

    def uncounted(self):
        self._counts = False

    def drain(self):
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


def make_hand_over(
    wanted: str, mail: Mailbox, kernels: Any, backend: Any, store: Any, device: torch.device
) -> HandOver:
    """The way of that name; ``auto`` is ``join``, and so are the others where one side cannot watch words."""
    knows_words = device.type != "cuda" or torch.version.hip is None
    if wanted in ("flags", "graph") and knows_words and backend.watches(mail.query, store):
        return Flags(mail, kernels)
    return Join(mail)


def _attend_when(arrived, backend, mail: Mailbox, job: tuple):
    arrived.finish()
    if not bool(mail.missing_counts.any()):
        return None
    store, *rest = job
    return backend.attend_blocks(mail.query, store, mail.lists(), *rest)
