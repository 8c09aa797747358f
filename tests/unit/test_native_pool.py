"""The native pool: order, flags, results, and what is left after forks, interrupts, closing and the process's end."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from pathlib import Path

import pytest

from scout_hf.errors import CacheStateError, ConfigError
from scout_hf.kernels.cpu import pool as pool_module
from scout_hf.kernels.cpu.pool import CopyArgs, NativePool, quick
from tests.unit.native_jobs import Words, copy_job, move

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "scout_hf" / "kernels" / "cpu"
SOURCES = [PACKAGE / "native" / "pool.cpp", PACKAGE / "native" / "pool.h"]
COMPILER = next((found for found in map(shutil.which, ("c++", "g++", "clang++")) if found), None)
TASKS = Path("/proc/self/task")


def compile_to(target, *options):
    if COMPILER is None:
        pytest.skip("there is no C++ compiler here and no built library")
    command = [COMPILER, "-std=c++17", "-O2", "-pthread", "-o", target, *options, SOURCES[0]]
    subprocess.run([str(word) for word in command], check=True)
    return target


@pytest.fixture(scope="session")
def library_path(tmp_path_factory):
    """The package's own library if it is built and up to date, else one for these tests."""
    newest = max(source.stat().st_mtime for source in SOURCES)
    for path in sorted([*PACKAGE.glob("_scout_cpu*.so"), *PACKAGE.glob("_scout_cpu*.dylib")]):
        if path.stat().st_mtime >= newest:
            return path
    return compile_to(tmp_path_factory.mktemp("native") / "pool.so", "-shared", "-fPIC", "-fvisibility=hidden")


@pytest.fixture(scope="session")
def library(library_path):
    return ctypes.CDLL(str(library_path))


@pytest.fixture(params=[1, 3, 0], ids=lambda n: f"{n}-workers")
def workers(request, monkeypatch):
    """As many workers whatever machine this is."""
    monkeypatch.setattr(pool_module, "spare_workers", lambda requested: request.param)
    return request.param


@pytest.fixture
def pool(library, workers):
    with_it = NativePool(library)
    yield with_it
    with_it.close()


