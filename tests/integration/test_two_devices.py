"""A model with layers on two GPUs (accelerate's device_map), here two fakes: every layer's part on its own device."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

pytest.importorskip("triton")

import scout_hf  # noqa: E402
from scout_hf.methods import two_tiers, two_tiers_triton  # noqa: E402
from scout_hf.stores.staging import Staging  # noqa: E402
from tests.fake_devices import FakeDevices, MixedDevices, OnDevice, install  # noqa: E402
from tests.integration.common import left_padded, llama, prompt  # noqa: E402
from tests.libraries import ISAS  # noqa: E402

DEVICES = [torch.device("cuda:0"), torch.device("cuda:1")]


def spread(model):
    """Embeddings, head and the first two layers on one device, the others on the next; hidden states move between."""
    inner = model.model
    parts = {
        0: [inner.embed_tokens, inner.norm, inner.rotary_emb, model.lm_head, *inner.layers[:2]],
        1: inner.layers[2:],
    }
    for index, modules in parts.items():
        for module in modules:
            for child in module.modules():
                for name, weight in [*child._parameters.items(), *child._buffers.items()]:
                    if weight is not None:
                        moved = OnDevice(weight.detach(), DEVICES[index])
                        if name in child._parameters:
                            moved = torch.nn.Parameter(moved, requires_grad=False)
                            child._parameters[name] = moved
                        else:
                            child._buffers[name] = moved
    for index, module in [*((i // 2, layer) for i, layer in enumerate(inner.layers)), (0, inner.norm)]:
        module.register_forward_pre_hook(lambda module, args, kwargs, index=index: move((args, kwargs), DEVICES[index]),
                                         with_kwargs=True)  # fmt: skip
    return model


def move(given, device):
    """What accelerate's hooks do before a layer."""
    return torch.utils._pytree.tree_map(lambda each: each.to(device) if isinstance(each, OnDevice) else each, given)


@pytest.fixture
def kernels(monkeypatch):
    launched = []
    kernels = install(monkeypatch, launched)
    monkeypatch.setattr("scout_hf.kernels.device._load", lambda: kernels)
    kernels.launched = launched
    return kernels


def there(tensor, device=DEVICES[0]):
    return OnDevice(tensor, device)


