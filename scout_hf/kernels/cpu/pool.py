"""The native thread pool for background CPU attention; the main thread submits and joins jobs.

The threads never take the GIL. The C++ side and its rules are in ``native/pool.h``.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
import weakref
from collections.abc import Callable
from ctypes import c_int, c_int64, c_uint64, c_void_p
from types import SimpleNamespace
from typing import Any

from scout_hf.errors import CacheStateError, ConfigError
from scout_hf.kernels.cpu.topology import spare_workers, usable_cpus, worker_cpus

# Longest native wait: signal handlers (Ctrl-C) run between waits.
_SLICE_US = 50_000


class CopyArgs(ctypes.Structure):
    """``scout_copy_args``: copies between addresses that do not overlap.

    Fields
    ------
    sources, targets : address of ``count`` int64 addresses
    count : int
    bytes : int
        Length of every copy.
    """

    _fields_ = [("sources", c_void_p), ("targets", c_void_p), ("count", c_int64), ("bytes", c_int64)]


_SIGNATURES = {
    "scout_pool_create": (c_void_p, [c_int, c_void_p, c_int, c_int]),
    "scout_pool_stop": (None, [c_void_p]),
    "scout_pool_destroy": (None, [c_void_p]),
    "scout_pool_wait": (c_int, [c_void_p, c_int64, c_int64]),
    "scout_pool_done": (c_int, [c_void_p, c_int64]),
    "scout_pool_workers": (c_int, [c_void_p]),
    "scout_pool_create_background": (c_void_p, [c_void_p, c_int]),
    "scout_pool_cpu_ns": (c_int64, [c_void_p]),
    "scout_pool_times": (c_int, [c_void_p, c_int64, c_void_p]),
}


def bind(library: ctypes.CDLL) -> None:
    """Declare the pool's functions of the library to ctypes."""
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


def quick(library: ctypes.CDLL, name: str, *arguments: Any) -> Callable[..., int]:
    """A function of the library that keeps the GIL during the call, since releasing it takes longer than the call.

    Submit functions (``int64 entry(pool, args, flag, value)``) can be passed to ``NativePool.submit``; ``arguments``
    are the types of others.
    """
    function = getattr(ctypes.PyDLL(library._name, handle=library._handle), name)
    default = (c_int64, list(arguments) or [c_void_p, c_void_p, c_void_p, c_uint64])
    function.restype, function.argtypes = _SIGNATURES.get(name, default)
    return function


class PoolTicket:
    """A submitted job; ``wait`` joins it and returns its result. One thread at a time may join it.

    Numbers of jobs mean the same to all tickets of the same ``threads``. ``held`` is the memory that the job uses.
    """

    def __init__(self, threads: _Threads, held: Any, result: Any):
        self.number = 0  # until the job is submitted
        self.threads = threads
        self.held = held
        self._result, self._call = result, callable(result)

    def wait(self) -> Any:
        """Block until the job has ended, and return its result. If the pool has no threads, the job runs in this call.

        Raises
        ------
        CacheStateError
            If the pool was closed before the job started, or the process has forked since the submit.
        """
        if self._join() < 0:
            raise CacheStateError(
                f"job {self.number} of the native pool was never run: the pool was closed while a job waited for its "
                "flag, or the process forked while it was running. Submit it again"
            )
        if self._call:
            self._result, self._call = self._result(), False
        return self._result

    def drain(self) -> bool:
        """Block until the job has ended or was dropped; returns whether it ran."""
        return self._join() > 0

    def done(self) -> bool:
        """Whether the job has ended. If the pool has no threads, it runs only in ``wait``."""
        return self.threads.outcome(self.number) != 0

    def times(self) -> tuple[int, int] | None:
        """When the job began and ended, ns of the steady clock (``time.perf_counter_ns`` on Linux); None if unknown."""
        found = (c_int64 * 2)()
        known = self.threads.library.scout_pool_times(self.threads.handle, self.number, found)
        return (found[0], found[1]) if known else None

    def of(self, number: int) -> PoolTicket:
        """A ticket of another job of the same threads, whose memory this one keeps alive."""
        other = PoolTicket(self.threads, None, None)
        other.number = number
        return other

    def _join(self) -> int:
        threads = self.threads
        outcome = threads.outcome(self.number)
        while outcome == 0:
            outcome = threads.library.scout_pool_wait(threads.handle, self.number, _SLICE_US)
        threads.release()
        return outcome


