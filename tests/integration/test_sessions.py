"""A saved cache goes on as if it had never left: bitwise, for every method, tier, dtype and kind of layer."""

import json
import os
import stat

import pytest
import safetensors
import torch
import xxhash

import scout_hf
from scout_hf import CACHE, ScoutCache, SessionError
from scout_hf.sessions.container import ALIGNED
from scout_hf.sessions.folder import ABOUT, PAGES, TENSORS
from tests.integration.common import left_padded, llama, one_llama, prompt
from tests.patches.tiny import own_cache, tiny_model

TIERED = {"block_size": 8, "window": 8}
SETTINGS = {
    "defaults": {},
    "exact": {"budget": None, "block_size": 8},
    "sparse": TIERED | {"budget": 32},
    "by mass": TIERED | {"budget": 64, "mass": 0.9},
    "min/max": TIERED | {"budget": 32, "digest": "minmax"},
    "int8": TIERED | {"budget": 32, "host_dtype": "int8"},
    "dense layers": TIERED | {"budget": 32, "dense_layers": (1,)},
    "two tiers": TIERED | {"budget": 32, "split": "cpu", "resident": 16},
    "two tiers, predicted": TIERED
    | {"budget": 24, "split": "cpu", "resident": 16, "recall": 1, "cpu_query": "predicted"},
    "two tiers, int8": TIERED | {"budget": 32, "split": "cpu", "host_dtype": "int8"},
    "two tiers, a share": TIERED | {"budget": 0.3, "split": "cpu"},
    "dense": TIERED | {"method": "dense"},
    "kvpr": TIERED | {"method": "kvpr", "method_options": {"share": 0.5}},
    "hgca": {"method": "hgca", "block_size": 8, "budget": 32, "method_options": {"least": 2}},
    "infinigen": TIERED | {"method": "infinigen", "budget": 40},
    "infinigen, kept": TIERED | {"method": "infinigen", "budget": 0.4, "method_options": {"keep": True}},
}
INPUTS = {
    "one row": {"input_ids": prompt(1, 101)},
    "padded rows": left_padded(0, 13, 40, tokens=90),
    "one block": {"input_ids": prompt(2, 8)},
}
FAMILIES = ("llama", "gemma3", "qwen3_next", "gpt_oss")


class Conversation:
    """Passes over one cache, with the padding mask that they need."""

    def __init__(self, model, cache, inputs, seed: int = 7):
        self.model, self.cache = model, cache
        mask = inputs.get("attention_mask")
        self.mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
        self.seed = seed
        self.first = inputs["input_ids"]

    def read(self):
        """The prompt."""
        return self._run(self.first)

    def go_on(self, steps: int = 12, turn: int = 5):
        """Decode steps, then a turn of several tokens, then steps: logits of all."""
        rows, found = len(self.first), []
        for tokens in (*(1 for _ in range(steps)), turn, *(1 for _ in range(steps))):
            self.seed += 1
            self.mask = torch.nn.functional.pad(self.mask, (0, tokens), value=1)
            found.append(self._run(prompt(rows, tokens, seed=self.seed)))
        return torch.cat(found, dim=1)

    @torch.no_grad()
    def _run(self, ids):
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return self.model(ids, attention_mask=self.mask, position_ids=positions, **{CACHE: self.cache}).logits

    def with_cache(self, cache):
        """The same conversation, up to here, over another cache."""
        twin = Conversation(self.model, cache, {"input_ids": self.first}, self.seed)
        twin.mask = self.mask
        return twin


def begun(model, handle, inputs, steps: int = 5):
    """A conversation in the middle of a block."""
    talk = Conversation(model, handle.new_cache(), inputs)
    talk.read()
    talk.go_on(steps, turn=3)
    return talk


def assert_goes_on(talk, path, **options):
    """What comes after saving and loading is what comes without."""
    talk.cache.save(path)
    loaded = ScoutCache.load(path, talk.model, **options)
    assert loaded.get_seq_length() == talk.cache.get_seq_length()
    again = talk.with_cache(loaded)
    assert torch.equal(talk.go_on(), again.go_on())
    return loaded


