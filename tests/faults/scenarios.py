"""Caches in all settings, what is done to them, and how to tell whether a cache goes on as one that nothing befell."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import math
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import scout_hf
from scout_hf import CacheStateError, PrefixStore, ScoutCache, padding
from scout_hf.counters import Counters
from scout_hf.drafting import rounds
from scout_hf.methods.base import find_method
from scout_hf.prefix.keeping import keep
from scout_hf.prefix.reuse import Reuse
from scout_hf.sessions import read_session
from scout_hf.step import Role
from tests.libraries import ISAS
from tests.unit.worlds import CROP_TAKES_LENGTH, VOCAB, stock_model

IS_FAR = padding._is_far
BLOCK = 8
SHORT, KNOWN, LONG, TURN, STEPS = 21, 40, 45, 13, 5
TOLERANCE = 1e-5
SMALL = {"block_size": BLOCK, "threads": 1}
TWO = {"split": "cpu", "window": 8, "resident": 16, "recall": 1}
METHODS = {"block_size": BLOCK, "window": 8}
SETTINGS: dict[str, dict] = {
    "one tier": {"split": "off", "layer_ahead": False},
    "one tier, budget": {"split": "off", "budget": 24, "window": 8, "digest": "minmax"},
    "one tier, int8": {"split": "off", "layer_ahead": False, "host_dtype": "int8"},
    "two tiers": {**TWO, "layer_ahead": False},
    "two tiers, ahead": {**TWO, "layer_ahead": True, "cpu_query": "real", "recall": 0.1},
    "two tiers, graph": {**TWO, "layer_ahead": True, "cpu_query": "real", "hand_over": "graph"},
    "two tiers, torch": {**TWO, "layer_ahead": True, "cpu_query": "real", "cpu_backend": "torch"},
    "two tiers, over a link": {**TWO, "layer_ahead": False, "link_gbps": 1e4},
    "two tiers, int8": {**TWO, "layer_ahead": False, "host_dtype": "int8"},
    "two tiers, sign codes": {**TWO, "layer_ahead": False, "budget": 4096, "digest": "sign"},
    "dense": {"method": "dense"},
    "dense, sign codes": {"method": "dense", "budget": 4096, "digest": "sign"},
    "dense, head by head": {"method": "dense", "method_options": {"heads": 1}},
    "kvpr": {"method": "kvpr", "method_options": {"share": 0.5}},
    "infinigen": {"method": "infinigen", "layer_ahead": True},
    "infinigen, kept": {
        "method": "infinigen", "budget": 4096, "method_options": {"alpha": 1e9, "keep": True}},
    "hgca": {"method": "hgca", "resident": 16, "method_options": {"threshold": 0}},
    "hgca, lossy": {"method": "hgca", "resident": 16, "budget": 32, "method_options": {"least": 2}},
}  # fmt: skip
"""Two tiers pick everything: what each of them holds is attended, so that one wrong block shows in the logits."""


@functools.cache
def model(cpu_backend: str, hand_over: str):
    """A patched copy of a tiny model."""
    patched = copy.deepcopy(stock_model())
    split = {} if hand_over == "auto" else {"split": "cpu"}
    scout_hf.patch(patched, cpu_backend=cpu_backend, hand_over=hand_over, threads=1, **split)
    return patched


_fakes: list[pytest.MonkeyPatch] = []


def use_fakes(wanted: bool) -> None:
    """Whether steps on two tiers go through the executor of GPUs, with the kernels' references and a graph's fake."""
    if wanted and not _fakes:
        from tests.integration import fake_graph
        from tests.triton import reference

        _fakes.append(pytest.MonkeyPatch())
        reference.install(_fakes[0])
        fake_graph.install(_fakes[0])
    while _fakes and not wanted:
        _fakes.pop().undo()


def tokens(rows: int) -> torch.Tensor:
    """Ids (rows, 128); rows differ in what a prompt is made from, and go on alike."""
    ids = torch.randint(1, VOCAB, (rows, 128), generator=torch.Generator().manual_seed(0))
    ids[:, SHORT:] = ids[:1, SHORT:]
    return ids


@dataclass
class World:
    """One cache, a fork of it, and the model that runs both.

    Parameters
    ----------
    settings : str
        One of ``SETTINGS``.
    rows, length : int
        Of the prompt that the cache holds.
    padding : int
        Left padding of the first row.
    far : bool
        Whether masks are taken as those on a GPU are.
    """

    settings: str
    rows: int = 1
    length: int = LONG
    padding: int = 0
    far: bool = False
    cache: Any = None
    twin: Any = None
    path: Path | None = None
    lossy: float = field(init=False)

    def __post_init__(self):
        padding._is_far = (lambda mask: True) if self.far else IS_FAR
        options = {"block_size": BLOCK, "window": 8, "budget": None} | SETTINGS[self.settings]
        self.options = options
        self.lossy = 2e-2 if options.get("host_dtype") else TOLERANCE
        hand_over = options.get("hand_over", "auto")
        use_fakes(hand_over != "auto")
        self.model = model(options.get("cpu_backend", "auto"), hand_over)
        self.ids = tokens(self.rows)
        self.cache = self.new()
        if self.length:
            self.run(self.cache, self.length - 3)
            for _ in range(3):
                self.run(self.cache, self.cache.get_seq_length() + 1)
            self.twin = self.cache.fork()
            # Work that was begun for the next step and dropped by the fork begins again.
            self.run(self.cache, self.length + 1)

    def new(self) -> ScoutCache:
        return ScoutCache(self.model.config, **self.options)

    def run(self, cache: ScoutCache, until: int, ids: torch.Tensor | None = None) -> torch.Tensor:
        """One pass up to a length; the last token's logits."""
        ids = self.ids if ids is None else ids
        mask = torch.ones(len(ids), until, dtype=torch.int64)
        mask[0, : self.padding] = 0
        with torch.no_grad():
            new = ids[:, cache.get_seq_length() : until]
            return self.model(new, past_key_values=cache, attention_mask=mask).logits[:, -1]

    def rows_of(self, cache: ScoutCache) -> torch.Tensor:
        """Ids for as many rows as the cache has now."""
        method = cache.layers[0].method
        return self.ids[:1].expand(self.rows if method is None else method.batch, -1)

    def go_on(self, cache: ScoutCache, turn: int, steps: int = STEPS) -> tuple[tuple, torch.Tensor]:
        """What the cache looks like, and the logits of a turn up to that length and of steps behind it."""
        ids = self.ids if cache.get_seq_length() < SHORT else self.rows_of(cache)
        found = (cache.get_seq_length(), len(ids))
        logits = [self.run(cache, turn, ids)] if found[0] < turn else []
        for _ in range(steps):
            logits.append(self.run(cache, cache.get_seq_length() + 1, ids))
        return found, torch.stack(logits)