class NativePool:
    """A pool of native threads, started at the first job; ended by ``close``, with the last reference, or at exit.

    Parameters
    ----------
    library : CDLL
        The native library.
    threads : int or None
        Most threads to start; None for one per spare CPU. Never more than the usable CPUs less one for the main thread;
        if that is none, jobs run on the thread that waits for them.
    spin_us : int
        Microseconds to spin before sleeping: workers after a job, waiting threads for its end.
    background : bool
        Use one thread of lowest priority instead, which never spins.

    Raises
    ------
    ConfigError
        If ``spin_us`` or ``threads`` is negative.
    """

    def __init__(self, library: ctypes.CDLL, threads: int | None = None, spin_us: int = 100, background: bool = False):
        if spin_us < 0:
            raise ConfigError(f"spin_us={spin_us} is not allowed: take 0 or more microseconds; try 100")
        if threads is not None and threads < 0:
            raise ConfigError(f"threads={threads} is not allowed: take 0 or more, or None for one per spare CPU")
        self.library, self.threads, self.spin_us, self.background = library, threads, spin_us, background
        self._running: _Threads | None = None
        bind(library)

    def submit(
        self,
        entry: Callable[..., int],
        args: ctypes.Structure | ctypes.Array[Any],
        keep: Any = (),
        flag: int | None = None,
        value: int = 0,
        result: Any = None,
        before: Callable[[PoolTicket], None] | None = None,
    ) -> PoolTicket:
        """Start a background job, after those submitted before.

        Parameters
        ----------
        entry : function of the library
            Posts the job and returns its number, see :func:`quick`.
        args : Structure or Array
            Arguments of the job, or of several; kept alive until it has ended.
        keep
            Objects whose memory the job uses; kept alive until it has ended.
        flag : int or None
            Address of a 64-bit word; this job and all later ones wait until the word is at least ``value``.
        value : int
        result
            Result of ``PoolTicket.wait``; a callable is called at the first wait.
        before : callable or None
            Gets the ticket before the job is submitted, when it has no number yet.

        Returns
        -------
        PoolTicket

        Raises
        ------
        ConfigError
            If ``flag`` is not the address of a 64-bit word, or ``value`` is out of range.
        CacheStateError
            If the library refuses the job.
        """
        if flag is not None and (flag <= 0 or flag % 8 or not 0 <= value < 1 << 64):
            raise ConfigError(
                f"flag={flag}, value={value} is not allowed: flag must be the address of a 64-bit word (a multiple of "
                "8), and value an unsigned 64-bit number; pass flag=None for a job that need not wait"
            )
        threads = self._running
        if threads is None or threads.process != os.getpid():
            threads = self._start()
        threads.release()
        ticket = PoolTicket(threads, (args, keep), result)
        # Before the submit: an interrupt right after it must not free memory that the job uses.
        threads.tickets[ticket] = None
        if before is not None:
            before(ticket)
        number = entry(threads.handle, ctypes.byref(args), flag, value)
        if number <= 0:
            threads.tickets.pop(ticket, None)
            raise CacheStateError(
                f"the native pool did not take a job (status {number}): another thread closed it, memory is short, or "
                "the arguments are invalid; submit it again"
            )
        ticket.number = number
        return ticket

    def has_threads(self) -> bool:
        """Whether there are spare CPUs for pool threads."""
        return self._free_cores() != 0

    @property
    def cpu_ms(self) -> float:
        """CPU time in ms that the thread of a background pool has spent on jobs; 0 for other pools."""
        threads = self._running
        return 0.0 if threads is None else self.library.scout_pool_cpu_ns(threads.handle) / 1e6

    def close(self) -> None:
        """End the threads after the submitted jobs; a later ``submit`` starts new ones.

        A job whose flag is not set is dropped, and so are all later jobs.
        """
        threads, self._running = self._running, None
        if threads is not None:
            threads.stop()

    def __deepcopy__(self, memo: dict[int, Any]) -> NativePool:
        return NativePool(self.library, self.threads, self.spin_us, self.background)

    def __reduce__(self) -> tuple[Any, ...]:
        return _load, (self.library._name, self.threads, self.spin_us, self.background)

    def _start(self) -> _Threads:
        with _starting.lock:
            threads = self._running
            if threads is None or threads.process != os.getpid():
                # A forked child inherits the pool, but not its threads.
                threads = self._running = _Threads(self.library, self._free_cores(), self.spin_us)
            return threads

    def _free_cores(self) -> int | None:
        return None if self.background else spare_workers(self.threads)


