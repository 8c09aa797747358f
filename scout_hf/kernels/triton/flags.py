"""Synchronise a stream with CPU threads by flags in pinned memory, so that no Python thread waits.

The device writes a query, then a number into a flag that starts the CPU job. It polls the flag of the CPU until that
reaches the number, so later work on the stream begins when the job has ended. A wait that times out records it in
``late``, because a GPU that spins forever cannot be interrupted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from scout_hf.kernels.triton.launch import prepared
from scout_hf.kernels.triton.support import _INTERPRETED

# Each of 512 threads has 8 loads of 16 bytes on their way: the query of 8 rows of 32 heads of 128 channels at once.
POST_BYTES, POST_WARPS = 1 << 16, 16
# A read over the link takes about a microsecond, so this is some tens of seconds.
MOST_TURNS = 1 << 25


@triton.jit
def _release(word, value):
    """Store a word with system-wide release semantics, after all earlier writes of this program."""
    if _INTERPRETED:
        tl.store(word, value)
    else:
        tl.debug_barrier()
        tl.inline_asm_elementwise(
            # One thread's fence covers what all have written before the barrier.
            """{
            .reg .pred one; .reg .u32 thread;
            mov.u32 thread, %tid.x; setp.eq.u32 one, thread, 0;
            @one fence.acq_rel.sys;
            @one st.relaxed.sys.global.u64 [$1], $2;
            mov.u32 $0, 0;
            }""",
            "=r,l,l",
            [word.to(tl.int64), value.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _acquire(word):
    """Load a word that another device may write."""
    if _INTERPRETED:
        return tl.load(word, volatile=True)
    else:
        return tl.inline_asm_elementwise(
            "ld.acquire.sys.global.u64 $0, [$1];", "=l,l", [word.to(tl.int64)], dtype=tl.int64, is_pure=False, pack=1
        )


@prepared
@triton.jit
def _post(query, into, flag, number, size, STEP: tl.constexpr):
    value = tl.load(number) + 1
    for first in range(0, size, STEP):
        at = first + tl.arange(0, STEP)
        tl.store(into + at, tl.load(query + at, mask=at < size), mask=at < size)
    # All threads must read the number before one writes it.
    tl.debug_barrier()
    tl.store(number, value)
    _release(flag, value)


@prepared
@triton.jit
def _wait(number, word, late, turns):
    value = tl.load(number)
    seen = _acquire(word)
    turn = 0
    while (seen < value) & (turn < turns):
        seen = _acquire(word)
        turn += 1
    if seen < value:
        tl.store(late, value)


def post(query: torch.Tensor, into: torch.Tensor, flag: torch.Tensor, number: torch.Tensor) -> None:
    """Copy a query to the CPU and set the flag, in stream order.

    Parameters
    ----------
    query : Tensor (batch, query_heads, 1, head_dim), contiguous
    into : Tensor of the same shape and dtype
        In pinned host memory.
    flag : Tensor (1,) of int64
        In pinned host memory; set to the new ``number`` after all earlier writes of the stream.
    number : Tensor (1,) of int64
        On the device, so that a captured graph can count; incremented.

    Examples
    --------
    >>> query = torch.randn(1, 8, 1, 64, device="cuda")  # doctest: +SKIP
    >>> into = torch.empty(1, 8, 1, 64).pin_memory()  # doctest: +SKIP
    >>> flag = torch.zeros(1, dtype=torch.int64).pin_memory()  # doctest: +SKIP
    >>> number = torch.zeros(1, dtype=torch.int64, device="cuda")  # doctest: +SKIP
    >>> post(query, into, flag, number)  # doctest: +SKIP
    >>> torch.cuda.synchronize()  # doctest: +SKIP
    >>> int(flag), int(number), bool((into == query.cpu()).all())  # doctest: +SKIP
    (1, 1, True)
    """
    step = POST_BYTES // query.element_size()
    _post.launch((1,), query, into, flag, number, query.numel(), step, num_warps=POST_WARPS)


def wait(word: torch.Tensor, number: torch.Tensor, late: torch.Tensor, turns: int = MOST_TURNS) -> None:
    """Make the stream wait until the CPU's flag is at least ``number``.

    Parameters
    ----------
    word : Tensor (1,) of int64
        In pinned host memory.
    number : Tensor (1,) of int64
        On the device.
    late : Tensor (1,) of int64
        In pinned host memory; set to ``number`` on a timeout. Later work on the stream then uses old data.
    turns : int
        Reads before the timeout.

    Examples
    --------
    >>> word, late = torch.ones(2, 1, dtype=torch.int64).pin_memory()  # the CPU has set its flag to 1  # doctest: +SKIP
    >>> late.zero_()  # doctest: +SKIP
    tensor([0])
    >>> wait(word, torch.ones(1, dtype=torch.int64, device="cuda"), late)  # doctest: +SKIP
    >>> torch.cuda.synchronize()  # doctest: +SKIP
    >>> int(late)  # doctest: +SKIP
    0
    """
    _wait.launch((1,), number, word, late, turns, num_warps=1)
