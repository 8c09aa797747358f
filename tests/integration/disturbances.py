"""What tests do to a running model: errors, delays, and garbage in memory that is used again."""

import ctypes
import random
import threading
import time

import pytest
import torch

from scout_hf.kernels.cpu.pool import CopyArgs, NativePool, PoolTicket, quick
from scout_hf.kernels.cpu.torch_backend import TorchBackend, _Scratch
from scout_hf.kernels.cpu.workers import Workers, WorkerTicket
from scout_hf.methods.scout import executor_torch, handoff
from tests.libraries import ISAS
from tests.unit.naive import poison

REAL_ATTEND, REAL_PAIR, REAL_PACK = TorchBackend.attend_blocks, _Scratch.pair, executor_torch.pack_lists

REAL_SUBMIT, REAL_NATIVE_SUBMIT = Workers.submit, NativePool.submit

REAL_EMPTY, REAL_NEW_EMPTY = torch.empty, torch.Tensor.new_empty

TORCH, NATIVELY = {"cpu_backend": "torch"}, {"cpu_backend": "native"}


INT8 = NATIVELY | {"host_dtype": "int8"}

RECALLING = [TORCH, NATIVELY, INT8] if ISAS else [TORCH]


class Planted(Exception):
    """What the tests raise on purpose."""


def raise_once(monkeypatch, module, after: int):
    """Let ``module.forward`` raise in call number ``after`` (from 0), and only then."""
    real, calls = module.forward, []

    def forward(*args, **kwargs):
        calls.append(None)
        if len(calls) == after + 1:
            raise Planted("planted")
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "forward", forward)


def interrupt_a_wait(monkeypatch, call: int) -> list:
    """Ctrl-C in wait number ``call`` (from 0) for a CPU job, of either pool; the tickets that were waited for."""
    waited = []

    def interrupted(real):
        def wait(ticket):
            waited.append(ticket)
            if len(waited) == call + 1:
                raise KeyboardInterrupt
            return real(ticket)

        return wait

    for kind in (PoolTicket, WorkerTicket):
        monkeypatch.setattr(kind, "wait", interrupted(kind.wait))
    return waited


def delayed_jobs(monkeypatch):
    """The CPU's share comes late, whoever computes it: natively it has to wait for a word that a timer raises."""
    dice = random.Random(0)

    def attend_blocks(*args):
        time.sleep(dice.random() * 0.004)
        return REAL_ATTEND(*args)

    def submit(self, entry, args, keep=(), **options):
        word = ctypes.c_uint64(0)
        flag = {"flag": ctypes.addressof(word), "value": 1}
        ticket = REAL_NATIVE_SUBMIT(self, entry, args, keep=(keep, word), **options, **flag)
        threading.Timer(dice.random() * 0.004, setattr, (word, "value", 1)).start()
        return ticket

    monkeypatch.setattr(TorchBackend, "attend_blocks", attend_blocks)
    monkeypatch.setattr(NativePool, "submit", submit)


def delayed_submit(monkeypatch):
    """Every job of Python's threads, recalls too, starts late and ends late."""
    dice = random.Random(1)

    def submit(self, job, *args):
        def late(*args):
            time.sleep(dice.random() * 0.003)
            result = job(*args)
            time.sleep(dice.random() * 0.003)
            return result

        return REAL_SUBMIT(self, late, *args)

    monkeypatch.setattr(Workers, "submit", submit)


def spoiled_scratch(monkeypatch):
    def pair(self, *args):
        keys, values = REAL_PAIR(self, *args)
        return keys.fill_(torch.nan), values.fill_(torch.nan)

    monkeypatch.setattr(_Scratch, "pair", pair)


def spoiled_buffers(monkeypatch):
    """Everything allocated without contents, tails and digests too, starts as NaN."""
    spoil = threading.Lock()

    def filled(tensor):
        with spoil:
            return tensor.fill_(torch.nan) if tensor.is_floating_point() and tensor.device.type == "cpu" else tensor

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: filled(REAL_EMPTY(*args, **kwargs)))
    new_empty = lambda self, *args, **kwargs: filled(REAL_NEW_EMPTY(self, *args, **kwargs))  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


DISTURBANCES = [
    *((TORCH, way) for way in (delayed_jobs, delayed_submit, spoiled_scratch, poison, spoiled_buffers)),
    *((NATIVELY, way) for way in (delayed_jobs, poison, spoiled_buffers) if ISAS),
    *((INT8, way) for way in (delayed_jobs, delayed_submit, poison, spoiled_buffers) if ISAS),
]

DISTURBED = pytest.mark.parametrize(("backend", "disturb"), DISTURBANCES)


def late(monkeypatch):
    """Every job of the pool and of Python's thread begins late."""
    dice = random.Random(0)

    def submit(self, *args, **options):
        word = ctypes.c_uint64(0)
        gate = CopyArgs(None, None, 0, 0)
        at = {"flag": ctypes.addressof(word), "value": 1}
        REAL_NATIVE_SUBMIT(self, quick(self.library, "scout_submit_copy"), gate, keep=word, **at)
        threading.Timer(dice.random() * 0.004, setattr, (word, "value", 1)).start()
        return REAL_NATIVE_SUBMIT(self, *args, **options)

    attend_when = handoff._attend_when

    def attend_late(*args):
        time.sleep(dice.random() * 0.004)
        return attend_when(*args)

    monkeypatch.setattr(NativePool, "submit", submit)
    monkeypatch.setattr(handoff, "_attend_when", attend_late)


def refuse_thread(monkeypatch, number):
    """The start of that thread from now on fails, as under ``ulimit -u``; all others start."""
    real, started = threading.Thread.start, []

    def start(self):
        started.append(self)
        if len(started) == number:
            raise RuntimeError("can't start new thread")
        real(self)

    monkeypatch.setattr(threading.Thread, "start", start)
