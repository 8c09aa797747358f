"""Layers that attend over the KV of another layer: KV once, and choice, residents and counts for each that attends."""

import copy

import pytest
import torch

import scout_hf
from scout_hf import CACHE, ConfigError, PatchError, ScoutCache, UnsupportedInputError, UnsupportedModelError
from scout_hf.auto_draft import AutoDraft
from scout_hf.methods import method_names
from scout_hf.stores import TwoTierKV
from tests.integration import selection_oracle
from tests.integration.common import (
    LOSSY,
    MODES,
    TOLERANCE,
    TWO_TIERS,
    assert_close,
    assert_equal,
    left_padded,
    logits,
    prompt,
    run,
)
from tests.integration.disturbances import Planted, delayed_jobs, delayed_submit, raise_once, spoiled_buffers
from tests.integration.executors import WAYS, use_triton
from tests.integration.selection_oracle import Oracle, Rules
from tests.integration.sharing import READERS, SETTINGS, TIERED, full_layers, kinds, sharing, stock
from tests.integration.test_sessions import Conversation

SPARSE = {
    "sparse": TIERED | {"budget": 24, "split": "off"},
    "sparse, two tiers": TIERED | {"budget": 24, "split": "cpu"},
    "recalled": LOSSY | {"digest": "minmax"},
}
TURNS = left_padded(0, 5, 21, tokens=60)


# -- beside stock ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("settings", [*SETTINGS, *(f"triton, {way}" for way in WAYS)])
@kinds()
@pytest.mark.thin(5)
def test_every_mode_equals_stock(name, settings, mode, monkeypatch):
    model, (inputs, options) = sharing(name), MODES[mode]
    if settings not in SETTINGS:
        use_triton(monkeypatch, settings.split(", ")[1])
    torch.manual_seed(0)
    expected = run(model, inputs, **options)
    torch.manual_seed(0)
    with scout_hf.patch(model, **SETTINGS.get(settings, TWO_TIERS)) as handle:
        got = run(model, inputs, **options)
        stats = handle.stats()
    assert isinstance(got[CACHE], ScoutCache)
    assert_close(got, expected)
    assert stats.steps == 0 or [layer.layer for layer in stats.layers] == full_layers(model)


@pytest.mark.parametrize("settings", ["two tiers", "dense"])
@kinds()
def test_rows_that_change_places_equal_stock(name, settings):
    """What a layer without KV has on the device moves with the rows of the store."""
    inputs, options = MODES["beam"]
    expected = run(sharing(name), inputs, **options)
    with scout_hf.patch(sharing(name), **SETTINGS[settings]):
        assert_close(run(sharing(name), inputs, **options), expected)


@kinds()
def test_eager_attention_equals_stock(name):
    model = copy.deepcopy(sharing(name))
    model.set_attn_implementation("eager")
    expected = run(model, TURNS)
    for settings in ("one tier", "two tiers"):
        with scout_hf.patch(model, **SETTINGS[settings]):
            assert_close(run(model, TURNS), expected)


@pytest.mark.parametrize("keep", [0, 1, 5])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@kinds()
def test_tokens_that_a_prompt_leaves_out(name, padded, keep):
    """Some releases compute only the last tokens of a prompt in layers without KV of their own, and of later turns."""
    model = copy.deepcopy(sharing(name))
    seen = {}
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, args: seen.__setitem__(module.self_attn.layer_idx, args[0]))
    first, then = (TURNS if padded else {"input_ids": prompt(3, 60)}), prompt(3, 20)
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        found, lengths = [], []
        for patched in (False, True):
            with scout_hf.patch(model, **TWO_TIERS) if patched else torch.no_grad(), torch.no_grad():
                cache = model.__dict__["_scout_handle"].new_cache() if patched else None
                one = model(**first, use_cache=True, logits_to_keep=keep, **({CACHE: cache} if patched else {}))
                lengths.append({index: hidden.shape[-2] for index, hidden in seen.items()})
                mask = torch.nn.functional.pad(first["attention_mask"], (0, 20), value=1) if padded else None
                two = model(then, attention_mask=mask, **{CACHE: one[CACHE]}, logits_to_keep=keep)
                lengths.append({index: hidden.shape[-2] for index, hidden in seen.items()})
                found.append((one.logits[:, -1], two.logits[:, -1]))
        assert keep > 1 or lengths[:2] == lengths[2:]
        for got, expected in zip(found[1], found[0]):
            assert (got - expected).abs().max() <= TOLERANCE
        # So that the test cannot pass where nothing is ever left out.
        if hasattr(model.model, "_maybe_slice_kv_shared_inputs") and keep == 1:
            assert lengths[0][READERS[name][0]] == 1