def eventually(condition, seconds=60):
    """Wait for something that happens by itself, within what a busy machine may take."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)


def native_threads():
    """How many threads of pools there are in this process."""
    names = []
    for task in TASKS.iterdir():
        with contextlib.suppress(OSError):  # it ended in between
            names.append((task / "comm").read_text())
    return names.count("scout-cpu\n")


def assert_native_threads(number):
    # A thread gives itself its name, and leaves the list a moment after it was joined.
    eventually(lambda: native_threads() == number)


def run_python(code, library_path):
    """A separate process that has the code's names and a pool with one worker."""
    start = (
        "import atexit, ctypes, signal, threading\n"
        "atexit.register(lambda: at_the_very_end())\n"  # before the package's own, so that it is called after them
        "at_the_very_end = lambda: None\n"
        "from scout_hf.kernels.cpu import pool as pool_module\n"
        "from scout_hf.kernels.cpu.pool import NativePool\n"
        "from tests.unit.native_jobs import Words, copy_job, move\n"
        "pool_module.spare_workers = lambda requested: 1\n"
        f"pool = NativePool(ctypes.CDLL({str(library_path)!r}))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", start + code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# -- priority ----------------------------------------------------------------------------------------------------------


def priorities():
    """Nice values of the pools' threads in this process."""
    found = []
    for task in TASKS.iterdir():
        with contextlib.suppress(OSError):
            if (task / "comm").read_text() == "scout-cpu\n":
                found.append(os.getpriority(os.PRIO_PROCESS, int(task.name)))
    return sorted(found)


@pytest.mark.skipif(not TASKS.is_dir(), reason="threads cannot be listed here")
def test_a_background_pool_has_one_thread_of_the_lowest_priority(library, monkeypatch):
    monkeypatch.setattr(pool_module, "spare_workers", lambda requested: 2)
    others, before = priorities(), native_threads()  # models that other tests keep have pools too
    urgent, background = NativePool(library), NativePool(library, threads=5, background=True)
    words, own = Words(7, 0, 0), os.getpriority(os.PRIO_PROCESS, 0)
    move(urgent, words, 0, 1).wait()
    move(background, words, 0, 2).wait()
    assert words[1] == words[2] == 7
    assert_native_threads(before + 3)
    eventually(lambda: priorities() == sorted([*others, own, own, 19]))
    assert os.getpriority(os.PRIO_PROCESS, 0) == own
    urgent.close()
    background.close()
    assert_native_threads(before)


def test_a_background_pool_says_what_its_jobs_cost(library):
    pool, source = NativePool(library, background=True), ctypes.create_string_buffer(1 << 22)
    targets = [ctypes.create_string_buffer(1 << 22) for _ in range(4)]
    assert pool.cpu_ms == 0
    spent = []
    for _ in range(2):
        for target in targets:
            copy_job(pool, [ctypes.addressof(source)], [ctypes.addressof(target)], 1 << 22).wait()
        spent.append(pool.cpu_ms)
    assert 0 < spent[0] < spent[1]
    assert all(twin.background for twin in (copy.deepcopy(pool), pickle.loads(pickle.dumps(pool))))
    pool.close()
    urgent = NativePool(library)
    copy_job(urgent, [ctypes.addressof(source)], [ctypes.addressof(targets[0])], 1 << 22).wait()
    assert urgent.cpu_ms == 0
    urgent.close()


# -- jobs --------------------------------------------------------------------------------------------------------------


def test_copies_of_many_sizes(pool):
    for size in (1, 8, 1000, 128 * 1024, 400_001):
        count = max(1, min(300, 2_000_000 // size))
        source, target = os.urandom(size * count), ctypes.create_string_buffer(size * count)
        start = ctypes.cast(source, ctypes.c_void_p).value
        order = list(range(count))
        ticket = copy_job(
            pool,
            [start + size * i for i in reversed(order)],
            [ctypes.addressof(target) + size * i for i in order],
            size,
        )
        ticket.wait()
        parts = [source[size * i : size * (i + 1)] for i in reversed(order)]
        assert target.raw == b"".join(parts)


def test_nothing_to_copy(pool):
    assert copy_job(pool, [], [], result="nothing").wait() == "nothing"
    assert copy_job(pool, [0], [0], size=0, result="nothing").wait() == "nothing"


def test_jobs_run_in_the_order_of_submission(pool):
    words = Words(7, *[0] * 500)
    tickets = [move(pool, words, i, i + 1) for i in range(500)]
    assert [ticket.number for ticket in tickets] == list(range(1, 501))
    tickets[-1].wait()
    assert all(ticket.done() for ticket in tickets)
    assert list(words.array) == [7] * 501


def test_a_job_tells_when_it_ran(pool):
    words = Words(1, 0, 0)
    submitted = time.perf_counter_ns()
    first = move(pool, words, 0, 1)
    held = move(pool, words, 0, 1, flag=words.at(2), value=1)
    first.wait()
    begin, end = first.times()
    assert submitted <= begin <= end <= time.perf_counter_ns() and held.times() is None
    raised = time.perf_counter_ns()
    words[2] = 1
    held.wait()
    # Waiting for a flag is no part of it.
    assert raised <= held.times()[0]
    for _ in range(1030):
        move(pool, words, 0, 1).wait()
    assert first.times() is None  # forgotten


def test_a_job_that_never_ran_has_no_times(library, workers):
    pool = NativePool(library)
    words = Words(1, 0, 0)
    ticket = move(pool, words, 0, 1, flag=words.at(2), value=1)
    pool.close()
    assert not ticket.drain() and ticket.times() is None


def test_results_in_any_order_and_more_than_once(pool):
    words, calls = Words(5, 0), []

    def result():
        calls.append(threading.get_ident())
        return words[1]

    first = move(pool, words, 0, 1, result=result)
    second = move(pool, words, 0, 1, result="plain")
    assert second.wait() == "plain" and not calls
    assert first.wait() == 5 and first.wait() == 5
    assert calls == [threading.get_ident()]
    assert second.wait() == "plain" and first.drain() and second.done()


def test_a_result_that_can_be_called_is_handed_out_as_it_is(pool):
    inner = move(pool, Words(5, 0), 0, 1, result=lambda: print)
    assert inner.wait() is print and inner.wait() is print


def test_an_error_of_the_result_surfaces_at_the_wait(pool):
    ticket = move(pool, Words(5, 0), 0, 1, result=lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        ticket.wait()
    assert ticket.drain()


def test_many_submissions_while_jobs_run(pool):
    words = Words(*range(64))
    large = os.urandom(1 << 20), ctypes.create_string_buffer(1 << 20)
    spans = [ctypes.cast(large[0], ctypes.c_void_p).value], [ctypes.addressof(large[1])]
    for turn in range(50):
        tickets = [copy_job(pool, *spans, size=1 << 20, keep=large)]
        tickets += [move(pool, words, (turn + i) % 64, (turn + i + 1) % 64) for i in range(40)]
        assert tickets[turn % 41].drain()
    assert tickets[-1].drain() and large[1].raw == large[0]


def test_several_threads_submit_and_wait(pool):
    wrong = []

    def user(number):
        words = Words(number, *[0] * 100)
        tickets = [move(pool, words, i, i + 1) for i in range(100)]
        tickets[number * 10].wait()
        tickets[-1].wait()
        if list(words.array) != [number] * 101:
            wrong.append(number)

    users = [threading.Thread(target=user, args=(number,)) for number in range(1, 5)]
    for each in users:
        each.start()
    for each in users:
        each.join(60)
    assert not wrong and not any(each.is_alive() for each in users)


def test_tickets_that_change_while_they_are_looked_through(pool, monkeypatch):
    """Another thread may submit at any moment: what cannot be let go of now is let go of later."""

    class Changing(dict):
        def __iter__(self):
            raise RuntimeError("dictionary changed size during iteration")

    words = Words(7, 0, 0)
    move(pool, words, 0, 1).wait()
    threads = pool._running
    monkeypatch.setattr(threads, "tickets", Changing(threads.tickets))
    ticket = move(pool, words, 1, 2)
    ticket.wait()
    assert words[2] == 7 and len(threads.tickets) == 1
    monkeypatch.setattr(threads, "tickets", dict(threads.tickets.items()))
    threads.release()
    assert not threads.tickets
    monkeypatch.setattr(threads, "tickets", Changing())
    pool.close()


def test_sleeping_workers_wake_up(pool):
    words = Words(0, 0)
    for turn in range(20):
        words[0] = turn
        move(pool, words, 0, 1).wait()
        assert words[1] == turn
        time.sleep(0.003)  # far beyond the spin


# -- flags -------------------------------------------------------------------------------------------------------------


def test_a_job_waits_for_its_flag_and_later_ones_wait_behind(pool, workers):
    words = Words(5, 0, 0, 0)
    first = move(pool, words, 0, 1, flag=words.at(3), value=2)
    second = move(pool, words, 0, 2)
    for below in (0, 1):
        words[3] = below
        time.sleep(0.02)
        assert not first.done() and not second.done() and words[1] == words[2] == 0
    words[3] = 3  # beyond counts too
    if workers:
        eventually(second.done)
    second.wait()
    assert first.done() and words[1] == words[2] == 5


@pytest.mark.parametrize("delay", [0, 0.0002, 0.02])
def test_a_flag_raised_by_another_thread(pool, delay):
    words = Words(5, 0, 0)
    for turn in range(1, 11):
        ticket = move(pool, words, 0, 1, flag=words.at(2), value=turn)
        raiser = threading.Timer(delay, words.__setitem__, (2, turn))
        raiser.start()
        ticket.wait()
        assert words[2] == turn
        raiser.join()


def test_a_flag_that_is_up_already_holds_nothing_back(pool):
    words = Words(5, 0, 2**64 - 1)
    move(pool, words, 0, 1, flag=words.at(2), value=2**64 - 1).wait()
    move(pool, words, 0, 1, flag=words.at(1), value=0).wait()
    assert words[1] == 5


@pytest.mark.parametrize("flag, value", [(0, 1), (-8, 1), (12, 1), (64, -1), (64, 2**64)])
def test_impossible_flags_are_refused(library, flag, value):
    pool = NativePool(library)
    with pytest.raises(ConfigError, match=re.escape(f"flag={flag}, value={value}")):
        move(pool, Words(5, 0), 0, 1, flag=flag, value=value)


def test_two_threads_wait_for_different_jobs_of_a_pool_without_workers(library, monkeypatch):
    monkeypatch.setattr(pool_module, "spare_workers", lambda requested: 0)
    pool, words = NativePool(library), Words(5, 0, 0, 0)
    first, second = move(pool, words, 0, 1), move(pool, words, 0, 2, flag=words.at(3), value=1)
    waiter = threading.Thread(target=second.wait)
    waiter.start()
    first.wait()  # does not wait for the second one's flag
    assert waiter.is_alive() and not second.done()
    words[3] = 1
    waiter.join(60)
    assert second.done()


# -- closing -----------------------------------------------------------------------------------------------------------


def test_no_thread_before_the_first_job_and_none_after_close(library, workers):
    if not TASKS.exists():
        pytest.skip("threads cannot be counted here")
    before = native_threads()
    pool = NativePool(library)
    assert_native_threads(before)
    move(pool, Words(5, 0), 0, 1).wait()
    assert_native_threads(before + workers)
    pool.close()
    assert_native_threads(before)
    pool.close()
    words = Words(5, 0)
    move(pool, words, 0, 1).wait()
    assert words[1] == 5
    pool.close()
    assert_native_threads(before)


def test_workers_take_no_signals(library, workers):
    if not TASKS.exists() or not workers:
        pytest.skip("signal masks cannot be read here")
    before = set(TASKS.iterdir())
    pool = NativePool(library)
    move(pool, Words(5, 0), 0, 1).wait()
    masks = [
        int(re.search(r"^SigBlk:\s*(\w+)", (task / "status").read_text(), re.M)[1], 16)
        for task in set(TASKS.iterdir()) - before
    ]
    assert len(masks) == workers
    assert all(mask >> (number - 1) & 1 for mask in masks for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD))
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())  # and this thread still does
    pool.close()


def test_closing_runs_what_can_run(library, workers):
    pool, words = NativePool(library), Words(7, *[0] * 200)
    tickets = [move(pool, words, i, i + 1, result=i) for i in range(200)]
    pool.close()
    assert list(words.array) == [7] * 201
    assert [ticket.wait() for ticket in tickets] == list(range(200))


def test_closing_drops_a_job_whose_flag_never_comes_and_those_behind(library, workers):
    pool, words = NativePool(library), Words(5, 0, 0, 0, 0)
    runs = move(pool, words, 0, 1)
    waits = move(pool, words, 0, 2, flag=words.at(4), value=1)
    behind = move(pool, words, 0, 3)
    pool.close()
    assert list(words.array) == [5, 5, 0, 0, 0]
    assert runs.drain() and runs.wait() is None
    for ticket in (waits, behind):
        assert ticket.done() and not ticket.drain()
        with pytest.raises(CacheStateError, match="never run"):
            ticket.wait()
    assert move(pool, words, 0, 3).drain() and words[3] == 5
    pool.close()


def test_closing_lets_a_waiting_thread_out(library, workers):
    pool, words, outcome = NativePool(library), Words(5, 0, 0), []
    ticket = move(pool, words, 0, 1, flag=words.at(2), value=1)
    waiter = threading.Thread(target=lambda: outcome.append(ticket.drain()))
    waiter.start()
    time.sleep(0.02)
    assert waiter.is_alive()
    pool.close()
    waiter.join(60)
    assert outcome == [False]


def test_the_last_reference_ends_the_threads(library, workers):
    if not TASKS.exists():
        pytest.skip("threads cannot be counted here")
    before = native_threads()
    pool, words = NativePool(library), Words(5, 0, 0)
    ticket = move(pool, words, 0, 1)
    ticket.wait()
    del pool
    assert ticket.wait() is None  # a ticket keeps what it needs
    del ticket
    assert_native_threads(before)
    pool = NativePool(library)
    move(pool, words, 0, 1, flag=words.at(2), value=1)  # nobody holds the ticket
    del pool
    gc.collect()
    assert_native_threads(before)


def test_what_a_job_needs_lives_until_it_is_over(library, workers):
    pool, words = NativePool(library), Words(5, 0, 0)
    needed = Words(1)
    alive = weakref.ref(needed)
    move(pool, words, 0, 1, flag=words.at(2), value=1)  # in front
    lists = [(ctypes.c_int64 * 1)(words.at(0)), (ctypes.c_int64 * 1)(needed.at(0))]
    args = CopyArgs(*map(ctypes.addressof, lists), 1, 8)
    pool.submit(quick(library, "scout_submit_copy"), args, keep=(lists, needed))  # the ticket is forgotten
    del needed
    gc.collect()
    assert alive() is not None
    words[2] = 1
    move(pool, words, 0, 1).wait()
    gc.collect()
    assert alive() is None
    pool.close()


def test_a_ticket_that_was_waited_for_lets_go_of_what_it_needed(pool):
    words = Words(5, 0)
    ticket = copy_job(pool, [words.at(0)], [words.at(1)], keep=words)
    alive = weakref.ref(words)
    del words
    ticket.wait()
    gc.collect()
    assert alive() is None


def test_a_refused_job_is_an_error_and_leaves_nothing_behind(pool):
    words = Words(5, 0)
    with pytest.raises(CacheStateError, match="did not take"):
        copy_job(pool, [words.at(0)], [words.at(1)], size=-1)
    assert not pool._running.tickets
    move(pool, words, 0, 1).wait()
    assert words[1] == 5


@pytest.mark.parametrize("options", [{"threads": -1}, {"spin_us": -1}])
def test_impossible_settings_are_refused(library, options):
    with pytest.raises(ConfigError, match="-1 is not allowed"):
        NativePool(library, **options)


def test_copies_are_pools_of_their_own(library):
    pool, words = NativePool(library, threads=1, spin_us=7), Words(5, 0)
    move(pool, words, 0, 1).wait()
    for twin in (copy.deepcopy(pool), pickle.loads(pickle.dumps(pool))):
        assert (twin.threads, twin.spin_us) == (1, 7) and twin._running is None
        assert move(twin, words, 0, 1).drain()
        assert twin._running.handle != pool._running.handle
        twin.close()
    assert move(pool, words, 0, 1).drain()
    pool.close()


# -- processes ---------------------------------------------------------------------------------------------------------


def in_fork(check):
    """Whether ``check()`` is true in a forked child, which ends without the parent's clean-up."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork of a process with threads: what is tested here
        child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(60)
            status = 0 if check() else 1
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_has_threads_of_its_own_and_the_parent_continues(pool, workers):
    words = Words(5, 0, 0, 0)
    before = move(pool, words, 0, 1, result="before")
    assert before.drain()
    waits = move(pool, words, 0, 2, flag=words.at(3), value=1)
    others = [NativePool(pool.library)]
    assert move(others[0], words, 0, 1).drain()

    def child():
        assert before.wait() == "before"
        assert not waits.drain()  # of the parent: it never runs here
        with pytest.raises(CacheStateError, match="forked"):
            waits.wait()
        words[1] = 0
        assert move(pool, words, 0, 1).drain() and words[1] == 5
        if TASKS.exists():
            assert_native_threads(workers)
        pool.close()
        return True

    assert in_fork(child)
    assert in_fork(lambda: pool.close() is None)  # a child that only closes
    assert in_fork(lambda: others.clear() is None and gc.collect() >= 0)  # or drops the last reference
    assert not waits.done()
    words[3] = 1
    waits.wait()
    assert words[2] == 5 and move(pool, words, 0, 2).drain()


def test_the_interpreter_ends_cleanly_with_jobs_in_flight(library_path):
    code = (
        "words = Words(5, 0, 0)\n"
        "source = bytes(1 << 24); target = ctypes.create_string_buffer(1 << 24)\n"
        "spans = [ctypes.cast(source, ctypes.c_void_p).value], [ctypes.addressof(target)]\n"
        "for turn in range(10):\n"
        "    copy_job(pool, *spans, size=1 << 24, keep=(source, target))\n"
        "waits = move(pool, words, 0, 1, flag=words.at(2), value=1)\n"
        "threading.Thread(target=waits.drain, daemon=True).start()\n"
        "last = waits.number\n"
        "at_the_very_end = lambda: print('over', waits.done(), pool.library.scout_pool_done(handle, last - 1))\n"
        "handle = pool._running.handle\n"
        "print('end')\n"
    )
    for _ in range(3):
        process = run_python(code, library_path)
        output, errors = process.communicate(timeout=120)
        assert (process.returncode, output, errors) == (0, "end\nover True 1\n", "")


def test_an_interrupt_ends_a_wait_and_the_ticket_can_still_be_drained(library_path):
    code = (
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # shells let background jobs ignore it
        "words = Words(5, 0, 0)\n"
        "ticket = move(pool, words, 0, 1, flag=words.at(2), value=1)\n"
        "try:\n"
        "    print('waiting', flush=True)\n"
        "    ticket.wait()\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted', ticket.done())\n"
        "words[2] = 1\n"
        "print(ticket.drain(), words[1])\n"
    )
    process = run_python(code, library_path)
    assert process.stdout.readline() == "waiting\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (output, errors) == ("interrupted False\nTrue 5\n", "")


def test_under_stress(tmp_path):
    program = compile_to(tmp_path / "stress", f"-I{PACKAGE / 'native'}", ROOT / "tests" / "native" / "pool_stress.cpp")
    ran = subprocess.run([program, "1"], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
