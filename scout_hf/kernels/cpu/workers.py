"""A Python thread for jobs that the native pool cannot run: torch's, and transfers to another device."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch


class Ticket:
    """A submitted job; ``wait`` joins it and gives its result or raises its error."""

    def __init__(self, future: Future, ran: list[int]):
        self._future, self._ran = future, ran

    def wait(self) -> Any:
        """The job's result; blocks until it is there."""
        return self._future.result()

    def drain(self) -> bool:
        """Block until the job has ended, whatever came of it; whether it did so without an error."""
        return self._future.exception() is None

    def done(self) -> bool:
        """Whether the job has ended."""
        return self._future.done()

    def times(self) -> tuple[int, int] | None:
        """When the job began and ended, ns of ``time.perf_counter_ns``; None until it has."""
        return tuple(self._ran) if len(self._ran) == 2 else None


class Workers:
    """One background thread, started at the first job and ended by ``close`` or with the process.

    Parameters
    ----------
    threads : int or None
        Intra-op threads of torch inside the jobs; None leaves torch's setting.
    """

    def __init__(self, threads: int | None = None):
        self.threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._process = 0
        self._last: Ticket | None = None

    def submit(self, job: Callable[..., Any], *args: Any) -> Ticket:
        """Start ``job(*args)`` in the background, without gradients and without autocast."""
        if self._pool is None or self._process != os.getpid():
            # A forked child inherits the pool, but not its thread.
            # Nothing of self: its thread would keep it, and so itself, for ever.
            given = (self.threads, torch.get_num_threads())
            self._pool = ThreadPoolExecutor(1, "scout-cpu", initializer=_take_threads, initargs=given)
            self._process = os.getpid()
        ran: list[int] = []
        # Another thread may submit before this one returns: the ticket must be its own.
        self._last = ticket = Ticket(self._pool.submit(_timed, ran, job, args), ran)
        return ticket

    def busy(self) -> bool:
        """Whether a job has not ended yet."""
        return self._last is not None and self._process == os.getpid() and not self._last.done()

    def close(self) -> None:
        """End the thread after the jobs it has; a later ``submit`` starts a new one."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True)

    def __deepcopy__(self, memo: dict) -> Workers:
        return Workers(self.threads)

    def __reduce__(self):
        return Workers, (self.threads,)


def _take_threads(own: int | None, default: int) -> None:
    if own is not None:
        torch.set_num_threads(own)
        # That also became the default of all threads that begin later: this one takes it by asking, then any other
        # thread puts it back.
        torch.get_num_threads()
        other = threading.Thread(target=torch.set_num_threads, args=(default,))
        other.start()
        other.join()


def _timed(ran: list[int], job: Callable[..., Any], args: tuple) -> Any:
    ran.append(time.perf_counter_ns())
    try:
        return _bare(job, args)
    finally:
        ran.append(time.perf_counter_ns())


def _bare(job: Callable[..., Any], args: tuple) -> Any:
    # Grad mode and autocast are per thread: without this a job would differ from the thread that submitted it.
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return job(*args)
