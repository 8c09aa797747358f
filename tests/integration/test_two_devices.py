"""A model whose layers accelerate has spread over two GPUs, here two fakes: every layer's part on its own device."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from transformers import DynamicCache

pytest.importorskip("triton")
accelerate = pytest.importorskip("accelerate")

import scout_hf  # noqa: E402
from scout_hf.methods import offloading  # noqa: E402
from scout_hf.methods.scout import executor_triton  # noqa: E402
from scout_hf.methods.scout.executor_triton import TritonExecutor  # noqa: E402
from scout_hf.selection.table import DigestTable  # noqa: E402
from scout_hf.step import Role, Step  # noqa: E402
from scout_hf.stores.staging import Staging  # noqa: E402
from tests.fake_cuda import Event, Stream, install, use_kernels, use_references  # noqa: E402
from tests.fake_devices import FakeDevices, MixedDevices, OnDevice, unwrapped  # noqa: E402
from tests.integration.common import EXACT, LOSSY, assert_close, left_padded, llama, prompt, run  # noqa: E402
from tests.libraries import ISAS  # noqa: E402

FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")
CPU = torch.device("cpu")
LAYERS = {"num_hidden_layers": 4}
INPUTS = {"rows": left_padded(0, 0, tokens=54), "padded": left_padded(0, 13, tokens=54)}
"""Two tokens before a block is full."""


def place(layer: int) -> torch.device:
    """Two layers on the first device, the others on the second."""
    return FIRST if layer < 2 else SECOND


LAST = {"model.norm": "cuda:1", "lm_head": "cuda:1"}
HALVES = {"model.embed_tokens": "cuda:0", "model.rotary_emb": "cuda:0"} | LAST
HALVES |= {f"model.layers.{layer}": str(place(layer)) for layer in range(4)}
"""As ``from_pretrained(device_map="auto")`` spreads a model: what comes last is where the last layers are."""


def spread(model, places):
    skipped = model._skip_keys_device_placement
    return accelerate.dispatch_model(model, places, main_device="cuda:0", skip_keys=skipped)


def there(tensor):
    """Where generate() has inputs: on the model's first device."""
    return OnDevice(tensor, FIRST)


@pytest.fixture
def cuda(monkeypatch):
    return install(monkeypatch)


@pytest.fixture
def kernels(monkeypatch, cuda):
    return use_references(monkeypatch, cuda)


@contextlib.contextmanager
def patched(places=HALVES, overrides=None, **options):
    with torch.no_grad(), FakeDevices():
        model = spread(llama(**LAYERS | (overrides or {})), places)
        with scout_hf.patch(model, **options) as handle:
            yield handle


def go(model, cache, inputs, there=lambda tensor: tensor):
    """Last logits of a prompt, of decode steps, of a longer turn, and after all that can be done to a cache."""
    mask, found = inputs["attention_mask"], []

    def forward(new, cache):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
        given = {"input_ids": new, "attention_mask": mask, "position_ids": positions}
        given = {name: there(part) for name, part in given.items()}
        found.append(unwrapped(model(**given, past_key_values=cache, use_cache=True).logits)[:, -1])

    def more(tokens, cache=cache):
        nonlocal mask
        new = prompt(len(mask), tokens, seed=mask.shape[1])
        mask = torch.cat([mask, torch.ones_like(new)], dim=1)
        forward(new, cache)

    forward(inputs["input_ids"], cache)
    for tokens in (1, 1, 1, 20, 1):
        more(tokens)
    cache.crop(-27)
    mask = mask[:, :-27]
    for tokens in (1, 1):
        more(tokens)
    cache.reorder_cache(there(torch.tensor([1, 0])))
    mask = mask[[1, 0]]
    for tokens in (1, 9, 1):
        more(tokens)
    cache.batch_select_indices(there(torch.tensor([1])))
    mask, twin = mask[1:], copy.deepcopy(cache)
    before = mask
    for each in (twin, cache):
        mask = before
        for tokens in (1, 1):
            more(tokens, each)
    return torch.cat(found)