def go(model, cache, inputs, steps, chunk):
    """Logits of a prompt, of decode steps, and of a next turn; inputs and outputs on the first device."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    on = (lambda each: each) if cache is None or not isinstance(cache, scout_hf.ScoutCache) else there
    found = []

    def forward(new):
        nonlocal mask
        held = mask.shape[1] - new.shape[1]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, held:]
        given = {"attention_mask": on(mask), "position_ids": on(positions), "past_key_values": cache}
        out = model(input_ids=on(new), **given, use_cache=True).logits
        found.append((out.held if isinstance(out, OnDevice) else out)[:, -1])

    forward(ids)
    for step in range(steps + 1):
        new = prompt(len(ids), chunk if step == steps else 1, seed=step)
        mask = torch.cat([mask, torch.ones_like(new)], dim=1)
        forward(new)
    return torch.stack(found)


SETTINGS = {
    "kernels, join": {"gpu_kernels": "triton", "hand_over": "join"},
    "kernels, selected ahead": {"gpu_kernels": "triton", "layer_ahead": True, "cpu_query": "real", "budget": 4096},
    **({"kernels, flags": {"gpu_kernels": "triton", "hand_over": "flags"}} if ISAS else {}),
    "torch": {"gpu_kernels": "torch"},
    "dense": {"method": "dense"},
    "infinigen": {"method": "infinigen"},
    "hgca": {"method": "hgca", "method_options": {"threshold": 0}},
    "kvpr": {"method": "kvpr", "method_options": {"share": 0.5}},
}


@pytest.mark.parametrize("inputs", [left_padded(0, 0), left_padded(0, 13)], ids=["rows", "padded"])
@pytest.mark.parametrize("name", SETTINGS)
def test_layers_on_two_devices(kernels, name, inputs):
    options = {"budget": None, "layer_ahead": False, "block_size": 8, "window": 8, "resident": 16} | SETTINGS[name]
    with torch.no_grad():
        stock = llama()
        expected = go(stock, DynamicCache(config=stock.config), inputs, 12, 20)
        model = spread(llama())
        with FakeDevices(), scout_hf.patch(model, **options) as handle:
            cache = handle.new_cache()
            got = go(model, cache, inputs, 12, 20)
            for layer in cache.layers:
                check_places(layer.method, DEVICES[layer.layer_idx // 2])
    assert (got - expected).abs().max() <= 3e-6


@pytest.mark.parametrize("name", ["kernels, join", "kernels, flags", "torch", "dense"] if ISAS else ["torch", "dense"])
def test_a_timeline_has_the_streams_of_both(kernels, tmp_path, name):
    options = {"budget": 24, "block_size": 8, "window": 8, "resident": 16, "recall": 1} | SETTINGS[name]
    model = spread(llama())
    with torch.no_grad(), FakeDevices(), scout_hf.patch(model, **options) as handle:
        with handle.trace(tmp_path / "step.json", steps=6) as trace:
            go(model, handle.new_cache(), left_padded(0, 0), 9, 20)
    for number in range(2):
        lane = [span for span in trace.spans if span.lane == f"GPU {number}"]
        assert {span.layer for span in lane if span.kind == "layer"} == {2 * number, 2 * number + 1}
        assert {"ahead", "attend", "settle"} <= {span.kind for span in lane}
        assert all(span.begin <= span.end for span in lane)
    assert len([span for span in trace.spans if span.kind == "device"]) == 6
    shares = [span for span in trace.spans if (span.lane, span.kind) == ("CPU pool", "attention")]
    assert bool(shares) == (name != "dense") and all(span.layer is not None for span in shares)
    copies = {span.lane for span in trace.spans if span.kind == "copy"}
    wanted = {"kernels, join": "GPU 1 write-back", "kernels, flags": "GPU 1 recall"}
    assert wanted.get(name, "copies") in copies


def check_places(method, device):
    """Everything that a method keeps on a device is on that one."""
    seen, todo, found = set(), [method], set()
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, (str, int, float, type, Staging)):
            continue  # staging memory is the whole cache's
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            found.add(thing.device)
        elif isinstance(thing, dict):
            todo += thing.values()
        elif isinstance(thing, (list, tuple)):
            todo += thing
        elif type(thing).__module__.startswith("scout_hf") and hasattr(thing, "__dict__"):
            todo += vars(thing).values()
    assert device in found and found <= {device, torch.device("cpu")}


@pytest.mark.parametrize("kind", ["slots", "tail"])
def test_memory_on_the_wrong_device_is_seen(kernels, monkeypatch, kind):
    if kind == "slots":
        real = two_tiers_triton.MappedSlots
        monkeypatch.setattr(two_tiers_triton, "MappedSlots", lambda *sizes: real(*sizes[:-1], DEVICES[0]))
    else:
        real = two_tiers.TwoTierKV
        monkeypatch.setattr(two_tiers, "TwoTierKV", lambda *sizes: real(*sizes[:5], DEVICES[0], *sizes[6:]))
    model = spread(llama())
    options = {"budget": None, "layer_ahead": False, "block_size": 8, "window": 8, "resident": 16}
    with torch.no_grad(), FakeDevices(), scout_hf.patch(model, **options, gpu_kernels="triton") as handle:
        with pytest.raises(MixedDevices):
            go(model, handle.new_cache(), left_padded(0, 0), 2, 20)


def test_mixing_devices_is_seen():
    with FakeDevices():
        one, other = (there(torch.ones(3), device) for device in DEVICES)
        assert (one + one).device == DEVICES[0] and torch.zeros(2, device="cuda:1").device == DEVICES[1]
        with pytest.raises(MixedDevices):
            one + other
        with pytest.raises(MixedDevices):
            one + torch.ones(3)
        assert (one + other.to(DEVICES[0])).device == DEVICES[0]
