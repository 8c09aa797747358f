"""Hand-over by words in memory: what a post writes and in which order, and how long a wait waits."""

from __future__ import annotations

import threading
import time

import pytest
import torch

pytest.importorskip("triton")

from scout_hf.kernels.triton.flags import post, wait  # noqa: E402
from tests.triton.grid import ON_GPU, draw  # noqa: E402


def word(value=0):
    """In memory that host and device share."""
    return torch.tensor([value], dtype=torch.int64, device="cpu", pin_memory=ON_GPU)


def number(value):
    return torch.tensor([value], dtype=torch.int64)


def settle():
    if ON_GPU:
        torch.cuda.synchronize()


@pytest.mark.parametrize("heads", [7, 137], ids=["at once", "in two rounds"])
def test_a_post_copies_first_and_raises_the_flag_then(heads):
    query = draw(0, 3, heads, 1, 80, dtype=torch.bfloat16)
    into, flag, posted = torch.full(query.shape, torch.nan, dtype=query.dtype, device="cpu"), word(3), number(4)
    into = into.pin_memory() if ON_GPU else into
    post(query, into, flag, posted)
    settle()
    assert torch.equal(into, query.cpu()) and int(flag) == int(posted) == 5


def test_a_wait_ends_when_the_word_is_there_or_beyond():
    late = word()
    for value in (5, 6):
        wait(word(value), number(5), late, turns=0)
        settle()
        assert int(late) == 0


def test_a_wait_sees_what_another_thread_writes():
    done, late = word(), word()

    def finish():
        time.sleep(0.05)
        done[0] = 3

    thread = threading.Thread(target=finish)
    thread.start()
    wait(done, number(3), late)
    settle()
    assert int(done) == 3 and int(late) == 0
    thread.join()


def test_a_wait_for_nobody_ends_and_says_so():
    late = word()
    wait(word(6), number(7), late, turns=3)
    settle()
    assert int(late) == 7
