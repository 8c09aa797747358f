"""``python -m tests.faults.sweep``: an error at every line of the rooms that keep state, in every scenario.

Says what it tried, and every point after which a cache was wrong, a process crashed or did not end.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import pickle
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator

import torch

from tests.faults.injector import Point, in_child, inject, record
from tests.faults.scenarios import SCENARIOS, SETTINGS, Expected, World, _nothing, expect_state, fresh, verify

ERRORS = {"interrupt": KeyboardInterrupt, "memory": MemoryError}


def sweep(settings: str, name: str, errors: list[str], times: int, rooms=None, opcodes=False, only=None) -> dict:
    """Try one scenario at the first ``times`` times of every line (0: at all)."""
    scenario, options = SCENARIOS[name], {"opcodes": opcodes} | ({"rooms": rooms} if rooms else {})
    world = World(settings, **scenario.world)
    time.sleep(0.02)  # jobs that are under way end in the process that began them

    def answer(job):
        found = in_child(job)
        if found.fault:
            raise RuntimeError(f"{settings}, {name}, without any error:\n{found.fault}")
        return found.value

    points = answer(lambda: record(lambda: scenario.operation(world), **options))
    states = {}
    for number, stage in enumerate((_nothing, *scenario.stages)):
        found, logits = answer(lambda stage=stage: expect_state(world, scenario, stage))
        states[(*found, number)] = logits
    twin = None if world.twin is None else answer(lambda: world.go_on(world.twin, world.length + 2)[1])
    expected = Expected(states, twin, answer(lambda: fresh(world, world.new())))
    gc.collect()
    gc.freeze()  # what children collect is their own
    tally, faults = Counter(), []
    for error in errors:
        for point in points:
            if (times and point.time > times) or (only and only not in f"{point.file}:{point.line}"):
                continue
            found = in_child(lambda point=point, error=error: _try(world, scenario, expected, point, error, options))
            tally["tried"] += 1
            if found.fault:
                tally["faults"] += 1
                faults.append(f"{settings}, {name}, {error} before {point}:\n{_short(found.fault)}")
            else:
                tally[found.value] += 1
    return {"settings": settings, "scenario": name, "points": len(points), **tally, "faults": faults}


def _try(world, scenario, expected: Expected, point: Point, error: str, options: dict) -> str:
    if not inject(lambda: scenario.operation(world), point.number, ERRORS[error], **options):
        return "swallowed"
    return verify(world, scenario, expected)


def _short(text: str) -> str:
    return "\n".join("    " + line for line in text.strip().splitlines()[-6:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", default="", help="comma-separated names; all by default")
    parser.add_argument("--scenarios", default="")
    parser.add_argument("--errors", default="interrupt,memory")
    parser.add_argument("--times", type=int, default=2)
    parser.add_argument("--rooms", default="")
    parser.add_argument("--opcodes", action="store_true")
    parser.add_argument("--only", default="", help="part of file:line")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one line of JSON per scenario")
    args = parser.parse_args()
    torch.set_num_threads(1)
    wanted = [
        (settings, name)
        for settings in (args.settings.split(";") if args.settings else SETTINGS)
        for name in (args.scenarios.split(",") if args.scenarios else SCENARIOS)
    ]
    found, start = [], time.monotonic()
    for result in _in_processes(wanted, args):
        print(json.dumps(result) if args.json else _line(result), flush=True)
        found.append(result)
    if not args.json:
        for fault in (fault for result in found for fault in result["faults"]):
            print(fault)
        sums = {key: sum(result.get(key, 0) for result in found) for key in OUTCOMES[:-1]}
        print(sums, f"in {time.monotonic() - start:.0f} s")
    return int(any(result["faults"] for result in found))


OUTCOMES = ("tried", "continued", "refused", "swallowed", "faults")


def _line(result: dict) -> str:
    counts = ", ".join(f"{result.get(key, 0)} {key}" for key in OUTCOMES[:-1])
    return f"{result['settings']}, {result['scenario']}: {counts}, {len(result['faults'])} faults"


def _in_processes(wanted: list[tuple[str, str]], args: argparse.Namespace) -> Iterator[dict]:
    """Results in the order in which they come; processes take the next scenario whenever they are through."""
    numbers, put = os.pipe()
    results, answer = os.pipe()
    os.write(put, bytes(range(len(wanted))))
    os.close(put)
    for _ in range(args.jobs):
        if os.fork() == 0:
            os.close(results)
            while number := os.read(numbers, 1):
                result = _one(wanted[number[0]], args)
                with os.fdopen(os.dup(answer), "wb") as pipe:
                    pickle.dump(result, pipe)
            os._exit(0)
    os.close(answer)
    with os.fdopen(results, "rb") as pipe:
        while True:
            try:
                yield pickle.load(pipe)
            except EOFError:
                return


def _one(which: tuple[str, str], args: argparse.Namespace) -> dict:
    rooms = args.rooms.split(",") if args.rooms else None
    try:
        return sweep(*which, args.errors.split(","), args.times, rooms, args.opcodes, args.only)
    except BaseException:
        fault = f"{', '.join(which)}: {traceback.format_exc()}"
        return {"settings": which[0], "scenario": which[1], "faults": [fault]}


if __name__ == "__main__":
    sys.exit(main())
