"""Models whose weights are quantised: patched as any other, exact beside the same weights unpatched."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

import scout_hf
from scout_hf import CACHE, ScoutCache, SessionError
from scout_hf.sessions import fingerprint
from tests.integration.common import LOSSY, ONE_TIER, TWO_TIERS, prompt
from tests.integration.models import snapshot
from tests.integration.quantised import FORMATS, KINDS, checkpoint, is_there, quantised

NEW = 5
PREDICTED = TWO_TIERS | {"layer_ahead": True, "cpu_query": "predicted"}
REAL = TWO_TIERS | {"layer_ahead": True, "cpu_query": "real"}
SPARSE = {"block_size": 8, "budget": 32}
PEFT_KNOWS = [name for name in FORMATS if name != "torch int8, dynamic"]
FUSED = ("phi3", "gpt_neox")

every_format = pytest.mark.parametrize("name", FORMATS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def loaded(folder):
    """A model per format, which tests leave as it was, and what it gives unpatched."""

    @functools.cache
    def load(name):
        model = quantised(name, folder)
        return model, decoded(model)

    return load


def decoded(model, cache=None):
    """Logits of a prompt and of steps over tokens that are the same for every model."""
    ids, found = prompt(1, 50 + NEW), []
    with torch.no_grad():
        for part in (ids[:, :50], *ids[:, 50:].split(1, dim=1)):
            output = model(part, **{CACHE: cache}, use_cache=True)
            cache = output[CACHE]
            found.append(output.logits[:, -1].double())
    return torch.stack(found)


def like(name):
    """The same model without quantisation."""
    return checkpoint("qwen2" if name == "GGUF" else "llama")


def error(got, stock) -> float:
    return (got - stock).abs().max().item()


def not_predicted(handle):
    return [note for note in handle.stats().notes if note.startswith("prediction: off")]


# -- exact -------------------------------------------------------------------------------------------------------------


@every_format
@pytest.mark.parametrize("tiers", [ONE_TIER, REAL], ids=["one tier", "two tiers"])
def test_exact_is_stock_with_the_same_weights(name, tiers, loaded):
    model, stock = loaded(name)
    before = snapshot(model)
    with scout_hf.patch(model, **tiers) as handle:
        assert error(decoded(model, handle.new_cache()), stock) <= FORMATS[name].tolerance
        assert handle.stats().steps == NEW and not_predicted(handle) == []
    assert snapshot(model) == before
    assert torch.equal(decoded(model), stock)


@pytest.mark.parametrize("name", KINDS)
def test_the_tolerance_would_show_a_sparse_step(name, loaded):
    model, stock = loaded(name)
    with scout_hf.patch(model, **LOSSY) as handle:
        assert error(decoded(model, handle.new_cache()), stock) > 2 * FORMATS[name].tolerance


# -- prediction --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, name", [("llama", name) for name in FORMATS] + [(family, name) for family in FUSED for name in KINDS]
)
def test_the_next_query_is_predicted_by_the_quantised_projection(family, name, folder):
    """Layers that write nothing: the next layer's input is known, so its query is predicted to the last bit."""
    model = quantised(name, folder, family, silent=True)
    before = decoded(model)
    with scout_hf.patch(model, **PREDICTED) as handle:
        got = decoded(model, handle.new_cache())
        assert handle.stats().cpu_ratio > 0.2 and not_predicted(handle) == []
        assert handle.stats().cosine > 1 - 1e-6
    assert error(got, before) <= FORMATS[name].tolerance


@every_format
def test_prediction_is_as_good_as_without_quantisation(name, loaded):
    model = loaded(name)[0]
    with scout_hf.patch(model, **PREDICTED) as handle, scout_hf.patch(like(name), **PREDICTED) as plain:
        decoded(model, handle.new_cache())
        decoded(plain.model, plain.new_cache())
        assert abs(handle.stats().cosine - plain.stats().cosine) < 0.05


