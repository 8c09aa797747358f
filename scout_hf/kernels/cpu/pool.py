"""The native threads that compute the CPU's share ahead: jobs are submitted and joined on the main thread.

No Python thread takes part, so there is no GIL to wait for. The C++ side and its rules are in ``native/pool.h``.
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

# Signal handlers run between native waits: Ctrl-C is noticed after this long at most.
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


def quick(library: ctypes.CDLL, name: str) -> Callable[..., int]:
    """A function of the library that is called without giving up the GIL, which would take longer than the call.

    Submit functions (``int64 entry(pool, args, flag, value)``) come ready for ``NativePool.submit``.
    """
    function = getattr(ctypes.PyDLL(library._name, handle=library._handle), name)
    default = (c_int64, [c_void_p, c_void_p, c_void_p, c_uint64])
    function.restype, function.argtypes = _SIGNATURES.get(name, default)
    return function


class PoolTicket:
    """A submitted job; ``wait`` joins it and gives its result. To be joined by one thread at a time."""

    def __init__(self, threads: _Threads, held: Any, result: Any):
        self.number = 0  # until the job is submitted
        self._threads = threads
        self._held = held
        self._result, self._call = result, callable(result)

    def wait(self) -> Any:
        """The job's result; blocks until it is there. Where the pool has no threads, the job runs here.

        Raises
        ------
        CacheStateError
            If the pool was closed before the job could begin, or if this is a fork of the process that submitted it.
        """
        if self._join() < 0:
            raise CacheStateError(
                f"job {self.number} of the native pool was never run: the pool was closed while a job waited for its "
                "flag, or the process forked while it was running. Submit it again."
            )
        if self._call:
            self._result, self._call = self._result(), False
        return self._result

    def drain(self) -> bool:
        """Block until the job has ended, whatever came of it; whether it ran."""
        return self._join() > 0

    def done(self) -> bool:
        """Whether the job has ended. Where the pool has no threads, only a wait makes that happen."""
        return self._threads.outcome(self.number) != 0

    def times(self) -> tuple[int, int] | None:
        """When the job began and ended, ns of the steady clock (``time.perf_counter_ns`` on Linux); None if unknown."""
        found = (c_int64 * 2)()
        known = self._threads.library.scout_pool_times(self._threads.handle, self.number, found)
        return (found[0], found[1]) if known else None

    def let_go(self) -> None:
        """Forget what the job needed: it has ended."""
        self._held = None

    def _join(self) -> int:
        threads = self._threads
        outcome = threads.outcome(self.number)
        while outcome == 0:
            outcome = threads.library.scout_pool_wait(threads.handle, self.number, _SLICE_US)
        threads.release()
        return outcome


class NativePool:
    """Native threads, started at the first job and ended by ``close``, with the last reference, or with the process.

    Parameters
    ----------
    library : CDLL
        The native library.
    threads : int or None
        The most threads to start; None for all that there is room for. Never more than the machine has room for beside
        the main thread; where that is none, jobs run on the thread that waits for them.
    spin_us : int
        Microseconds that the threads stay awake after a job, and that a waiting thread stays awake for its end.
    background : bool
        One thread of the lowest priority instead, which takes the time that all others leave and never spins.
    """

    def __init__(self, library: ctypes.CDLL, threads: int | None = None, spin_us: int = 100, background: bool = False):
        if spin_us < 0:
            raise ConfigError(f"spin_us={spin_us} is not allowed: take 0 or more microseconds; 100 is a layer's gap")
        if threads is not None and threads < 0:
            raise ConfigError(f"threads={threads} is not allowed: take 0 or more, or None for all there is room for")
        self.library, self.threads, self.spin_us, self.background = library, threads, spin_us, background
        self._running: _Threads | None = None
        bind(library)

    def submit(
        self,
        entry: Callable[..., int],
        args: ctypes.Structure,
        keep: Any = (),
        flag: int | None = None,
        value: int = 0,
        result: Any = None,
    ) -> PoolTicket:
        """Start a job in the background, behind those submitted before.

        Parameters
        ----------
        entry : function of the library
            Posts the job and returns its number, see :func:`quick`.
        args : Structure
            The job's own arguments; kept until it has ended.
        keep
            Objects whose memory the job reads or writes; kept until it has ended.
        flag : int or None
            Address of a 64-bit word; the job, and all behind it, waits until the word is ``value`` or greater.
        value : int
        result
            What ``PoolTicket.wait`` returns; if it can be called, what it returns when it is, at the first wait.

        Raises
        ------
        ConfigError
            For a flag that cannot be the address of a word, or a value that the word cannot reach.
        CacheStateError
            If the library refuses the job.
        """
        if flag is not None and (flag <= 0 or flag % 8 or not 0 <= value < 1 << 64):
            raise ConfigError(
                f"flag={flag}, value={value} is not allowed: flag must be the address of a 64-bit word, a multiple of "
                "8, and value a number that the word can reach; pass flag=None for a job that need not wait"
            )
        threads = self._running
        if threads is None or threads.process != os.getpid():
            threads = self._start()
        threads.release()
        ticket = PoolTicket(threads, (args, keep), result)
        # Before the job exists: an interrupt right after the call must not free memory that the job uses.
        threads.tickets[ticket] = None
        number = entry(threads.handle, ctypes.byref(args), flag, value)
        if number <= 0:
            threads.tickets.pop(ticket, None)
            raise CacheStateError(
                f"the native pool did not take a job (status {number}): it was closed by another thread, memory is "
                "short, or the arguments are wrong"
            )
        ticket.number = number
        return ticket

    def has_threads(self) -> bool:
        """Whether there is room for threads beside the main one."""
        return self._room() != 0

    @property
    def cpu_ms(self) -> float:
        """CPU time that the running thread of a background pool has spent on jobs; 0 for other pools."""
        threads = self._running
        return 0.0 if threads is None else self.library.scout_pool_cpu_ns(threads.handle) / 1e6

    def close(self) -> None:
        """End the threads after the jobs they have; a later ``submit`` starts new ones.

        Jobs that would still have to wait for a flag are dropped, and those behind them.
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
                threads = self._running = _Threads(self.library, self._room(), self.spin_us)
            return threads

    def _room(self) -> int | None:
        return None if self.background else spare_workers(self.threads)


