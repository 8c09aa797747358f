"""A Python thread for jobs that the native pool cannot run: torch's, and transfers to another device."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from scout_hf.errors import ThreadStartError


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
    needed : bool
        Whether a job must run even while the interpreter ends, when no thread can be had: it then runs where it is
        submitted. Else ``submit`` returns None.
    """

    def __init__(self, threads: int | None = None, needed: bool = True):
        self.threads, self.needed = threads, needed
        self._pool: ThreadPoolExecutor | None = None
        self._setting = _Setting(threads)
        self._process = 0
        self._last: Ticket | None = None

    def submit(self, job: Callable[..., Any], *args: Any) -> Ticket | None:
        """Start ``job(*args)`` in the background, without gradients and without autocast.

        Raises
        ------
        ThreadStartError
            If the system gives no thread; the next call tries again. ``Ticket.wait`` may raise it as well.
        """
        ticket = Ticket(Future(), [])
        try:
            self._post(ticket, job, args)
        except RuntimeError as error:
            # The pool may have the job all the same, for a thread that starts later: not if it is cancelled by then.
            if ticket._future.cancel():
                if "start new thread" in str(error):
                    raise _no_thread(error) from error
                if "interpreter shutdown" not in str(error):
                    raise
                if not self.needed:
                    return None
                ticket = Ticket(Future(), [])
                with torch.inference_mode(False):  # as in a thread of its own
                    _run(ticket._future, ticket._ran, None, None, job, args)
        # Another thread may submit before this one returns: the ticket must be its own.
        self._last = ticket
        return ticket

    def busy(self) -> bool:
        """Whether a job has not ended yet."""
        return self._last is not None and self._process == os.getpid() and not self._last.done()

    def close(self) -> None:
        """End the thread after the jobs it has; a later ``submit`` starts a new one."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True)

    def _post(self, ticket: Ticket, job: Callable[..., Any], args: tuple) -> None:
        pool = self._pool
        if pool is None or self._process != os.getpid():
            # A forked child inherits the pool, but not its thread.
            pool, self._setting = ThreadPoolExecutor(1, "scout-cpu"), _Setting(self.threads)
            self._pool, self._process = pool, os.getpid()
        setting = self._setting
        try:
            # Nothing of self: its thread would keep it, and so itself, for ever.
            pool.submit(_run, ticket._future, ticket._ran, setting, setting.default(), job, args)
        except RuntimeError as error:
            if "futures after shutdown" not in str(error):
                raise
            # Its thread has ended: another thread closed it, or the interpreter ends, which a new pool will tell.
            if self._pool is pool:
                self._pool = None
            self._post(ticket, job, args)

    def __deepcopy__(self, memo: dict) -> Workers:
        return Workers(self.threads, self.needed)

    def __reduce__(self):
        return Workers, (self.threads, self.needed)


class _Setting:
    """Torch's number of threads in the one thread of a pool, taken by its first job."""

    def __init__(self, own: int | None):
        self.own, self.taken = own, own is None

    def default(self) -> int | None:
        """In the thread that submits: what is to be put back for all others."""
        return None if self.taken else torch.get_num_threads()

    def take(self, default: int) -> None:
        """In the pool's thread."""
        put_back = threading.Thread(target=torch.set_num_threads, args=(default,))
        try:
            torch.set_num_threads(self.own)
            # That also became the default of all threads that begin later: this one takes it by asking, then any other
            # thread puts it back.
            torch.get_num_threads()
            put_back.start()
            put_back.join()
        except BaseException as error:
            torch.set_num_threads(default)
            if isinstance(error, RuntimeError):
                raise _no_thread(error) from error
            raise
        self.taken = True


def _no_thread(error: RuntimeError) -> ThreadStartError:
    return ThreadStartError(
        f"the system started no thread for work in the background ({error}); limits such as `ulimit -u` and those of a "
        "container count threads: raise them or end some, then try again"
    )


def _run(future: Future, ran: list[int], setting: _Setting | None, default: int | None, job: Any, args: tuple) -> None:
    if not future.set_running_or_notify_cancel():
        return
    ran.append(time.perf_counter_ns())
    try:
        if setting is not None and not setting.taken:
            setting.take(default)
        result = _bare(job, args)
    except BaseException as error:
        ran.append(time.perf_counter_ns())
        future.set_exception(error)
        future = None  # else the error would hold itself, by its traceback
    else:
        ran.append(time.perf_counter_ns())
        future.set_result(result)


def _bare(job: Callable[..., Any], args: tuple) -> Any:
    # Grad mode and autocast are per thread: without this a job would differ from the thread that submitted it.
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return job(*args)