TIERS = {"block_size": 8, "window": 8, "resident": 16}
TRITON = TIERS | {"gpu_kernels": "triton", "layer_ahead": False}
SETTINGS = {
    "kernels, join": TRITON | {"hand_over": "join"},
    "kernels, selected ahead": TRITON | {"layer_ahead": True, "cpu_query": "real", "budget": 4096},
    "kernels, share of the context": TRITON | {"budget": 0.999, "digest": "minmax", "recall": 1},
    **({"kernels, flags": TRITON | {"hand_over": "flags"}} if ISAS else {}),
    "torch": TIERS | {"gpu_kernels": "torch", "layer_ahead": False, "recall": 1},
    "torch, selected ahead": TIERS | {"gpu_kernels": "torch", "layer_ahead": True, "cpu_query": "real"},
    "dense": TIERS | {"method": "dense"},
    "infinigen": TIERS | {"method": "infinigen"},
    "infinigen, kept": TIERS | {"method": "infinigen", "method_options": {"keep": True}},
    "hgca": TIERS | {"method": "hgca", "method_options": {"threshold": 0}},
    "kvpr": TIERS | {"method": "kvpr", "method_options": {"share": 0.5}},
    "kvpr, inputs on the device": TIERS | {"method": "kvpr", "method_options": {"share": 0.5, "inputs": "device"}},
}


@pytest.fixture(scope="module")
def expected():
    """What the stock model does on one CPU."""
    with torch.no_grad():
        return {name: go(model, DynamicCache(config=model.config), inputs) for name, inputs in INPUTS.items()
                for model in [llama(**LAYERS)]}  # fmt: skip


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.thin(2)
def test_layers_on_two_devices(cuda, kernels, expected, name, inputs):
    with patched(**{"budget": None} | SETTINGS[name]) as handle:
        cache = handle.new_cache()
        got = go(handle.model, cache, INPUTS[inputs], there)
        for layer in cache.layers:
            check_places(layer.method, place(layer.layer_idx))
        assert all(stream.device == device for (device, _), stream in handle._hooks.links._streams.items())
    assert (got - expected[inputs]).abs().max() <= 3e-6
    assert name.startswith("kernels") == bool(cuda.launched)
    if cuda.launched:
        check_launches(cuda)


def test_pages_are_read_where_the_device_has_them(monkeypatch, cuda, kernels, expected):
    """On a GPU that does not read pinned memory at the host's addresses."""
    moved, copy_blocks = 1 << 40, kernels.copy_blocks
    monkeypatch.setattr("scout_hf.stores.pages.host_address_serves", lambda: False)
    monkeypatch.setattr("scout_hf.stores.pages.device_address", lambda address: address + moved)
    kernels.copy_blocks = lambda pages, *args: copy_blocks((pages - moved).clamp(min=0), *args)
    with patched(**SETTINGS["kernels, share of the context"]) as handle:
        got = go(handle.model, handle.new_cache(), INPUTS["padded"], there)
    assert (got - expected["padded"]).abs().max() <= 3e-6


def check_places(method, device):
    """Everything that a method keeps on a device is on that one, and its work was on streams of that one."""
    seen, todo, found = set(), [method], set()
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, (str, int, float, type, Staging)):
            continue  # staging memory is the whole cache's
        seen.add(id(thing))
        if isinstance(thing, (torch.Tensor, Stream, Event)):
            found.add(thing.device)
        elif isinstance(thing, dict):
            todo += thing.values()
        elif isinstance(thing, (list, tuple)):
            todo += thing
        elif type(thing).__module__.startswith("scout_hf") and hasattr(thing, "__dict__"):
            todo += vars(thing).values()
    assert device in found and found <= {device, CPU}
    assert all(part.device == device for part in method.kv.tail())
    if isinstance(getattr(method, "executor", None), TritonExecutor):
        slots = method.resident
        mine = [
            slots.keys,
            slots.values,
            slots.ids,
            slots.slot_of,
            method.executor.pages,
            method.executor.handoff.mail.number,
        ]
        if method.selector.blocks:
            mine.append(method.selector.table.codes())
        assert {part.device for part in mine} == {device}
        assert method.written._event.device == method.executor.recalled._event.device == device


def check_launches(cuda):
    """Either device has done as much; recalls went beside, all else did not."""
    for device in (FIRST, SECOND):
        mine = [launch for launch in cuda.launched if launch.device == device]
        assert len(mine) == len(cuda.launched) / 2
        beside = [launch for launch in mine if launch.stream is not cuda.main[device]]
        assert {launch.name for launch in beside} == {"copy_blocks"}
        assert {launch.stream.device for launch in mine} == {device}


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("kind", ["triton", "torch"])
def test_generate(kernels, kind, options):
    stock = run(llama(**LAYERS), INPUTS["padded"], new=6, **options)
    with patched(**EXACT | TIERS, gpu_kernels=kind) as handle:
        got = run(handle.model, {name: there(part) for name, part in INPUTS["padded"].items()}, new=6, **options)
    assert_close(plain(got), stock)


def plain(output):
    """What was generated, off the devices."""
    for name in ("sequences", "logits"):
        output[name] = unwrapped(output[name])
    return output


