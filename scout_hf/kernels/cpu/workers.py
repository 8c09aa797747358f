"""A Python worker thread for jobs that the native pool cannot run: torch operations and device transfers."""

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
    """A submitted job; ``wait`` joins it and returns its result or raises its error."""

    def __init__(self, future: Future[T], ran: list[int]):
        self.future, self.ran = future, ran

    def wait(self) -> T:
        """Block until the job has ended, and return its result."""
        return self.future.result()

    def drain(self) -> bool:
        """Block until the job has ended; returns whether it succeeded."""
        return self.future.exception() is None

    def done(self) -> bool:
        """Whether the job has ended."""
        return self.future.done()

    def times(self) -> tuple[int, int] | None:
        """When the job began and ended, in ns of ``time.perf_counter_ns``; None until it has ended."""
        return (self.ran[0], self.ran[1]) if len(self.ran) == 2 else None


class Workers:
    """One worker thread, started at the first job; ended by ``close`` or at exit.

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

        During interpreter shutdown, when no thread can start, the job runs in this call.

        Returns
        -------
        WorkerTicket

        Raises
        ------
        ThreadStartError
            If the system cannot start a thread; a later call tries again. ``WorkerTicket.wait`` may raise it too.
        """
        ticket = self.offer(job, *args)
        if ticket is None:
            ticket = WorkerTicket(Future(), [])
            with torch.inference_mode(False):  # as in a thread of its own
                _run(ticket.future, ticket.ran, None, None, job, args)
            self._last = ticket
        return ticket

    def offer(self, job: Callable[..., T], *args: Any) -> WorkerTicket[T] | None:
        """As :meth:`submit`, but None during interpreter shutdown, when no thread can start."""
        ticket: WorkerTicket[T] = WorkerTicket(Future(), [])
        try:
            self._post(ticket, job, args)
        except RuntimeError as error:
            # The pool may have queued the job before the error; cancelled, it will not run later.
            if ticket.future.cancel():
                if "start new thread" in str(error):
                    raise _no_thread(error) from error
                if "interpreter shutdown" not in str(error):
                    raise
                return None
        # Return the local ticket, not self._last: another thread may submit in between.
        self._last = ticket
        return ticket

    def busy(self) -> bool:
        """Whether a job has not ended yet."""
        return self._last is not None and self._process == os.getpid() and not self._last.done()

    def close(self) -> None:
        """End the thread after the submitted jobs; a later ``submit`` starts a new one."""
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
        default = None if setting.taken else setting.default()
        try:
            # Pass no reference to self: the thread would keep it, and so itself, alive.
            pool.submit(_run, ticket.future, ticket.ran, setting, default, job, args)
        except RuntimeError as error:
            if "futures after shutdown" not in str(error):
                raise
            # Another thread closed the pool, or the interpreter shuts down, in which case a new pool raises too.
            if self._pool is pool:
                self._pool = None
            self._post(ticket, job, args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Workers:
        return Workers(self.threads)

    def __reduce__(self) -> tuple[Any, ...]:
        return Workers, (self.threads,)


class _Setting:
    """Torch's intra-op thread count for the worker thread, set by its first job."""

    def __init__(self, own: int | None):
        self.own, self.taken = own, own is None

    def default(self) -> int | None:
        """Called in the submitting thread until it is set: the process default to restore afterwards."""
        return torch.get_num_threads()

    def take(self, default: int) -> None:
        """Called in the worker thread: set its own count, then restore the process default."""
        if self.own is None:
            return
        put_back = threading.Thread(target=torch.set_num_threads, args=(default,))
        try:
            torch.set_num_threads(self.own)
            # This also changes the default of threads that start later. The current thread adopts the value on the next
            # call; then any other thread restores the default.
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
        f"the system started no thread for background work ({error}); `ulimit -u` and container limits count threads: "
        "raise them or end some threads, then try again"
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
        del future  # else a reference cycle through the traceback
    else:
        ran.append(time.perf_counter_ns())
        future.set_result(result)


def _bare(job: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    # Grad mode and autocast are per thread: without this a job would differ from the thread that submitted it.
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return job(*args)
