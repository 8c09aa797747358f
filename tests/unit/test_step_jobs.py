"""Jobs that are described once and started once per step, those of all layers in one native call."""

from __future__ import annotations

import pytest
import torch

from scout_hf.errors import CacheStateError
from scout_hf.fusion import Partial
from scout_hf.kernels.cpu import BlockLists, StepSums
from scout_hf.kernels.cpu.native_backend import NativeBackend
from scout_hf.stores import PagedKV
from tests.libraries import ISAS

pytestmark = pytest.mark.skipif(not ISAS, reason="needs the native library")

SIZE, BLOCKS, LAYERS = 8, 6, 3


class Layer:
    """A store, lists, and words that a device would set."""

    def __init__(self, backend, index):
        self.store = PagedKV(1, 2, 16, SIZE, torch.float32, "cpu")
        self.store.append(*torch.randn(2, 1, 2, SIZE * BLOCKS, 16, generator=torch.Generator().manual_seed(index)))
        self.words = torch.zeros(3, dtype=torch.int64)
        self.query = torch.randn(1, 4, 1, 16, generator=torch.Generator().manual_seed(index + 100))
        self.into = Partial(torch.zeros(1, 4, 1, 16), torch.zeros(1, 4, 1))
        self.lists = BlockLists(torch.zeros(1, 2, BLOCKS, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int32))
        self.chosen = torch.zeros(1, 2, dtype=torch.int32)
        words = tuple(self.words[i : i + 1] for i in range(3))
        self.job = backend.prepare(words, self.into, self.query, self.lists, self.chosen, index)
        self.describe()

    def describe(self, padding_mask=None):
        self.job.describe(self.store, 0.25, None, padding_mask)

    def choose(self, *blocks):
        self.lists.ids[:, :, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        self.lists.counts.fill_(len(blocks))
        self.chosen.fill_(len(blocks) + 1)

    def expected(self, backend, padding_mask=None):
        return backend.attend_blocks(self.query, self.store, self.lists, 0.25, None, padding_mask).partial


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.setattr("scout_hf.kernels.cpu.pool.spare_workers", lambda threads: 2)
    made = NativeBackend()
    yield made
    made.close()


@pytest.fixture
def layers(backend):
    return [Layer(backend, index) for index in range(LAYERS)]


def test_jobs_wait_for_their_flags_and_come_again_in_each_step(backend, layers):
    together = backend.together([layer.job for layer in layers])
    for step in range(1, 6):
        backend.start_step(together)
        for layer in layers:
            assert layer.job.number == step and not layer.job.ticket().done()
            layer.query.normal_()
            layer.choose(*range(step))
            layer.words[0] = step
            layer.job.drain()
            assert int(layer.words[1]) == step and int(layer.words[2]) == 0
            for got, wanted in zip(layer.into, layer.expected(backend)):
                assert torch.equal(got, wanted)
    done = [2 * sum(range(1, 6)) * part for part in (SIZE, 1)]
    for layer in layers:
        assert layer.job.totals.take() == StepSums(*done, 2 * sum(range(2, 7)))
        assert layer.job.totals.take() == StepSums(0, 0, 0)


@pytest.mark.parametrize("steps", [0, 1], ids=["first", "later"])
def test_jobs_are_drained_after_an_interrupt_right_behind_their_submit(backend, layers, steps):
    together = backend.together([layer.job for layer in layers])
    for step in range(1, steps + 1):
        for layer in layers:
            layer.words[0] = step
        backend.start_step(together).drain()
    submit = together._submit

    def interrupted(*args):
        submit(*args)
        raise KeyboardInterrupt

    together._submit = interrupted
    with pytest.raises(KeyboardInterrupt):
        backend.start_step(together)
    for layer in layers:
        assert layer.job.number == steps + 1 and not layer.job.ticket().done()
        layer.words[0] = steps + 1
        layer.job.drain()
        assert int(layer.words[1]) == steps + 1


def test_jobs_of_threads_that_have_ended_are_not_waited_for(backend, layers):
    together = backend.together([layers[0].job])
    for step in range(1, 9):
        layers[0].words[0] = step
        backend.start_step(together).drain()
    backend.close()
    submit, together._submit = together._submit, lambda *args: 0
    with pytest.raises(CacheStateError):
        backend.start_step(together)
    together._submit = submit
    assert layers[0].job.ticket() is None
    layers[0].job.drain()


def test_what_is_not_to_count_does_not(backend, layers):
    layer, together = layers[0], backend.together([layers[0].job])
    layer.choose(0)
    for step, counted in enumerate([True, False, True], start=1):
        layer.words[0] = step
        layer.job.counted = counted
        backend.start_step(together).drain()
    assert layer.job.totals.take() == StepSums(4 * SIZE, 4, 8)


def test_a_store_that_has_grown_and_a_mask_are_described_again(backend, layers):
    layer, together = layers[0], backend.together([layers[0].job])
    described = layer.job.memory
    layer.describe()
    assert layer.job.memory is described
    layer.store.append(*torch.randn(2, 1, 2, 40 * SIZE, 16))
    mask = torch.ones(1, layer.store.length, dtype=torch.bool)
    mask[:, 45 * SIZE + 3 :] = False
    layer.describe(mask)
    layer.choose(1, 45)
    layer.words[0] = 1
    backend.start_step(together).drain()
    for got, wanted in zip(layer.into, layer.expected(backend, mask)):
        assert torch.equal(got, wanted)


def test_an_error_sets_the_word_of_trouble_and_counts_nothing(backend, layers):
    layers[1].choose(0, BLOCKS)
    for layer in layers:
        layer.words[0] = 1
    backend.start_step(backend.together([layer.job for layer in layers])).drain()
    assert [int(layer.words[1]) for layer in layers] == [1, 1, 1]
    assert [int(layer.words[2]) for layer in layers] == [0, -3, 0]
    assert layers[1].job.totals.take() == StepSums(0, 0, 0)


def test_all_or_none(backend, layers):
    layers[2].job.args.attend.store.block_size = 3
    together = backend.together([layer.job for layer in layers])
    with pytest.raises(CacheStateError, match="did not take a job .status -1"):
        backend.start_step(together)
    assert [layer.job.number for layer in layers] == [0, 0, 0]
    layers[2].job.args.attend.store.block_size = SIZE
    for layer in layers:
        layer.words[0] = 1
    backend.start_step(together).drain()
    assert [int(layer.words[1]) for layer in layers] == [1, 1, 1]


def test_jobs_end_when_the_pool_is_closed(backend, layers):
    backend.start_step(backend.together([layer.job for layer in layers]))
    layers[0].words[0] = 1
    layers[0].job.drain()
    backend.close()
    for layer in layers:
        layer.job.drain()
        assert int(layer.words[1]) == 1
    assert layers[2].job.totals.take() == StepSums(0, 0, 0)


def test_what_cannot_be_prepared_is_refused(backend, layers):
    with pytest.raises(NotImplementedError, match="watches"):
        layers[0].job.describe(PagedKV(1, 2, 16, SIZE, torch.float64, "cpu"), 0.25, None, None)
    with pytest.raises(NotImplementedError, match="has prepared"):
        backend.together([object()])
    with pytest.raises(NotImplementedError, match="put together"):
        backend.start_step(layers)


def test_threads_spin_as_long_as_they_are_told(backend):
    import copy
    import pickle

    from scout_hf.kernels.cpu import make_backend

    made = make_backend("native", 1, spin_us=7)
    for each in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert each.spin_us == each._pool.spin_us == 7 and each.threads == 1
    assert make_backend("torch", 1, spin_us=7).spin_us == 7 and make_backend("native").spin_us == 100
