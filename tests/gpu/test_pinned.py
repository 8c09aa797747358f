"""Pages on huge pages that are pinned, as those of real models are, here of a small one. Skipped without a GPU."""

from __future__ import annotations

import gc

import pytest
import torch

pytest.importorskip("triton")

import scout_hf  # noqa: E402
from scout_hf.stores import memory  # noqa: E402
from scout_hf.stores.streams import Links  # noqa: E402
from tests.gpu.test_decode import SPARSE, WAYS, on_gpu  # noqa: E402
from tests.integration.common import assert_equal, llama, prompt, run  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
OPTIONS = SPARSE | {"cpu_query": "real"}
LARGE_BYTES = memory.HUGE_BYTES


@pytest.fixture
def registered(monkeypatch):
    """Sizes of the slabs that were mapped and pinned: from two ordinary pages on, not only from two huge ones."""
    sizes, pin = [], memory.pin
    monkeypatch.setattr(memory, "HUGE_BYTES", 4096)
    monkeypatch.setattr(memory, "pin", lambda address, size: (pin(address, size), sizes.append(size)))
    return sizes


def decode(way, new=60):
    with scout_hf.patch(llama().cuda(), **OPTIONS, hand_over=way) as handle:
        got = run(handle.model, on_gpu(prompt(2, 60)), new=new)
        return got, handle.stats()


@pytest.mark.parametrize("way", WAYS)
def test_write_back_and_recall_over_registered_memory(registered, way, monkeypatch):
    got, stats = decode(way)
    assert registered and max(registered) < 2 * LARGE_BYTES
    assert all(layer.recalled_blocks for layer in stats.layers)
    slabs = [slab for layer in got.past_key_values.scout_layers for pool in layer.method.pools() for slab in pool.slabs]
    assert slabs and all(slab.is_pinned() for slab in slabs)
    monkeypatch.setattr(memory, "HUGE_BYTES", LARGE_BYTES)
    count = len(registered)
    expected, _ = decode(way)
    assert len(registered) == count  # torch has pinned these
    assert_equal(got, expected)


class SlowLinks(Links):
    """What runs beside the main stream begins much later than it was launched."""

    def beside(self, name, device, *tensors, after=None):
        context = super().beside(name, device, *tensors, after=after)

        class Slow:
            def __enter__(self):
                mark = context.__enter__()
                torch.cuda._sleep(50_000_000)
                return mark

            def __exit__(self, *error):
                return context.__exit__(*error)

        return Slow()


@pytest.mark.parametrize("way", WAYS)
def test_a_cache_is_dropped_while_its_copies_run(registered, way, monkeypatch):
    """A kernel that reads memory which is no longer mapped would break the device for the whole process."""
    expected, _ = decode(way)
    ids = prompt(2, 60).cuda()
    with monkeypatch.context() as late:
        late.setattr("scout_hf.pass_hooks.Links", SlowLinks)
        handle = scout_hf.patch(llama().cuda(), **OPTIONS, hand_over=way)
    with handle, torch.no_grad():
        for steps in (1, 2, 9):
            cache = handle.new_cache()
            token = handle.model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
            for _ in range(steps):
                token = handle.model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            del cache
            gc.collect()
    torch.cuda.synchronize()
    got, _ = decode(way)
    assert_equal(got, expected)