def crop(cache: ScoutCache, length: int) -> None:
    cache.crop(length if CROP_TAKES_LENGTH else length - cache.get_seq_length())


@dataclass
class Scenario:
    """An operation on a world, and what a cache may be when the operation failed.

    ``stages`` lead from the prepared cache to states that are allowed; ``turn`` is the length up to which it goes on in
    one pass. Scenarios of one ``kind`` differ in what they come to.
    """

    kind: str
    name: str
    world: dict
    operation: Callable[[World], Any]
    turn: int = LONG + 2
    stages: tuple[Callable[[World], Any], ...] = ()


def _nothing(world: World) -> None: ...


def _pass(until: int) -> Callable[[World], Any]:
    return lambda world: world.run(world.cache, until)


def _failed_pass(until: int) -> Callable[[World], Any]:
    """A pass that a user's hook ends: what is looked at is the way back."""

    def operation(world: World) -> None:
        def fail(*_):
            raise ZeroDivisionError

        hook = world.model.model.layers[1].mlp.register_forward_pre_hook(fail)
        try:
            world.run(world.cache, until)
        except ZeroDivisionError:
            pass
        finally:
            hook.remove()
        world.cache.get_seq_length()

    return operation


def _crop(length: int) -> Callable[[World], Any]:
    return lambda world: crop(world.cache, length)