# -- sparse ----------------------------------------------------------------------------------------------------------

CASES = {
    "budget": {"budget": 32},
    "share": {"budget": 0.37},
    "fewer residents than budget": {"budget": 40, "resident": 16},
    "a dense reader": {"budget": 24, "dense_layers": (3,)},
    "a dense source, and so its readers": {"budget": 24, "dense_layers": (1, 2, 3)},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("split", ["off", "cpu", "triton"])
@pytest.mark.parametrize("case", CASES)
@kinds("gemma4, all full")
def test_each_layer_chooses_with_its_own_query(name, case, split, dtype, monkeypatch):
    """Beside a stock model that attends to what plain loops choose, in float64."""
    rules, two_tiers = CASES[case], split != "off"
    if two_tiers and isinstance(rules["budget"], float) or not two_tiers and "resident" in rules:
        pytest.skip("the oracle has no such rule")
    if split == "triton":
        if dtype is torch.float64 or not WAYS:
            pytest.skip("its kernels know no float64, or are not there")
        use_triton(monkeypatch, WAYS[-1])
    inputs = left_padded(0, 5, 61, tokens=93)
    # States of all layers, so that no layer leaves out tokens of the prompt.
    options = {"output_hidden_states": True}
    model = copy.deepcopy(sharing(name, dtype, 0.12))
    model.set_attn_implementation(selection_oracle.NAME)
    oracle = Oracle(Rules(**rules, two_tiers=two_tiers, readers=tuple(READERS[name])))
    selection_oracle.ACTIVE.append(oracle)
    try:
        expected = run(model, inputs, **options)
    finally:
        selection_oracle.ACTIVE.pop()
    given = rules | {"dense_layers": (1,)} if "source" in case else rules
    model, settings = sharing(name, dtype, 0.12), TIERED | {"recall": None, "split": "cpu" if two_tiers else "off"}
    with scout_hf.patch(model, **settings | given) as handle:
        got = run(model, inputs, **options)
    assert_close(got, expected, 1e-5 if dtype is torch.float64 else 1e-4)
    counted = {layer.layer: layer.attended_tokens for layer in handle.stats().layers}
    asked = {layer: sum(counts) / len(counts) for layer, counts in oracle.attended.items()}
    assert counted == pytest.approx(asked)


@kinds()
def test_keys_and_values_are_held_once(name):
    model = sharing(name)
    for settings in SPARSE.values():
        with scout_hf.patch(model, **settings) as handle:
            cache = run(model, prompt(1, 200))[CACHE]
            held = cache.tier_bytes()
            assert handle.stats().alive_bytes["host"] == held["host"]
        tokens = cache.get_seq_length()
        assert {layer.layer_idx for layer in cache.scout_layers} == set(full_layers(model)) - set(READERS[name])
        assert [method.layer_idx for method in cache.methods if method.stored_by is not None] == READERS[name]
        stored = 0
        for layer in cache.scout_layers:
            keys, values = layer.read()
            assert keys.shape[2] == tokens
            stored += keys.nbytes + values.nbytes
        window = 0 if settings["split"] == "off" else 3 * 8 * stored / tokens
        # Rounded up to whole slabs of blocks.
        assert stored - window <= held["host"] <= 1.5 * stored
        alone = sum(layer.method.tier_bytes()["digests"] for layer in cache.scout_layers)
        assert held["digests"] == alone > 0


@pytest.mark.parametrize("settings", SPARSE)
@kinds()
def test_digests_that_are_fitted(name, settings):
    """Signs are fitted to the queries of the layer that stores; every reader scores with them."""
    model, options = sharing(name), SPARSE[settings] | {"digest": "sign2"}
    with scout_hf.patch(model, **options) as handle:
        sparse = run(model, TURNS, 12)
        shares = {layer.layer: layer.attended_tokens for layer in handle.stats().layers}
    assert torch.isfinite(logits(sparse)).all()
    assert list(shares) == full_layers(model) and all(share < 45 for share in shares.values())


@kinds()
def test_the_monitor_samples_layers_without_kv(name):
    with scout_hf.patch(sharing(name), **SPARSE["sparse, two tiers"] | {"monitor": 1.0}) as handle:
        run(sharing(name), prompt(1, 120))
        layers = {layer.layer: layer for layer in handle.stats().layers}
    assert all(layers[index].fidelity.samples for index in READERS[name])


# -- changes of a cache ----------------------------------------------------------------------------------------------


def conversation(name, settings, inputs=TURNS):
    model = sharing(name)
    handle = model.__dict__["_scout_handle"]
    talk = Conversation(model, handle.new_cache(), inputs)
    talk.read()
    return talk


@pytest.mark.parametrize("settings", [*SETTINGS, *SPARSE])
@kinds()
@pytest.mark.thin(2)
def test_forks_go_on_alike_and_apart(name, settings):
    with scout_hf.patch(sharing(name), **(SETTINGS | SPARSE)[settings]):
        talk = conversation(name, settings)
        talk.go_on(9, 3)
        forks = [talk.with_cache(talk.cache.fork()) for _ in range(2)]
        other = talk.with_cache(copy.deepcopy(talk.cache))
        other.seed = 1000
        other.go_on()
        wanted = talk.go_on()
        assert all(torch.equal(fork.go_on(), wanted) for fork in forks)
        readers = [method for method in talk.cache.methods if method.stored_by is not None]
        own = {layer.layer_idx: layer.method.kv for layer in talk.cache.scout_layers}
        assert readers and all(method.kv is own[method.stored_by] for method in readers)


@pytest.mark.parametrize("settings", [*SETTINGS, *SPARSE])
@kinds("gemma4, all full")
def test_a_cropped_cache_goes_on_as_one_that_never_had_more(name, settings):
    """Windows that have moved on take nothing back, so all layers are full. In sparse settings residents differ."""
    model = sharing(name)
    with scout_hf.patch(model, **(SETTINGS | SPARSE)[settings]) as handle:
        short, long = (Conversation(model, handle.new_cache(), TURNS) for _ in range(2))
        assert torch.equal(short.read(), long.read())
        before = long.mask, long.seed
        long.go_on(4, 19)
        long.cache.crop(-(long.mask.shape[1] - 60))
        long.mask, long.seed = before
        got, wanted = long.go_on(11, 4), short.go_on(11, 4)
        if settings in SETTINGS:
            assert (got - wanted).abs().max() <= TOLERANCE
        assert torch.isfinite(got).all()


@pytest.mark.parametrize("settings", [*SETTINGS, *SPARSE])
@pytest.mark.parametrize("place", [0, 1])
@kinds()
@pytest.mark.thin(3)
def test_a_failed_pass_is_taken_back(name, place, settings, monkeypatch):
    """An error behind the attention of a layer without KV, in a decode step and in a turn of several tokens."""
    model, reader = sharing(name), READERS[name][place]
    options = (SETTINGS | SPARSE)[settings]
    # What a failed pass recalled, and what a turn of a block or more loaded, stays on the device.
    options = options if "method" in options else options | {"recall": None}
    with scout_hf.patch(model, **options):
        talk = conversation(name, settings)
        talk.go_on(5, 2)
        wanted = talk.with_cache(talk.cache.fork()).go_on()
        held = talk.cache.get_seq_length()
        for tokens in (1, 5):
            again = talk.with_cache(talk.cache)
            again.mask = torch.nn.functional.pad(again.mask, (0, tokens), value=1)
            with monkeypatch.context() as patch:
                raise_once(patch, model.model.layers[reader].mlp, 0)
                with pytest.raises(Planted):
                    again._run(prompt(3, tokens))
            assert talk.cache.get_seq_length() == held
        got = talk.go_on()
        assert (got - wanted).abs().max() <= TOLERANCE


@pytest.mark.parametrize("settings", SPARSE)
@pytest.mark.parametrize("disturb", [delayed_jobs, delayed_submit, spoiled_buffers])
@kinds("gemma4", "gemma4, all full")
def test_nothing_is_read_before_it_is_there(name, disturb, settings, monkeypatch):
    model = sharing(name)
    with scout_hf.patch(model, **SPARSE[settings]):
        wanted = run(model, TURNS, 24)
    disturb(monkeypatch)
    with scout_hf.patch(model, **SPARSE[settings]):
        assert_equal(run(model, TURNS, 24), wanted)


@kinds()
def test_no_recall_is_in_flight_while_the_store_grows(name, monkeypatch):
    """Its thread reads the page table that a write-back changes."""
    model, seen, real = sharing(name), [], TwoTierKV.write_back

    def write_back(kv, *args, **options):
        seen.extend(method.executor.recalling for method in cache.methods if method.kv is kv)
        return real(kv, *args, **options)

    with scout_hf.patch(model, **SPARSE["recalled"]) as handle:
        cache = handle.new_cache()
        monkeypatch.setattr(TwoTierKV, "write_back", write_back)
        run(model, prompt(1, 90), 20, **{CACHE: cache})
        assert all(layer.recalled_blocks for layer in handle.stats().layers)
    assert len(seen) > 2 * len(cache.methods) and not any(seen)


@kinds()
def test_a_cache_that_an_unpatched_model_fills(name):
    """Then its layers give all keys and values, and those without KV share them as with a DynamicCache."""
    model, turn = sharing(name), prompt(1, 5, seed=3)
    expected = run(model, prompt(1, 90), 10)
    with torch.no_grad():
        cache = ScoutCache(model.config, **TWO_TIERS)
        first = model(prompt(1, 90), **{CACHE: cache}, use_cache=True).logits[:, -1]
        assert (first - logits(expected)[0]).abs().max() <= TOLERANCE
        whole = model(torch.cat([prompt(1, 90), turn], dim=1), use_cache=True).logits[:, -1]
        with scout_hf.patch(model, **TWO_TIERS):
            assert (model(turn, **{CACHE: cache}).logits[:, -1] - whole).abs().max() <= TOLERANCE
            assert len(cache.methods) == len(full_layers(model))


@kinds("gemma4", "gemma4, all full")
def test_recall_profiles_and_timelines(name, tmp_path):
    model = sharing(name)
    with scout_hf.patch(model, split="cpu", budget=32, block_size=8, window=8, digest="minmax") as handle:
        profile = handle.profile_recall([prompt(1, 90)[0]], steps=6)
        assert len(profile.intervals) == model.config.num_hidden_layers
        with handle.trace(tmp_path / "step.json") as trace:
            run(model, prompt(1, 90), 6)
        attended = {span.layer for span in trace.spans if span.layer is not None}
        assert set(full_layers(model)) <= attended
    with scout_hf.patch(model, split="cpu", budget=32, block_size=8, recall=profile):
        assert torch.isfinite(logits(run(model, prompt(1, 90), 6))).all()


# -- on disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [*SETTINGS, *SPARSE])
@kinds()
@pytest.mark.thin(2)
def test_sessions(name, settings, tmp_path):
    """KV once; what a layer without KV held on the device is made anew."""
    model = sharing(name)
    with scout_hf.patch(model, **(SETTINGS | SPARSE)[settings]):
        talk = conversation(name, settings)
        talk.go_on(5, 3)
        talk.cache.save(tmp_path / "session")
        loaded = talk.with_cache(ScoutCache.load(tmp_path / "session", model))
        got, wanted = loaded.go_on(), talk.go_on()
        if settings in SETTINGS or settings == "sparse":
            assert (got - wanted).abs().max() <= TOLERANCE
        assert [method.layer_idx for method in loaded.cache.methods] == [
            method.layer_idx for method in talk.cache.methods
        ]
    size = sum(file.stat().st_size for file in (tmp_path / "session").iterdir())
    own = sum(part.nbytes for layer in talk.cache.scout_layers for part in layer.read())
    assert size < 2.5 * own


@kinds()
def test_texts_that_were_read_before(name, tmp_path):
    model, text = sharing(name), prompt(1, 90)
    longer = torch.cat([text, prompt(1, 30, seed=9)], dim=1)
    expected = run(model, longer)
    for settings in ("one tier", "two tiers"):
        with scout_hf.patch(model, **SETTINGS[settings], store=tmp_path / settings) as handle:
            run(model, text)
            handle.reset_stats()
            assert_close(run(model, longer), expected)
            assert handle.stats().prefill_tokens < 60


# -- drafts and budgets that are measured ----------------------------------------------------------------------------


@pytest.mark.parametrize("settings", ["one tier", "two tiers", "two tiers, ahead", "dense"])
@kinds("gemma4, all full")
def test_drafts_change_no_token(name, settings, monkeypatch):
    monkeypatch.setattr(AutoDraft, "length", lambda pace, most: max(0, most))
    model = sharing(name)
    expected = run(model, TURNS, 24)
    with scout_hf.patch(model, **SETTINGS[settings] | {"budget": 24}, draft=4) as handle:
        assert_close(run(model, TURNS, 24), expected)
        assert handle.stats().draft_checks > 0


@kinds()
def test_auto_budget_is_exact_at_first(name):
    expected = stock(name)
    with scout_hf.patch(sharing(name), budget="auto", split="off", layer_ahead=False) as handle:
        assert_close(run(sharing(name), prompt(1, 50)), expected)
        assert handle.stats().exact


# -- what is refused -------------------------------------------------------------------------------------------------


@kinds()
def test_methods_that_belong_to_one_layer(name):
    model = sharing(name)
    able = {"scout", "dense"}
    for method in set(method_names()) - able:
        said = f"method='{method}' is not possible for {model.config.model_type}: its layers .* try 'scout'"
        with pytest.raises(ConfigError, match=said):
            scout_hf.patch(model, method=method)
        with pytest.raises(ConfigError, match=said):
            ScoutCache(model.config, method=method)
    assert run(model, prompt(1, 50)).sequences.equal(stock(name).sequences)


@kinds("gemma4")
def test_an_assistant_that_reads_keys_is_refused(name):
    model = sharing(name)
    with scout_hf.patch(model) as handle, pytest.raises(UnsupportedInputError, match="assistant model that reads"):
        model(prompt(1, 5), **{CACHE: handle.new_cache()}, return_shared_kv_states=True)


@kinds()
def test_a_layer_that_attends_past_scout_is_seen(name):
    """Its keys would be the new ones alone."""
    model = copy.deepcopy(sharing(name))
    with scout_hf.patch(model) as handle:
        attention = model.model.layers[READERS[name][1]].self_attn
        attention.config = copy.deepcopy(attention.config)
        cache = handle.new_cache()
        with torch.no_grad(), pytest.raises((PatchError, UnsupportedModelError)):
            model(prompt(1, 5), **{CACHE: cache})
        assert cache.get_seq_length() == 0