WAYS = ["join", "flags"] if ISAS else ["join"]
SMALL = LOSSY | {"split": "auto", "digest": "minmax", "gpu_kernels": "triton"}
SPARSE = {"recall": LOSSY, "seldom": LOSSY | {"recall": 0.4}, "auto": LOSSY | {"cpu_query": "auto", "recall": 3}}


@pytest.mark.parametrize(
    ("case", "way"),
    [
        ("recall", "torch"),
        *(("recall", way) for way in WAYS),
        ("seldom", WAYS[-1]),
        ("auto", "join"),
        *(pytest.param(*each, marks=pytest.mark.full) for each in (("seldom", "torch"), ("auto", "torch"))),
        *(pytest.param(*each, marks=pytest.mark.full) for each in (("seldom", "join"), ("auto", "flags")) if ISAS),
    ],
)
def test_what_is_chosen_is_what_one_cpu_chooses(cuda, kernels, case, way):
    """Selection, prediction from the device before, recall and trust do not depend on where layers are."""
    how = {"gpu_kernels": "torch"} if way == "torch" else {"gpu_kernels": "triton", "hand_over": way}
    options = SPARSE[case] | {"digest": "minmax"}
    with scout_hf.patch(llama(**LAYERS), **options, gpu_kernels="torch") as handle:
        one = run(handle.model, INPUTS["padded"], new=9)
        expected = handle.stats()
    with patched(**options | {"split": "auto"} | how) as handle:
        got = run(handle.model, {name: there(part) for name, part in INPUTS["padded"].items()}, new=9)
        stats = handle.stats()
    assert_close(plain(got), one, 2e-5)
    assert [layer.recalled_blocks for layer in stats.layers] == [layer.recalled_blocks for layer in expected.layers]
    if case == "recall":
        assert all(layer.recalled_blocks for layer in stats.layers)


EMBEDDED_APART = {"model.embed_tokens": "cuda:0", "model.rotary_emb": "cuda:0", "model.layers": "cuda:1"} | LAST
HEAD_APART = {"model": "cuda:0", "lm_head": "cuda:1"}


@pytest.mark.parametrize("places", [HALVES, EMBEDDED_APART], ids=["layers apart", "embeddings apart"])
def test_steps_over_two_devices_are_not_captured(kernels, monkeypatch, expected, places):
    monkeypatch.setattr("scout_hf.graph.CudaGraph", None)
    with patched(places, **TRITON, budget=None, hand_over="graph") as handle:
        got = go(handle.model, handle.new_cache(), INPUTS["rows"], there)
    assert (got - expected["rows"]).abs().max() <= 3e-6


@pytest.mark.skipif(not ISAS, reason="without the native library nothing is captured")
def test_steps_of_a_decoder_on_one_device_are(kernels, monkeypatch):
    """Accelerate has wrapped the decoder's forward here; settings of its config still keep it from being captured."""
    monkeypatch.setattr("scout_hf.graph.CudaGraph", None)
    options = TRITON | {"budget": None, "hand_over": "graph"}
    with patched(HEAD_APART, {"output_hidden_states": True}, **options) as handle:
        go(handle.model, handle.new_cache(), INPUTS["rows"], there)
    with patched(HEAD_APART, **options) as handle, pytest.raises(TypeError, match="'NoneType' object is not callable"):
        go(handle.model, handle.new_cache(), INPUTS["rows"], there)


TIMELINES = ["kernels, join", *(["kernels, flags"] if ISAS else []), "torch", "dense"]


@pytest.mark.parametrize("name", TIMELINES)
def test_a_timeline_has_the_streams_of_both(kernels, tmp_path, name):
    recall = {} if "method" in SETTINGS[name] else {"recall": 1}
    with patched(**SETTINGS[name] | {"budget": 24, "layer_ahead": True} | recall) as handle:
        with handle.trace(tmp_path / "step.json", steps=6) as trace:
            run(handle.model, {key: there(part) for key, part in INPUTS["rows"].items()}, new=8)
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