def _chunks(world: World) -> None:
    for until in (SHORT, LONG):
        world.run(world.cache, until)


def _draft_and_check(world: World) -> None:
    """Two sparse steps, whose tokens are taken back, and a pass over them that is exact."""
    held = world.cache.get_seq_length()
    with rounds._taken_back(world.cache, held):
        for until in (held + 1, held + 2):
            world.run(world.cache, until)
    with rounds._in_role(world.cache, Role.CHECK):
        world.run(world.cache, held + 3)


def _outside(world: World) -> None:
    with torch.no_grad():
        stock_model()(world.ids[:, world.cache.get_seq_length() : LONG + TURN], past_key_values=world.cache)


def _fork(world: World) -> None:
    world.cache.fork()


def _reset(world: World) -> None:
    world.cache.reset()


def _save_and_open(world: World) -> None:
    world.path = Path(tempfile.mkdtemp()) / "kv"
    world.cache.save(world.path)
    ScoutCache.load(world.path, world.model)


def _save_over(world: World) -> None:
    """A session of the cache as it is, in place of one of its fork."""
    world.path = Path(tempfile.mkdtemp()) / "kv"
    with _unseen():
        world.twin.save(world.path)
    world.cache.save(world.path)


@contextlib.contextmanager
def _unseen():
    """Preparations, which are not what is looked at."""
    tracing = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(tracing)


def _reuse(world: World) -> Reuse:
    world.path = world.path or Path(tempfile.mkdtemp()) / "store"
    return Reuse(PrefixStore(world.path), world.model, Counters())


def _keep(world: World) -> None:
    """Add what the cache holds to a store that knows the beginning of it."""
    with _unseen():
        reuse, short = _reuse(world), world.new()
        world.run(short, SHORT)
        context = reuse.context(short.scout_config)
        keep(reuse.store, short, context, [])
    keep(reuse.store, world.cache, context, [])


def _fill(world: World) -> None:
    """Fill an empty cache from a store with two segments of its text."""
    with _unseen():
        reuse, long = _reuse(world), world.new()
        context = reuse.context(long.scout_config)
        for until in (SHORT, LONG):
            world.run(long, until)
            keep(reuse.store, long, context, [])
    reuse.fill(context, world.cache, world.ids, None, KNOWN)


PADDED = {"rows": 2, "padding": 5}
ALL = [
    Scenario("prompt", "prefill", {"length": 0}, _pass(LONG), LONG),
    Scenario("step", "decode", {}, _pass(LONG + 2)),
    Scenario("step", "decode a full block", {"length": 46}, _pass(48), 48),
    Scenario("turn", "next turn", {}, _pass(LONG + TURN), LONG + TURN),
    Scenario("prompt", "chunks", {"length": 0}, _chunks, LONG, (_pass(SHORT),)),
    Scenario("turn", "padded turn", PADDED, _pass(LONG + TURN), LONG + TURN),
    Scenario("step", "padded step, mask far", PADDED | {"far": True}, _pass(LONG + 2)),
    Scenario("crop", "crop", {}, lambda world: crop(world.cache, 27), LONG + 2, (lambda world: crop(world.cache, 27),)),
    Scenario(
        "crop", "crop little", {}, lambda w: crop(w.cache, LONG - 1), LONG + 2, (lambda w: crop(w.cache, LONG - 1),)
    ),
    Scenario("fork", "fork", {}, _fork),
    *(
        Scenario("rows", name, {"rows": rows}, operation, LONG + 2, (operation,))
        for name, rows, operation in (
            ("reorder", 2, lambda world: world.cache.reorder_cache(torch.tensor([1, 1]))),
            ("repeat", 1, lambda world: world.cache.batch_repeat_interleave(2)),
            ("select", 2, lambda world: world.cache.batch_select_indices(torch.tensor([1]))),
        )
    ),
    Scenario("draft", "draft and check", {}, _draft_and_check, LONG + 4),
    Scenario("outside", "outside", {}, _outside, LONG + TURN),
    Scenario("way back", "way back", {}, _failed_pass(LONG + TURN), LONG + TURN),
    Scenario("reset", "reset", {}, _reset, LONG, (_reset,)),
    Scenario("save", "save and open", {}, _save_and_open),
    Scenario("save", "save over", {}, _save_over),
    Scenario("store", "keep in a store", {"rows": 2}, _keep),
    Scenario("store", "fill from a store", {"length": 0, "rows": 2}, _fill, LONG, (_pass(KNOWN),)),
]
SCENARIOS = {scenario.name: scenario for scenario in ALL}