@pytest.mark.parametrize("name", PEFT_KNOWS)
def test_lora_on_top(name, folder):
    peft = pytest.importorskip("peft")
    model = quantised(name, folder)
    bare = decoded(model)
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).eval()
    stock = decoded(model)
    assert error(stock, bare) > 0.05
    with scout_hf.patch(wrapped, **REAL) as handle:
        assert error(decoded(model, handle.new_cache()), stock) <= FORMATS[name].tolerance
        assert handle.stats().cosine is not None and not_predicted(handle) == []
        with_adapter = fingerprint(model).weights
        with wrapped.disable_adapter():
            assert fingerprint(model).weights != with_adapter
    assert torch.equal(decoded(model), stock)


# -- copies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in FORMATS if "quanto" not in name])  # which torch cannot copy
def test_a_copy_of_a_patched_model_is_exact(name, loaded):
    model, stock = loaded(name)
    with scout_hf.patch(model, **ONE_TIER):
        twin = copy.deepcopy(model)
    scout_hf.unpatch(twin)
    expected = decoded(twin)
    assert error(expected, stock) <= FORMATS[name].tolerance
    with scout_hf.patch(twin, **TWO_TIERS) as handle:
        assert error(decoded(twin, handle.new_cache()), expected) <= FORMATS[name].tolerance
    assert torch.equal(decoded(model), stock)


# -- which model a session belongs to ----------------------------------------------------------------------------------


@every_format
def test_the_same_model_has_the_same_fingerprint_before_and_after_its_first_pass(name, loaded, folder):
    """bitsandbytes turns weights into another order in its first pass."""
    model, stock = loaded(name)
    used, new = fingerprint(model), fingerprint(quantised(name, folder))
    assert used == new
    assert torch.equal(decoded(model), stock), "a fingerprint changed the model"


@every_format
def test_other_weights_have_another_fingerprint(name, loaded, folder):
    assert fingerprint(loaded(name)[0]).weights != fingerprint(quantised(name, folder, seed=1)).weights


def test_every_format_has_a_fingerprint_of_its_own(loaded, folder):
    there = [name for name in FORMATS if is_there(name)]
    found = {fingerprint(loaded(name)[0]).weights for name in there}
    found.add(fingerprint(checkpoint("llama")).weights)
    assert len(found) == len(there) + 1


@every_format
def test_turned_signs_are_other_weights(name, folder):
    """The scales of a matrix and of its negative may be the same."""
    one, other = (quantised(name, folder, turned=turned) for turned in (False, True))
    assert fingerprint(one).weights != fingerprint(other).weights


@every_format
def test_sessions_go_on_in_a_model_that_was_loaded_again(name, loaded, folder, tmp_path):
    model, ids = loaded(name)[0], prompt(1, 60)
    with scout_hf.patch(model, **SPARSE) as handle, torch.no_grad():
        model(ids, **{CACHE: (cache := handle.new_cache())})
        cache.save(tmp_path / "kv")
        there = model(ids[:, :1], **{CACHE: cache}).logits
    again = quantised(name, folder)
    with scout_hf.patch(again, **SPARSE), torch.no_grad():
        cache = ScoutCache.load(tmp_path / "kv", again)
        here = again(ids[:, :1], **{CACHE: cache}).logits
    assert error(here, there) <= FORMATS[name].tolerance
    with scout_hf.patch(other := quantised(name, folder, seed=1), **SPARSE):
        with pytest.raises(SessionError, match="other weights"):
            ScoutCache.load(tmp_path / "kv", other)


@pytest.mark.parametrize("name", KINDS)
def test_what_was_read_is_found_by_a_model_that_was_loaded_again(name, loaded, folder, tmp_path):
    models = loaded(name)[0], quantised(name, folder), quantised(name, folder, seed=1)
    for model, known in zip(models, (0, 64, 0), strict=True):
        with scout_hf.patch(model, block_size=8, store=tmp_path) as handle:
            assert handle.read(prompt(1, 64)).found == known