# -- what comes back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.thin(3)
def test_a_loaded_cache_goes_on_bitwise(options, inputs, tmp_path):
    model = one_llama()
    with scout_hf.patch(model, **options) as handle:
        assert_goes_on(begun(model, handle, inputs), tmp_path / "kv")


@pytest.mark.parametrize("name", ["sparse", "min/max", "two tiers"])
def test_a_text_shorter_than_a_block(name, tmp_path):
    """No digest is fitted yet."""
    model = one_llama()
    with scout_hf.patch(model, **SETTINGS[name]) as handle:
        talk = Conversation(model, handle.new_cache(), {"input_ids": prompt(1, 5)})
        talk.read()
        assert_goes_on(talk, tmp_path / "kv")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["sparse", "two tiers", "hgca", "kvpr"])
@pytest.mark.thin(3)
def test_other_dtypes(name, dtype, tmp_path):
    model = llama(dtype=dtype)
    with scout_hf.patch(model, **SETTINGS[name]) as handle:
        assert_goes_on(begun(model, handle, INPUTS["padded rows"]), tmp_path / "kv")


@pytest.mark.parametrize("options", [SETTINGS["sparse"], SETTINGS["two tiers"], SETTINGS["dense"]], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.thin(2)
def test_sliding_and_linear_layers_come_back_too(name, options, tmp_path):
    if reason := own_cache(name):
        pytest.skip(reason)
    model = tiny_model(name)
    with scout_hf.patch(model, **options) as handle:
        assert_goes_on(begun(model, handle, INPUTS["one row"]), tmp_path / "kv")


@pytest.mark.parametrize("name", ["sparse", "two tiers", "int8", "hgca"])
def test_a_cache_that_was_loaded_is_saved_again(name, tmp_path):
    """Pages of the file and of memory in one table; forks share them."""
    model = one_llama()
    with scout_hf.patch(model, **SETTINGS[name]) as handle:
        talk = begun(model, handle, INPUTS["padded rows"])
        talk.cache.save(tmp_path / "first")
        talk = talk.with_cache(ScoutCache.load(tmp_path / "first", model))
        talk.go_on()
        talk.cache.save(tmp_path / "first")  # over the file that is mapped
        fork = talk.with_cache(talk.cache.fork())
        again = talk.with_cache(ScoutCache.load(tmp_path / "first", model))
        expected = talk.go_on()
        assert torch.equal(expected, again.go_on()) and torch.equal(expected, fork.go_on())


@pytest.mark.parametrize("name", ["sparse", "two tiers"])
def test_a_loaded_cache_is_cropped_reordered_and_forked(name, tmp_path):
    """Into the middle of a block of the file, whose page must be copied before it is written."""
    model = one_llama()
    with scout_hf.patch(model, **SETTINGS[name]) as handle:
        talk = begun(model, handle, INPUTS["padded rows"])
        talk.cache.save(tmp_path / "kv")
        loaded = ScoutCache.load(tmp_path / "kv", model)
        found = []
        for cache in (talk.cache, loaded):
            cache.crop(-29)
            cache.batch_select_indices(torch.tensor([2, 0, 1, 2]))
            other = talk.with_cache(cache)
            other.first, other.mask = talk.first[[2, 0, 1, 2]], talk.mask[[2, 0, 1, 2], :-29]
            found.append(other.go_on())
        assert torch.equal(*found)
        again = ScoutCache.load(tmp_path / "kv", model)
        again.save(tmp_path / "again")  # at once: it knows its model
        assert torch.equal(again.layers[0].keys, ScoutCache.load(tmp_path / "again", model).layers[0].keys)


def test_the_pages_are_those_of_the_file_until_they_are_written(tmp_path):
    """Otherwise nothing above says anything about mapped pages."""
    model = one_llama()
    with scout_hf.patch(model, **SETTINGS["sparse"]) as handle:
        talk = begun(model, handle, INPUTS["one row"])
        talk.cache.save(tmp_path / "kv")
        loaded = ScoutCache.load(tmp_path / "kv", model)
        pool = loaded.layers[0].method.kv.table.pool
        assert pool.guards and not pool.checked and pool.used_pages == len(pool.slabs[0])
        talk.with_cache(loaded).go_on(steps=2, turn=1)
        assert len(pool.slabs) == 2 and not pool.checked  # sparse: not all blocks were wanted
        assert loaded.layers[0].keys is not None and pool.checked


# -- other settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", ["exact", "min/max", "two tiers", "dense", "kvpr", "hgca", "infinigen"])
@pytest.mark.parametrize("before", ["sparse", "two tiers", "infinigen"])
@pytest.mark.thin(3)
def test_other_settings_find_the_same_keys_and_values(before, after, tmp_path):
    model = one_llama()
    with scout_hf.patch(model, **SETTINGS[before]) as handle:
        talk = begun(model, handle, INPUTS["padded rows"])
        talk.cache.save(tmp_path / "kv")
    given = {"budget": 2048, "window": 64, "split": "auto", "resident": None, "digest": "auto", "method": "scout"}
    loaded = ScoutCache.load(tmp_path / "kv", model, **(given | {"method_options": None} | SETTINGS[after]))
    for one, other in zip(talk.cache.layers, loaded.layers):
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
    with scout_hf.patch(model, **SETTINGS[after]):
        assert torch.isfinite(talk.with_cache(loaded).go_on()).all()


def test_an_exact_setting_is_exact_after_a_sparse_one(tmp_path):
    model = one_llama()
    with scout_hf.patch(model, **SETTINGS["sparse"]) as handle:
        talk = Conversation(model, handle.new_cache(), INPUTS["padded rows"])
        talk.read()
        talk.cache.save(tmp_path / "kv")
        stock = talk.with_cache(talk.cache.to_dynamic())
        exact = talk.with_cache(ScoutCache.load(tmp_path / "kv", model, budget=None)).go_on()
    error = (exact - stock.go_on()).abs().max()
    assert error <= 3e-6


# -- the folder -------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A model, a conversation and its session."""
    model = one_llama()
    with scout_hf.patch(model, **SETTINGS["sparse"]) as handle:
        talk = begun(model, handle, INPUTS["one row"])
        talk.cache.save(tmp_path / "kv")
        yield model, talk, tmp_path / "kv"


def test_it_is_private_and_made_of_json_and_safetensors(saved):
    _, _, path = saved
    assert sorted(os.listdir(path)) == sorted([ABOUT, PAGES, TENSORS])
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert all(stat.S_IMODE((path / name).stat().st_mode) == 0o600 for name in os.listdir(path))
    for name in (PAGES, TENSORS):
        with safetensors.safe_open(path / name, "pt") as file:
            assert file.keys()
    with (path / PAGES).open("rb") as file:
        assert (8 + int.from_bytes(file.read(8), "little")) % ALIGNED == 0
    assert json.loads((path / ABOUT).read_text())["about"]["tokens"] > 101


def test_a_model_of_another_name_is_the_same(saved):
    model = llama()
    model.config._name_or_path, model.config.eos_token_id = "elsewhere", 5
    model.set_attn_implementation("eager")
    assert ScoutCache.load(saved[2], model).get_seq_length() > 0


@pytest.mark.parametrize(
    "other",
    [
        lambda: llama(seed=1),
        lambda: llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        lambda: llama(num_hidden_layers=4),
        lambda: llama(dtype=torch.bfloat16),
        lambda: tiny_model("mistral"),
    ],
    ids=["weights", "rope", "layers", "dtype", "family"],
)
def test_another_model_is_refused(saved, other):
    with pytest.raises(SessionError, match="another model|other weights"):
        ScoutCache.load(saved[2], other())


def test_a_single_changed_weight_of_those_that_are_read_is_noticed(saved):
    model, _, path = saved
    weight = model.model.layers[1].self_attn.k_proj.weight.data
    before = weight[0, 0].clone()
    weight[0, 0] += 1
    try:
        with pytest.raises(SessionError, match="other weights"):
            ScoutCache.load(path, model)
    finally:
        weight[0, 0] = before
    ScoutCache.load(path, model)


def test_nothing_to_save_and_nowhere_to_save_it(saved, tmp_path):
    model, talk, _ = saved
    with pytest.raises(scout_hf.SavingError, match="no tokens"):
        ScoutCache(model.config).save(tmp_path / "empty", model)
    outside = ScoutCache(model.config)
    for layer in range(3):
        outside.update(*torch.randn(2, 1, 2, 9, 8), layer)
    with pytest.raises(scout_hf.SavingError, match="pass the model"):
        outside.save(tmp_path / "unknown")
    outside.save(tmp_path / "known", model)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for name in ("other", "file"):
        with pytest.raises(scout_hf.SavingError, match="take another name"):
            talk.cache.save(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        talk.cache.save(tmp_path / "no" / "folder")
    with pytest.raises(SessionError, match="no session"):
        ScoutCache.load(tmp_path / "other", model)
    assert sorted(os.listdir(tmp_path)) == ["file", "known", "kv", "other"]


@pytest.mark.parametrize("name", ["defaults", "sparse", "two tiers", "int8"])
def test_a_cropped_cache_is_saved_and_opened(name, tmp_path):
    """Its digest was fitted to more blocks than are left."""
    model = one_llama()
    with scout_hf.patch(model, **SETTINGS[name]) as handle:
        talk = begun(model, handle, {"input_ids": prompt(1, 201)})
        talk.cache.crop(-120)
        talk.mask = talk.mask[:, :-120]
        assert_goes_on(talk, tmp_path / "kv")


def test_a_pass_of_another_thread_voids_what_is_being_saved(tmp_path):
    model = llama()
    with scout_hf.patch(model, **SETTINGS["sparse"]) as handle:
        talk = begun(model, handle, INPUTS["one row"])
        method = talk.cache.layers[2].method
        looked = method.state_dict

        def late():
            method.state_dict = looked
            talk.go_on(1, turn=1)
            return looked()

        method.state_dict = late
        with pytest.raises(scout_hf.CacheStateError, match="nothing was written"):
            talk.cache.save(tmp_path / "kv")
        assert os.listdir(tmp_path) == []


def rewrite(path, change):
    """Change what a session says, with a hash that fits."""
    said = json.loads((path / ABOUT).read_text())
    change(said)
    del said["hash"]
    said["hash"] = xxhash.xxh3_128_hexdigest(json.dumps(said, sort_keys=True).encode())
    (path / ABOUT).write_text(json.dumps(said))


def test_layers_of_different_lengths_are_refused(saved):
    model, _, path = saved
    rewrite(path, lambda said: said["state"]["layers"][1].update(state=None))
    with pytest.raises(SessionError, match="different numbers of tokens"):
        ScoutCache.load(path, model)


def of_first(said):
    """The state of the first layer."""
    return said["state"]["layers"][0]["state"]


@pytest.mark.parametrize(
    "change",
    [
        lambda said: said["settings"].update(method="os.system"),
        lambda said: said["settings"].update(digest="nothing"),
        lambda said: said["state"].update(layers=3),
        lambda said: of_first(said)["method"]["kv"].update(length=10**9),
        lambda said: of_first(said).update(dtype={"~": "dtype", "name": "load"}),
        lambda said: of_first(said).update(heads=-3),
        lambda said: of_first(said)["method"].update(query_shape=[8, "x"]),
        lambda said: of_first(said)["method"]["selector"].update(codes={"~": "tensor", "name": "x"}),
    ],
)
def test_absurd_values_are_refused(saved, change):
    model, _, path = saved
    rewrite(path, change)
    with pytest.raises(SessionError):
        ScoutCache.load(path, model)


def test_what_a_model_computed_does_not_make_it_another(tmp_path):
    """A dynamic rotary embedding changes its frequencies with the length of a text."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = llama(rope_parameters=rope, max_position_embeddings=64)
    with scout_hf.patch(model, **SETTINGS["sparse"]) as handle, torch.no_grad():
        cache = handle.new_cache()
        model(prompt(1, 40), **{CACHE: cache})
        cache.save(tmp_path / "kv")
        model(prompt(1, 100))
        assert ScoutCache.load(tmp_path / "kv", model).get_seq_length() == 40


def test_adapters_count_as_far_as_they_are_active(tmp_path):
    peft = pytest.importorskip("peft")
    settings = {"r": 2, "target_modules": ["k_proj", "v_proj"], "init_lora_weights": False}
    model = peft.get_peft_model(llama(), peft.LoraConfig(**settings))
    with scout_hf.patch(model, **SETTINGS["sparse"]) as handle, torch.no_grad():
        inner = handle.model
        cache = handle.new_cache()
        inner(prompt(1, 40), **{CACHE: cache})
        cache.save(tmp_path / "kv")
        model.add_adapter("two", peft.LoraConfig(**settings))
        assert ScoutCache.load(tmp_path / "kv", inner).get_seq_length() == 40
        model.set_adapter("two")
        with pytest.raises(SessionError, match="other weights"):
            ScoutCache.load(tmp_path / "kv", inner)
        model.set_adapter("default")
        with model.disable_adapter(), pytest.raises(SessionError, match="other weights"):
            ScoutCache.load(tmp_path / "kv", inner)


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    model = one_llama()
    with scout_hf.patch(model, **SETTINGS["sparse"]) as handle:
        talk = begun(model, handle, INPUTS["one row"])
        for _ in range(2):
            talk.cache.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and sorted(os.listdir(tmp_path)) == ["disk", "link"]
    assert ScoutCache.load(tmp_path / "disk", model).get_seq_length() == talk.cache.get_seq_length()


@pytest.mark.parametrize("more", [{}, {"host_memory": "256KiB"}, {"split": "cpu", "window": 8}], ids=str)
def test_a_turn_behind_more_than_one_piece_of_the_past_is_bitwise_the_same(more, tmp_path, monkeypatch):
    """Several new tokens read the past in place, in pieces, whether its pages lie in a file or in memory."""
    monkeypatch.setattr("scout_hf.kernels.cpu.native_backend.PIECE_TOKENS", 32)
    model = one_llama()
    with scout_hf.patch(model, block_size=8, budget=None, **more) as handle:
        assert_goes_on(begun(model, handle, INPUTS["one row"]), tmp_path / "kv", **more)
        assert_goes_on(begun(model, handle, INPUTS["padded rows"]), tmp_path / "other", host_memory=None)


@pytest.mark.parametrize("name", ["sparse", "min/max", "two tiers"])
@pytest.mark.parametrize("change", ["narrower", "another dtype", "query power"])
def test_codes_that_native_code_would_read_beyond_are_refused(name, change):
    """A session that was edited by hand, with all hashes made anew."""
    model = one_llama()
    with scout_hf.patch(model, **SETTINGS[name]) as handle:
        layer = begun(model, handle, INPUTS["one row"]).cache.layers[1]
    state = layer.state_dict()
    selector = state["method"]["selector"]
    if change == "query power":
        selector["query_power"] = torch.zeros(1, 2, 3)
    else:
        codes = selector["codes"]
        selector["codes"] = codes[..., :-1] if change == "narrower" else codes.to(torch.int16)
    with pytest.raises(SessionError, match="query_power" if change == "query power" else "codes"):
        type(layer)(layer.config, 1).load_state_dict(state, torch.device("cpu"))
