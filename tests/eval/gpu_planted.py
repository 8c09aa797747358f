"""Stages of ``bench gpu`` that go well, or go wrong in every way that a process can."""

import os
import time

from scout_hf.eval.bench.gpu_stages import Job


def done(**found):
    return lambda: {"facts": ["all is well"], "gb_per_s": 4.0} | found


def forever():
    while True:
        time.sleep(60)


def out_of_memory():
    raise RuntimeError("CUDA error: out of memory\nand more lines")


def fine(given):
    return [Job("first", done()), Job("second", done(known=sorted(given.known)))]


def crash(given):
    return [Job("crashes", lambda: os._exit(11))]


def nothing(given):
    raise ImportError("there is no such library")


def hang(given):
    return [Job("ends", done()), Job("hangs", forever, 600), Job("waits", done())]


def one_hangs(given):
    """Its maker runs in every process, and tells how often one has died of what hung."""
    return [
        Job("maker", lambda: {"facts": [str(given.tries.get("hangs", 0))]}, again=True),
        Job("before", done(), needs=("maker",)),
        Job("hangs", forever, 0.3, needs=("maker",)),
        Job("no memory", out_of_memory),
        Job("needs memory", done(), needs=("no memory",)),
        Job("after", done(), needs=("maker",)),
    ]


def cut(given):
    """Of tests for which there was no time, all but in a second run."""
    late = {"note": "3 left", "unfinished": True}
    again = "tests" in given.known
    return [
        Job("tests", lambda: {"passed": 3 + 3 * again, "failures": [], "not_for_here": 0} | (late if not again else {}))
    ]


def tells(given):
    def run():
        given.so_far({"passed": 3, "failures": [], "not_for_here": 0})
        forever()

    return [Job("tests", run, 0.5)]