def launch_all(way):
    with patched(**SMALL, hand_over=way) as handle:
        given = {"input_ids": there(prompt(1, 47)), "attention_mask": there(torch.ones(1, 47, dtype=torch.int64))}
        return run(handle.model, given, new=3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize("way", [*(pytest.param(way, marks=pytest.mark.full) for way in WAYS[:-1]), WAYS[-1]])
def test_kernels_are_launched_where_their_tensors_are(monkeypatch, cuda, way):
    """Triton launches on the current device, which neither accelerate nor transformers sets."""
    use_kernels(monkeypatch, cuda)
    got = launch_all(way)
    with scout_hf.patch(llama(**LAYERS), **LOSSY, digest="minmax") as handle:
        assert_close(plain(got), run(handle.model, prompt(1, 47), new=3), 2e-5)
    names = {device: {launch.name for launch in cuda.launched if launch.device == device} for device in (FIRST, SECOND)}
    usual = {"_attend", "_merge", "_choose", "_plan", "_copy", "_adopt", "_encode_bounds", "_score_minmax"}
    assert names[FIRST] == names[SECOND] == usual | ({"_post", "_wait"} if way == "flags" else set())


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_a_launch_on_the_wrong_device_is_seen(monkeypatch, cuda):
    use_kernels(monkeypatch, cuda)
    monkeypatch.setattr("scout_hf.kernels.triton.launch.on_device_of", lambda tensor: contextlib.nullcontext())
    with pytest.raises(MixedDevices, match="launched on cuda:0 for tensors on cuda:1"):
        launch_all("join")


def on_first(monkeypatch, owner, name, at):
    """Whatever is made there is made on the first device."""
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: real(*args[:at], FIRST, *args[at + 1 :]))


PLANTED = {
    "slots": lambda patch: on_first(patch, executor_triton, "MappedSlots", 6),
    "tail": lambda patch: on_first(patch, offloading, "TwoTierKV", 5),
    "mask": lambda patch: on_first(patch, Step, "padding", 1),
    "length": lambda patch: on_first(patch, Step, "length", 1),
    "codes": lambda patch: on_first(patch, DigestTable, "reserve", 3),
    "streams": lambda patch: on_first(patch, torch.cuda, "Stream", 0),
    "pages": lambda patch: patch.setattr(TritonExecutor, "__init__", then_pages_on_first(TritonExecutor.__init__)),
    "pinned slabs": lambda patch: patch.setattr("scout_hf.stores.memory.pin", lambda address, size: None),
    "mailboxes": lambda patch: patch.setattr("tests.fake_devices.Pinned.add", lambda tensor: tensor),
}  # fmt: skip


def then_pages_on_first(real):
    def init(self, *args):
        real(self, *args)
        self.pages = self.pages.to(FIRST)

    return init


@pytest.mark.parametrize("what", PLANTED)
def test_what_is_in_the_wrong_place_is_seen(monkeypatch, kernels, what):
    """That the tests above can fail."""
    PLANTED[what](monkeypatch)
    with patched(**TRITON | {"budget": 0.999, "digest": "minmax", "recall": 1}) as handle:
        with pytest.raises(MixedDevices):
            go(handle.model, handle.new_cache(), INPUTS["padded"], there)


@pytest.mark.parametrize("digest", ["minmax", "sign"])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("method", ["dense", "kvpr"])
def test_drafts_over_host_memory_on_two_devices(cuda, method, inputs, digest):
    """Sparse steps on the CPU, whose tokens are taken back, and exact passes over the same tokens, on each device."""
    ids, mask = INPUTS[inputs]["input_ids"], INPUTS[inputs]["attention_mask"]
    more = prompt(len(ids), 12, seed=3)
    ids, mask = torch.cat([ids, more], dim=1), torch.cat([mask, torch.ones_like(more)], dim=1)

    def forward(model, cache, first, last, place=lambda tensor: tensor):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, first:last]
        given = {"input_ids": ids[:, first:last], "attention_mask": mask[:, :last], "position_ids": positions}
        given = {name: place(part) for name, part in given.items()}
        return unwrapped(model(**given, past_key_values=cache, use_cache=True).logits)

    with torch.no_grad():
        model = llama(**LAYERS)
        wanted = forward(model, DynamicCache(config=model.config), 0, ids.shape[1])
    known = ids.shape[1] - 12
    options = {"block_size": 8, "window": 8, "budget": 16, "method": method, "digest": digest}
    with patched(draft=3, **options) as handle:
        model, cache = handle.model, handle.new_cache()
        forward(model, cache, 0, known, there)
        for first in range(known, known + 12, 4):
            cache.role = Role.DRAFT
            sparse = [forward(model, cache, at, at + 1, there) for at in range(first, first + 3)]
            cache.crop(-3)
            cache.role = Role.CHECK
            got = forward(model, cache, first, first + 4, there)
            cache.role = Role.ORDINARY
            assert (got - wanted[:, first : first + 4]).abs().max() <= 3e-6
            assert (torch.cat(sparse, dim=1) - wanted[:, first : first + 3]).abs().max() > 1e-4
        for layer in cache.layers:
            check_places(layer.method, place(layer.layer_idx))
            assert layer.method.drafts.selector.blocks
