"""A Python thread for jobs that the native pool cannot run: torch's, and transfers to another device."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch

from scout_hf.errors import ThreadStartError

T = TypeVar("T")


class WorkerTicket(Generic[T]):
    """A submitted job; ``wait`` joins it and gives its result or raises its error."""

    def __init__(self, future: Future[T], ran: list[int]):
        self.future, self.ran = future, ran

    def wait(self) -> T:
        """The job's result; blocks until it is there."""
        return self.future.result()

    def drain(self) -> bool:
        """Block until the job has ended, whatever came of it; whether it did so without an error."""
        return self.future.exception() is None

    def done(self) -> bool:
        """Whether the job has ended."""
        return self.future.done()

    def times(self) -> tuple[int, int] | None:
        """When the job began and ended, ns of ``time.perf_counter_ns``; None until it has."""
        return (self.ran[0], self.ran[1]) if len(self.ran) == 2 else None


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
        self._setting = _Setting(threads)
        self._process = 0
        self._last: WorkerTicket[Any] | None = None

    def submit(self, job: Callable[..., T], *args: Any) -> WorkerTicket[T]:
        """Start ``job(*args)`` in the background, without gradients and without autocast.

        While the interpreter ends, when no thread can be had, it runs here.

        Raises
        ------
        ThreadStartError
            If the system gives no thread; the next call tries again. ``WorkerTicket.wait`` may raise it as well.
        """
        ticket = self.offer(job, *args)
        if ticket is None:
            ticket = WorkerTicket(Future(), [])
            with torch.inference_mode(False):  # as in a thread of its own
                _run(ticket.future, ticket.ran, None, None, job, args)
            self._last = ticket
        return ticket

    def offer(self, job: Callable[..., T], *args: Any) -> WorkerTicket[T] | None:
        """As :meth:`submit`, but None while the interpreter ends and no thread can be had."""
        ticket: WorkerTicket[T] = WorkerTicket(Future(), [])
        try:
            self._post(ticket, job, args)
        except RuntimeError as error:
            # The pool may have the job all the same, for a thread that starts later: not if it is cancelled by then.
            if ticket.future.cancel():
                if "start new thread" in str(error):
                    raise _no_thread(error) from error
                if "interpreter shutdown" not in str(error):
                    raise
                return None
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

    def _post(self, ticket: WorkerTicket[Any], job: Callable[..., Any], args: tuple[Any, ...]) -> None:
        pool = self._pool
        if pool is None or self._process != os.getpid():
            # A forked child inherits the pool, but not its thread.
            pool, self._setting = ThreadPoolExecutor(1, "scout-cpu"), _Setting(self.threads)
            self._pool, self._process = pool, os.getpid()
        setting = self._setting
        try:
            # Nothing of self: its thread would keep it, and so itself, for ever.
            pool.submit(_run, ticket.future, ticket.ran, setting, setting.default(), job, args)
        except RuntimeError as error:
            if "futures after shutdown" not in str(error):
                raise
            # Its thread has ended: another thread closed it, or the interpreter ends, which a new pool will tell.
            if self._pool is pool:
                self._pool = None
            self._post(ticket, job, args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Workers:
        return Workers(self.threads)

    def __reduce__(self) -> tuple[Any, ...]:
        return Workers, (self.threads,)


class _Setting:
    """Torch's number of threads in the one thread of a pool, taken by its first job."""

    def __init__(self, own: int | None):
        self.own, self.taken = own, own is None

    def default(self) -> int | None:
        """In the thread that submits: what is to be put back for all others."""
        return None if self.taken else torch.get_num_threads()

    def take(self, default: int) -> None:
        """In the pool's thread."""
        if self.own is None:
            return
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


def _run(
    future: Future[Any],
    ran: list[int],
    setting: _Setting | None,
    default: int | None,
    job: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    if not future.set_running_or_notify_cancel():
        return
    ran.append(time.perf_counter_ns())
    try:
        if setting is not None and default is not None and not setting.taken:
            setting.take(default)
        result = _bare(job, args)
    except BaseException as error:
        ran.append(time.perf_counter_ns())
        future.set_exception(error)
        del future  # else the error would hold itself, by its traceback
    else:
        ran.append(time.perf_counter_ns())
        future.set_result(result)


def _bare(job: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    # Grad mode and autocast are per thread: without this a job would differ from the thread that submitted it.
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return job(*args)
