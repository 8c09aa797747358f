"""What a replayed step costs the host beside its one launch: counted, and the same for any number of layers and tokens.

Counted are operations of torch, launches of kernels and native calls outside of graphs. A step that fills a block
launches one graph more, and the step after asks what has changed.
"""

from __future__ import annotations

import sys
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

import scout_hf  # noqa: E402
from scout_hf.kernels.cpu.pool import NativePool  # noqa: E402
from scout_hf.selection import Selector  # noqa: E402
from tests.integration import fake_graph  # noqa: E402
from tests.integration.common import LOSSY, left_padded, llama, prompt  # noqa: E402
from tests.libraries import ISAS  # noqa: E402
from tests.triton import reference  # noqa: E402

pytestmark = pytest.mark.skipif(not ISAS, reason="needs the native library")

SPARSE = LOSSY | {"digest": "minmax", "resident": None}
BLOCK = SPARSE["block_size"]
SPAN = 2 * BLOCK
NO_KERNEL = ("view", "slice", "select", "detach", "t", "expand", "transpose", "unsqueeze", "alias", "empty")
"""Operations of torch that launch nothing on a GPU."""


def made_by_us():
    """Whether an operation is of this package, and not of the model or in place of its own."""
    frame, places = sys._getframe(2), ("/scout_hf/", "/modeling_")
    while frame is not None and not any(part in frame.f_code.co_filename for part in places):
        frame = frame.f_back
    name = "/modeling_" if frame is None else frame.f_code.co_filename
    return "/scout_hf/" in name and "/scout_hf/fused/" not in name


class Costs(TorchDispatchMode):
    """Counts what is called while it is active, but not what happens inside of a replay or of a kernel."""

    def __init__(self, monkeypatch, graphs):
        super().__init__()
        self.found, self.inside = Counter(), 0
        monkeypatch.setattr(graphs, "replay", self.hidden(graphs.replay, "replay"))
        monkeypatch.setattr(NativePool, "submit", self.hidden(NativePool.submit, "native"))
        # One kernel on a GPU, whose reference is many operations.
        monkeypatch.setattr(Selector, "scores", self.hidden(Selector.scores, "kernel"))
        for name in fake_graph.LAUNCHED:
            kernel = getattr(reference.KERNELS, name)
            monkeypatch.setattr(reference.KERNELS, name, self.hidden(kernel, "kernel"))

    def hidden(self, function, kind):
        def call(*args, **kwargs):
            self.found[kind] += not self.inside
            self.inside += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.inside -= 1

        return call

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0].strip("_")
        self.found["torch"] += not self.inside and name not in NO_KERNEL
        self.found["ours"] += not self.inside and made_by_us()
        return func(*args, **(kwargs or {}))


@pytest.fixture
def costs(monkeypatch):
    reference.install(monkeypatch)
    return Costs(monkeypatch, fake_graph.install(monkeypatch))


def per_step(costs, layers, tokens, padded=False, way="graph", **options):
    """What each of ``SPAN`` steps costs, the first of which fills a block."""
    given = left_padded(0, 13, tokens=tokens) if padded else {"input_ids": prompt(2, tokens)}
    model, mask, found = llama(num_hidden_layers=layers), given.get("attention_mask"), []
    assert tokens % BLOCK == 4
    with scout_hf.patch(model, **SPARSE | options, hand_over=way) as handle, torch.no_grad():
        cache = handle.new_cache()
        model.model(**given, past_key_values=cache)
        for step in range(BLOCK + 3 + SPAN):
            more = {"input_ids": prompt(2, 1, step)}
            if padded:
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                more |= {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
            costs.found.clear()
            with costs:
                model.model(**more, past_key_values=cache)
            found.append(Counter(costs.found))
    return found[-SPAN:]


def launches(cost):
    return sum(cost.get(kind, 0) for kind in ("torch", "kernel", "native"))


@pytest.mark.parametrize("padded", [False, True], ids=["rows", "padded"])
@pytest.mark.parametrize("options", [{}, {"recall": 0.12}, {"recall": 3}, {"cpu_query": "auto"}], ids=str)
def test_nothing_beside_the_launch_grows_with_layers_or_context(costs, padded, options):
    few, more = per_step(costs, 2, 60, padded, **options), per_step(costs, 5, 60, padded, **options)
    long = per_step(costs, 2, 300, padded, **options)
    for step in range(SPAN):
        assert launches(few[step]) == launches(more[step]) == launches(long[step])
        for cost in (few[step], more[step], long[step]):
            assert cost["native"] == 1 and not cost["kernel"]
            assert cost["replay"] == (1 if step % BLOCK else 2)
        if step % BLOCK > 1:
            assert few[step] == more[step] == long[step]
            assert launches(few[step]) <= (20 if padded else 9)
        else:  # a block is full, or has just been
            assert launches(few[step]) <= (40 if padded else 12)


def test_what_is_written_back_layer_by_layer_would_be_seen(costs, monkeypatch):
    """Pages that are not there in advance are asked for in each block."""
    monkeypatch.setattr("scout_hf.methods.scout.executor_triton.RESERVED_BLOCKS", 1)
    few, more = per_step(costs, 2, 60), per_step(costs, 5, 60)
    grows = [launches(more[step]) > launches(few[step]) for step in range(SPAN)]
    assert grows == [step % BLOCK == 1 for step in range(SPAN)]
    few, more = per_step(costs, 2, 300), per_step(costs, 5, 300)  # there for an eighth of the context
    assert [launches(cost) for cost in more] == [launches(cost) for cost in few]
    monkeypatch.setattr("scout_hf.methods.scout.executor_triton.TritonExecutor.can_fill", lambda *args: False)
    few, more = per_step(costs, 2, 60), per_step(costs, 5, 60)
    assert all(launches(more[step]) > launches(few[step]) + 3 * 15 for step in range(0, SPAN, BLOCK))


@pytest.mark.parametrize("way", ["join", "flags"])
def test_plain_steps_make_few_operations_per_layer(costs, monkeypatch, way):
    """At most half of what they made (38 and 40, views included) before jobs, views and partials were prepared.

    Those that are left: appending to the tail, the predicted query, a view of codes, and with ``join`` the copies.
    """
    monkeypatch.setattr("scout_hf.counters.SAMPLE_EVERY", 1000)  # else every 8th step compares queries
    few, more = (per_step(costs, layers, 60, way=way, recall=0.12) for layers in (2, 6))
    for step in range(SPAN):
        if step % BLOCK > 1:
            assert (more[step]["ours"] - few[step]["ours"]) / 4 <= 19
            assert (more[step]["native"] - few[step]["native"]) / 4 == (way == "flags")
