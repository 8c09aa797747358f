"""The background thread: errors at the join, drains that do not raise, and the state of torch inside a job."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import threading
import time

import pytest
import torch

from scout_hf.errors import ThreadStartError
from scout_hf.kernels.cpu.workers import Workers
from tests.integration.disturbances import refuse_thread


@pytest.fixture
def workers():
    one = Workers()
    yield one
    one.close()


def fail(error):
    raise error


def test_a_result_comes_back_from_another_thread(workers):
    ticket = workers.submit(lambda a, b: (a + b, threading.get_ident()), 2, 3)
    total, thread = ticket.wait()
    assert total == 5 and thread != threading.get_ident()
    assert ticket.wait() == (total, thread) and ticket.done()


def test_a_job_tells_when_it_ran(workers):
    gate = threading.Event()
    submitted, ticket = time.perf_counter_ns(), workers.submit(gate.wait, 30)
    assert ticket.times() is None
    gate.set()
    ticket.wait()
    begin, end = ticket.times()
    assert submitted <= begin <= end <= time.perf_counter_ns()
    failed = workers.submit(fail, ValueError())
    assert not failed.drain() and len(failed.times()) == 2


def test_submitting_does_not_wait(workers):
    gate = threading.Event()
    ticket = workers.submit(gate.wait, 30)
    assert not ticket.done()
    gate.set()
    assert ticket.wait() is True and ticket.done()


def test_jobs_run_in_order_one_at_a_time(workers):
    seen = []
    tickets = [workers.submit(lambda i=i: (time.sleep(0.002 * (5 - i)), seen.append(i))) for i in range(5)]
    for ticket in tickets:
        ticket.wait()
    assert seen == [0, 1, 2, 3, 4]


def test_every_thread_gets_the_ticket_of_its_own_job(workers):
    """Letting go of a tensor lets other threads run."""
    interval, wrong = sys.getswitchinterval(), []
    sys.setswitchinterval(1e-6)

    def submit(number):
        for index in range(300):
            if int(workers.submit(torch.full, (1,), 1000 * number + index).wait()) != 1000 * number + index:
                wrong.append((number, index))

    try:
        callers = [threading.Thread(target=submit, args=(number,)) for number in range(4)]
        [caller.start() for caller in callers]
        [caller.join() for caller in callers]
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


@pytest.mark.parametrize(
    "error", [ValueError("bad block"), RuntimeError("no memory"), KeyboardInterrupt(), SystemExit(3)], ids=repr
)
def test_an_error_surfaces_where_the_job_is_joined_and_the_next_one_works(workers, error):
    ticket = workers.submit(fail, error)
    with pytest.raises(type(error)) as caught:
        ticket.wait()
    assert caught.value is error
    assert workers.submit(int, "7").wait() == 7


def test_a_drain_waits_and_never_raises(workers):
    done = []
    tickets = [
        workers.submit(fail, ValueError("dropped")),
        workers.submit(fail, KeyboardInterrupt()),
        workers.submit(lambda: (time.sleep(0.05), done.append(1))),
    ]
    for ticket in tickets:
        ticket.drain()
    assert done == [1] and all(ticket.done() for ticket in tickets)
    for ticket in tickets:
        ticket.drain()
    assert workers.submit(int, "7").wait() == 7


def test_a_drained_job_has_not_half_run(workers):
    gate, ran = threading.Event(), []
    first = workers.submit(gate.wait, 30)
    waiting = workers.submit(ran.append, 1)
    drain = threading.Thread(target=waiting.drain)
    drain.start()
    gate.set()
    drain.join(30)
    assert not drain.is_alive() and waiting.done()
    first.wait()
    before = list(ran)
    time.sleep(0.02)
    assert ran == before


def test_closing_ends_the_thread_after_its_jobs_and_submitting_starts_another(workers):
    before = threading.active_count()
    ran = []
    workers.submit(lambda: (time.sleep(0.03), ran.append(1)))
    assert threading.active_count() == before + 1
    workers.close()
    assert ran == [1] and threading.active_count() == before
    workers.close()
    assert workers.submit(int, "7").wait() == 7
    assert threading.active_count() == before + 1


@pytest.mark.parametrize("threads", [None, 1])
def test_the_thread_ends_with_its_owner(threads):
    before = threading.active_count()
    owner = Workers(threads)
    assert owner.submit(int, "7").wait() == 7 and threading.active_count() == before + 1
    del owner
    gc.collect()
    end = time.monotonic() + 20
    while threading.active_count() > before:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_copies_are_workers_of_their_own(workers):
    workers = Workers(2)
    workers.submit(int, "1").wait()
    for twin in (copy.deepcopy(workers), pickle.loads(pickle.dumps(workers))):
        assert twin.threads == 2 and twin is not workers
        assert twin.submit(threading.get_ident).wait() != workers.submit(threading.get_ident).wait()
        twin.close()
    assert workers.submit(int, "1").wait() == 1
    workers.close()


def state():
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


def test_no_gradients_and_no_autocast_inside_a_job(workers):
    with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert state() == (True, True, torch.bfloat16)
        assert workers.submit(state).wait() == (False, False, torch.float32)
    weight = torch.ones(3, requires_grad=True)
    assert not workers.submit(lambda: (weight * 2).requires_grad).wait()


def test_a_job_cannot_change_the_state_of_the_next(workers):
    workers.submit(torch.set_autocast_enabled, "cpu", True).wait()
    workers.submit(torch.set_grad_enabled, True).wait()
    assert workers.submit(state).wait() == (False, False, torch.float32)


def test_jobs_under_inference_mode_can_be_used_after_it(workers):
    with torch.inference_mode():
        result = workers.submit(lambda: torch.ones(3)).wait()
    assert not result.is_inference()


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_is_that_of_the_job_only(threads):
    before, workers = torch.get_num_threads(), Workers(threads)
    assert workers.submit(torch.get_num_threads).wait() == threads
    assert torch.get_num_threads() == before
    assert Workers().submit(torch.get_num_threads).wait() == before, "a thread that begins later is none of ours"
    assert workers.submit(torch.get_num_threads).wait() == threads
    workers.close()


def test_busy_until_the_last_job_has_ended(workers):
    gate = threading.Event()
    assert not workers.busy()
    workers.submit(gate.wait, 30)
    last = workers.submit(int, "7")
    assert workers.busy()
    gate.set()
    last.wait()
    assert not workers.busy()


# -- no thread can be had --------------------------------------------------------------------------------------------


def threads_of_a_new_thread():
    found = []
    other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    other.start()
    other.join()
    return found[0]


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.filterwarnings("error")
def test_a_thread_that_does_not_start_fails_one_job_and_the_next_starts_it(monkeypatch, number):
    """The first is the background thread, the second puts the number of threads back for all others."""
    before, own, ran = threads_of_a_new_thread(), 1 if torch.get_num_threads() > 1 else 2, []
    workers = Workers(own)
    refuse_thread(monkeypatch, number)
    with pytest.raises(ThreadStartError, match="no thread.*can't start new thread.*ulimit") as caught:
        workers.submit(ran.append, 1).wait()
    assert "start new thread" in str(caught.value.__cause__)
    assert threads_of_a_new_thread() == torch.get_num_threads() == before
    assert workers.submit(torch.get_num_threads).wait() == own
    assert threads_of_a_new_thread() == before
    assert not ran, "a job that failed to start ran after all"
    workers.close()


AT_EXIT = """
import sys, threading
import torch
from scout_hf.kernels.cpu.workers import Workers

def after():
    threading.main_thread().join()
    for workers in (fresh, used):
        with torch.inference_mode():
            ticket = workers.submit(lambda: (threading.current_thread().name, torch.ones(1).is_inference()))
            begin, end = ticket.times()
            assert ticket.done() and not workers.busy() and begin <= end
        print(ticket.wait())
        failed = workers.submit(int, "no number")
        assert not failed.drain()
        try:
            failed.wait()
        except ValueError:
            print("failed")
    print(Workers().offer(print, "not to be seen"))

fresh, used = Workers(1), Workers(1)
used.submit(int, "7").wait()
threading.Thread(target=after, name="late").start()
"""


def test_jobs_run_where_they_are_submitted_once_the_interpreter_ends():
    done = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True, timeout=120)
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout.split("\n") == [*(["('late', False)", "failed"] * 2), "None", ""]