def takes_place(settings: str, scenario: str) -> bool:
    """Whether this happens with these settings: HGCA's weights remember drafts, and it is never asked for any."""
    if "hand_over" in SETTINGS[settings] and not (ISAS and find_spec("triton")):
        return False
    method = SETTINGS[settings].get("method", "scout")
    return SCENARIOS[scenario].kind != "draft" or find_method(method).can_draft


@dataclass
class Expected:
    """Logits of a cache that nothing befell: from each allowed state, of the fork, and of a new cache."""

    states: dict[tuple, torch.Tensor]
    twin: torch.Tensor | None
    fresh: torch.Tensor


def fresh(world: World, cache: ScoutCache) -> torch.Tensor:
    return world.go_on(cache, LONG, 2)[1]


def expect_state(world: World, scenario: Scenario, stage: Callable) -> tuple[tuple, torch.Tensor]:
    stage(world)
    return world.go_on(world.cache, scenario.turn)


def _verify_session(world: World, scenario: Scenario, expected: Expected) -> None:
    """Where a session was being written there is nothing, or one that goes on as the cache or its fork does."""
    if world.path is None:
        return
    if scenario.kind == "store":
        reuse, cache = _reuse(world), world.new()
        for segment in reuse.store.segments():
            read_session(segment.path).check_pages()
        reuse.fill(reuse.context(cache.scout_config), cache, world.ids, None, KNOWN)
        close(fresh(world, cache), expected.fresh, max(world.lossy, 1e-5), "a cache of the store")
    elif world.path.exists():
        opened = ScoutCache.load(world.path, world.model)
        if opened.get_seq_length() == world.length:
            close(world.go_on(opened, world.length + 2, 2)[1], expected.twin, world.lossy, "the former session")
        else:
            close(world.go_on(opened, scenario.turn)[1], next(iter(expected.states.values())), world.lossy, "a session")
    shutil.rmtree(world.path.parent)


def verify(world: World, scenario: Scenario, expected: Expected) -> str:
    """``continued`` or ``refused``; AssertionError where a cache is wrong."""
    outcome = "continued"
    if scenario.kind == "store" and world.settings == "hgca, lossy":
        # It weighs tokens as they are read; what it was given at once it weighs otherwise.
        world.lossy = math.inf
    try:
        found, logits = world.go_on(world.cache, scenario.turn)
    except CacheStateError:
        outcome = "refused"
        for use in (world.cache.fork, lambda: crop(world.cache, 3), lambda: world.run(world.cache, 60)):
            assert _is_refused(use), "the cache refused to go on, and was used all the same"
        world.cache.reset()
        close(fresh(world, world.cache), expected.fresh, world.lossy, "after reset()")
    else:
        fitting = [each for key, each in expected.states.items() if key[:2] == found]
        assert fitting, f"the cache has (tokens, rows) {found}, allowed are {[key[:2] for key in expected.states]}"
        errors = [float((logits - each).abs().max()) for each in fitting]
        assert min(errors) <= world.lossy, f"goes on wrong by {errors} of {float(fitting[0].abs().max()):.2g}"
    _verify_session(world, scenario, expected)
    if world.twin is not None:
        close(world.go_on(world.twin, world.length + 2, 2)[1], expected.twin, TOLERANCE, "the fork")
    world.cache = world.twin = None
    gc.collect()
    close(fresh(world, world.new()), expected.fresh, world.lossy, "a new cache")
    return outcome


def close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float, what: str) -> None:
    error = float((got - wanted).abs().max())
    assert error <= tolerance, f"{what} is wrong by {error:.2g}"


def _is_refused(use: Callable[[], Any]) -> bool:
    try:
        use()
    except CacheStateError:
        return True
    return False