class _Threads:
    """The threads of one native pool, in one process, and the tickets of jobs that may still run.

    The native pool is freed with the last reference, so that a call on it never meets freed memory; ``stop`` ends the
    threads before.
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
            # Without threads the waiting one looks for the flag itself, on a core that the one to raise it may need.
            self.handle = library.scout_pool_create(workers, *places, spin_us if workers else 0)
        if not self.handle:
            raise MemoryError("no memory for the native pool")
        # At exit there may still be threads in a native wait: the pool is then stopped, not freed.
        weakref.finalize(self, _free, library, self.handle, self.process).atexit = False
        _all.add(self)

    def outcome(self, number: int) -> int:
        """1: the job ran, -1: it never will, 0: neither yet."""
        outcome = self._done(self.handle, number)
        return -1 if outcome == 0 and self.process != os.getpid() else outcome

    def release(self) -> None:
        """Let go of the jobs that have ended."""
        try:
            tickets = tuple(self.tickets)
        except RuntimeError:
            return  # another thread put one in meanwhile; the next call lets go of what this one did not
        for ticket in tickets:
            if ticket.number:  # 0: on its way in, or lost to an interrupt
                if self.outcome(ticket.number) == 0:
                    break
                self.tickets.pop(ticket, None)
                ticket.let_go()

    def stop(self) -> None:
        """Run what can run, drop the rest, end the threads."""
        if self.process == os.getpid():
            self.library.scout_pool_stop(self.handle)
            while self.tickets:
                self.tickets.popitem()[0].let_go()
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
    _starting.lock = threading.Lock()  # another thread of the parent may have had it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