class _Threads:
    """One native pool in one process, and the tickets of jobs that may still run.

    The native pool is freed with the last reference, so that no call uses freed memory; ``stop`` ends its threads.
    """

    def __init__(self, library: ctypes.CDLL, workers: int | None, spin_us: int):
        cpus = worker_cpus(workers)
        if cpus == usable_cpus():
            cpus = ()  # inherited
        self.library = library
        self.process = os.getpid()
        self.tickets: dict[PoolTicket, None] = {}
        self._done = quick(library, "scout_pool_done")
        places = ((c_int * len(cpus))(*cpus), len(cpus))
        self.handle: int | None
        if workers is None:
            self.handle = library.scout_pool_create_background(*places)
        else:
            # Without workers the waiting thread polls the flag; it must not spin on a core that the setter may need.
            self.handle = library.scout_pool_create(workers, *places, spin_us if workers else 0)
        if not self.handle:
            raise MemoryError("no memory for the native thread pool; free memory and try again")
        # Not at exit: other threads may still be in a native wait. The pool is stopped then, not freed.
        weakref.finalize(self, _free, library, self.handle, self.process).atexit = False
        _all.add(self)

    def outcome(self, number: int) -> int:
        """1: the job ran; -1: it was dropped; 0: not ended yet."""
        outcome = self._done(self.handle, number)
        return -1 if outcome == 0 and self.process != os.getpid() else outcome

    def release(self) -> None:
        """Drop the references to jobs that have ended."""
        try:
            tickets = tuple(self.tickets)
        except RuntimeError:
            return  # another thread has added a ticket; the next call releases them
        for ticket in tickets:
            if ticket.number:  # 0: being submitted, or lost to an interrupt
                if self.outcome(ticket.number) == 0:
                    break
                self.tickets.pop(ticket, None)
                ticket.held = None

    def stop(self) -> None:
        """Run the jobs that can run, drop the rest, end the threads."""
        if self.process == os.getpid():
            self.library.scout_pool_stop(self.handle)
            while self.tickets:
                self.tickets.popitem()[0].held = None
        self.tickets.clear()


_all: weakref.WeakSet[_Threads] = weakref.WeakSet()
_starting = SimpleNamespace(lock=threading.Lock())


def _free(library: ctypes.CDLL, handle: int, process: int) -> None:
    if process == os.getpid():
        library.scout_pool_destroy(handle)


def _load(path: str, threads: int | None, spin_us: int, background: bool) -> NativePool:
    return NativePool(ctypes.CDLL(path), threads, spin_us, background)


@atexit.register
def _stop_all() -> None:
    for each in tuple(_all):
        each.stop()


def _after_fork() -> None:
    _starting.lock = threading.Lock()  # a thread of the parent may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
