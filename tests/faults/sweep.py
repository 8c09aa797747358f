"""``python -m tests.faults.sweep``: an error at every line of the rooms that keep state, in every scenario.

Says what it tried, and every point after which a cache was wrong, a process crashed or did not end.

A line is interrupted once per method and kind of operation, and once finds no memory, unless ``--every`` asks for all
times that it is run everywhere.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import pickle
import selectors
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from tests.faults.injector import Point, in_child, inject, record
from tests.faults.scenarios import (
    SCENARIOS,
    SETTINGS,
    Expected,
    World,
    _nothing,
    expect_state,
    fresh,
    takes_place,
    verify,
)

ERRORS = {"interrupt": KeyboardInterrupt, "memory": MemoryError}
OUTCOMES = ("continued", "refused", "swallowed", "faults")
SIZE = 64  # tries that a process takes at a time


class Where(NamedTuple):
    """A scenario in one of the settings."""

    settings: str
    scenario: str

    def world(self) -> World:
        world = World(self.settings, **SCENARIOS[self.scenario].world)
        time.sleep(0.02)  # jobs that are under way end in the process that began them
        gc.collect()
        gc.freeze()  # what children collect is their own
        return world


class Try(NamedTuple):
    """A point, and the error that is raised there."""

    point: Point
    error: str


def points_of(where: Where, options: dict) -> list[Point]:
    """All points of a scenario."""
    world = where.world()
    return _answer(where, lambda: record(lambda: SCENARIOS[where.scenario].operation(world), **options))


def choose(points: dict[Where, list[Point]], errors: list[str], every: bool) -> list[tuple[Where, list[Try]]]:
    """What is tried where."""
    chosen, known = [], set()
    for where, found in points.items():
        tries = []
        for error in errors:
            for point in found:
                # Ctrl-C is only noticed by the next use of a cache, anything else at once: the same way back, on which
                # less can have happened. It need not be gone from every operation again.
                kind = (where.settings.split(",")[0], SCENARIOS[where.scenario].kind) if error == "interrupt" else ()
                key = (error, *kind, point.file, point.line)
                if every or key not in known:
                    known.add(key)
                    tries.append(Try(point, error))
        chosen.append((where, tries))
    return chosen


def attempt(where: Where, tries: Iterable[Try], options: dict) -> tuple[Counter, list[str]]:
    """Outcomes of so many tries, and what was wrong."""
    scenario, world = SCENARIOS[where.scenario], where.world()
    states = {}
    for number, stage in enumerate((_nothing, *scenario.stages)):
        found, logits = _answer(where, lambda stage=stage: expect_state(world, scenario, stage))
        states[(*found, number)] = logits
    twin = None
    if world.twin is not None:
        twin = _answer(where, lambda: world.go_on(world.twin, world.length + 2, 2)[1])
    expected = Expected(states, twin, _answer(where, lambda: fresh(world, world.new())))

    def one(each: Try) -> str:
        operation, number = lambda: scenario.operation(world), each.point.number
        came_out = inject(operation, number, ERRORS[each.error], **options)
        return verify(world, scenario, expected) if came_out else "swallowed"

    tally, faults = Counter(), []
    for each in tries:
        found = in_child(lambda each=each: one(each))
        tally["faults" if found.fault else found.value] += 1
        if found.fault:
            lines = found.fault.strip().splitlines()[-3:]
            faults.append(f"{', '.join(where)}, {each.error} before {each.point}:\n    " + "\n    ".join(lines))
    return tally, faults


def _answer(where: Where, job: Callable[[], Any]) -> Any:
    found = in_child(job)
    if found.fault:
        raise RuntimeError(f"{', '.join(where)}, without any error:\n{found.fault}")
    return found.value


def in_processes(work: Callable[[Any], Any], items: list, jobs: int) -> Iterator[tuple[Any, Any]]:
    """(item, what ``work`` makes of it), as they come; processes take the next one whenever they are through."""
    numbers, put = os.pipe()
    waiting = selectors.DefaultSelector()
    for _ in range(jobs):
        reading, writing = os.pipe()
        if os.fork() == 0:
            os.close(put)
            with os.fdopen(writing, "wb") as pipe:
                while number := os.read(numbers, 2):
                    index = int.from_bytes(number, "big")
                    try:
                        answer = index, work(items[index]), None
                    except BaseException:
                        answer = index, None, traceback.format_exc()
                    pickle.dump(answer, pipe)
                    pipe.flush()
            os._exit(0)
        os.close(writing)
        waiting.register(os.fdopen(reading, "rb"), selectors.EVENT_READ)
    os.write(put, b"".join(index.to_bytes(2, "big") for index in range(len(items))))
    os.close(put)
    while waiting.get_map():
        for key, _ in waiting.select():
            try:
                index, value, failed = pickle.load(key.fileobj)
            except EOFError:
                waiting.unregister(key.fileobj)
                continue
            if failed:
                raise RuntimeError(f"{items[index]}: {failed}")
            yield items[index], value


def sweep(places: list[Where], errors: list[str], jobs: int, every=False, keep=1, options=None) -> dict:
    """Try all that is chosen, every ``keep``-th try of it; figures and faults."""
    start, options = time.monotonic(), options or {}
    points = dict(in_processes(lambda where: points_of(where, options), places, jobs))
    plan = choose({where: points[where] for where in places}, errors, every)
    kept = [(where, tries[::keep]) for where, tries in plan]
    parts = [(where, tries[at : at + SIZE]) for where, tries in kept for at in range(0, len(tries), SIZE)]
    tally, faults, by_error = Counter(), [], Counter()
    for (_, tries), (found, wrong) in in_processes(lambda part: attempt(*part, options), parts, jobs):
        tally += found
        faults += wrong
        by_error.update(each.error for each in tries)
        print(f"{sum(tally.values())} of {sum(len(part) for _, part in parts)}, {len(faults)} faults", file=sys.stderr)
    figures = {
        "settings": len({where.settings for where in places}),
        "scenarios": len({where.scenario for where in places}),
        "points there are": sum(map(len, points.values())),
        "lines": len({(point.file, point.line) for found in points.values() for point in found}),
        "tried": sum(tally.values()),
        **by_error,
        **{outcome: tally[outcome] for outcome in OUTCOMES},
        "seconds": round(time.monotonic() - start),
    }
    return {"figures": figures, "wrong": faults}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", default="", help="names, with ; between them; all by default")
    parser.add_argument("--scenarios", default="", help="names, with ; between them; all by default")
    parser.add_argument("--errors", default=";".join(ERRORS))
    parser.add_argument("--rooms", default="", help="files or folders of the package, with ; between them")
    parser.add_argument("--every", action="store_true", help="every line at every time, everywhere")
    parser.add_argument("--opcodes", action="store_true", help="before every instruction of bytecode")
    parser.add_argument("--keep", type=int, default=1, help="every n-th try alone")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = [given.split(";") if given else list(known) for given, known in
             ((args.settings, SETTINGS), (args.scenarios, SCENARIOS))]  # fmt: skip
    options: dict[str, Any] = {"opcodes": args.opcodes}
    if args.rooms:
        options["rooms"] = args.rooms.split(";")
    places = [Where(*pair) for pair in itertools.product(*names) if takes_place(*pair)]
    result = sweep(places, args.errors.split(";"), args.jobs, args.every, args.keep, options)
    print("\n".join(result["wrong"]))
    print(json.dumps(result["figures"]))
    return int(bool(result["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
