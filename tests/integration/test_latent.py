"""Latent attention: what is cached is what is attended, with the projections moved to query and output."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import scout_hf
from scout_hf import CACHE, ScoutCache, SessionError, UnsupportedModelError
from scout_hf.kernels.cpu.native_backend import NativeBackend
from scout_hf.layouts import PLAIN, Latent, Padded, layout_from
from scout_hf.patches import ProbeFamily, family_of
from tests.integration.common import (
    EXACT_METHODS,
    LOSSY,
    MODES,
    ONE_TIER,
    TWO_TIERS,
    assert_close,
    assert_equal,
    left_padded,
    logits,
    prompt,
    run,
)
from tests.integration.latent_oracle import sparse_run
from tests.integration.selection_oracle import Oracle, Rules
from tests.integration.sparse_cases import CASES, INPUTS, NEW, TWO_TIER_CASES, settings
from tests.libraries import ISAS
from tests.patches.families import known
from tests.patches.tiny import missing, tiny_config, tiny_model

if reason := missing("youtu"):
    pytest.skip(reason, allow_module_level=True)

SETTINGS = {"one tier": ONE_TIER, "two tiers": TWO_TIERS}
EITHER = pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)


def latent_model(dtype=torch.float32, spread=0.05, **sizes):
    """Dense, with yarn's softmax scale, so that a scale of another width shows; as mild as ``common.llama``."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale_all_dim": 1.3, "mscale": 0.7}
    yarn |= {"original_max_position_embeddings": 128}
    sizes = {"num_hidden_layers": 3, "rope_parameters": yarn} | sizes
    config = tiny_config("youtu", initializer_range=spread, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        model.get_input_embeddings().weight.data[0].normal_(std=spread)
    return model.to(dtype).eval()


CACHES_LATENTS = hasattr(latent_model().model.layers[0].self_attn, "expand_kv")
"""Before transformers 5.17 they cached what a latent expands to."""
ONLY_LATENTS = pytest.mark.skipif(not CACHES_LATENTS, reason="this transformers caches expanded keys and values")


@pytest.fixture(scope="module")
def model():
    return latent_model()


@pytest.fixture(scope="module")
def stock(model):
    """What the unpatched model gives in a mode, made once."""
    known = {}

    def of(mode):
        if mode not in known:
            inputs, options = MODES[mode]
            torch.manual_seed(0)
            known[mode] = run(model, inputs, **options)
        return known[mode]

    return of


@EITHER
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.thin(2)
def test_every_mode_of_generate(mode, options, model, stock):
    inputs, more = MODES[mode]
    expected = stock(mode)
    with scout_hf.patch(model, **options) as handle:
        torch.manual_seed(0)
        assert_close(run(model, inputs, **more), expected)
        assert handle.stats().exact


@pytest.mark.parametrize("options", EXACT_METHODS.values(), ids=EXACT_METHODS)
def test_every_exact_method(options, model, stock):
    with scout_hf.patch(model, **options):
        assert_close(run(model, MODES["padded"][0]), stock("padded"))


@EITHER
def test_float64(options):
    model = latent_model(torch.float64)
    expected = run(model, left_padded(0, 5, 21))
    with scout_hf.patch(model, **options):
        assert_close(run(model, left_padded(0, 5, 21)), expected, 1e-12)


@ONLY_LATENTS
@EITHER
def test_a_token_takes_two_latents_whatever_the_heads(options, model):
    """Keys are 24 + 8 channels, values 24, padded to as many."""
    with scout_hf.patch(model, **options) as handle:
        cache = run(model, prompt(1, 64)).past_key_values
        assert {type(layer.layout) for layer in cache.scout_layers} == {Latent}
        of_page = cache.scout_layers[0].method.pools()[0].page_shape
        assert of_page[0] == 1 and of_page[-1] == 32
        assert handle.stats().kv_bytes["host"] % (3 * 2 * 32 * 4 * 8) == 0


@EITHER
def test_the_widths_of_real_models(options):
    """576 channels, which native code serves; in int8 with its rounding."""
    ranks = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
    model = latent_model(**ranks, num_attention_heads=4, num_key_value_heads=4)
    expected = run(model, left_padded(0, 9), new=6)
    for host_dtype in (None, "int8"):
        with scout_hf.patch(model, **options | {"host_dtype": host_dtype}) as handle:
            got = run(model, left_padded(0, 9), new=6)
            assert not CACHES_LATENTS or got.past_key_values.scout_layers[0].sizes == (1, 576)
            assert not ISAS or isinstance(handle._hooks.backend, NativeBackend)
        errors = (logits(got) - logits(expected)).abs().amax((1, 2))
        # Rounding may turn a near tie, and then later steps are of other tokens.
        assert errors.max() <= 3e-6 if host_dtype is None else 3e-6 < errors[1] <= 0.02


# -- what a cache gives -----------------------------------------------------------------------------------------------


@EITHER
def test_what_is_read_is_what_stock_caches(options, model, stock):
    expected = stock("padded").past_key_values
    with scout_hf.patch(model, **options):
        cache = run(model, MODES["padded"][0]).past_key_values
    for layer, twin in zip(cache.to_dynamic().layers, expected.layers, strict=True):
        assert layer.keys.shape == twin.keys.shape and layer.values.shape == twin.values.shape
        assert (layer.keys - twin.keys).abs().max() <= 1e-5 and (layer.values - twin.values).abs().max() <= 1e-5


@EITHER
def test_an_unpatched_model_goes_on_with_it(options, model):
    """update() outside of a patched pass returns all that the model expects."""
    expected = run(model, prompt())
    with scout_hf.patch(model, **options) as handle:
        cache = handle.new_cache()
        first = run(model, prompt(), new=4, **{CACHE: cache})
    later = run(model, first.sequences, new=6, **{CACHE: cache})
    assert torch.equal(later.sequences, expected.sequences)
    assert (logits(later) - logits(expected)[4:]).abs().max() <= 3e-6


SAVED = {
    "one tier": ({}, {}),
    "other blocks": ({}, {"block_size": 16}),
    "two tiers": ({"split": "cpu", "resident": 16}, {}),
    "int8": ({"host_dtype": "int8"}, {}),
}


@pytest.mark.parametrize(("options", "changed"), SAVED.values(), ids=SAVED)
def test_sessions(options, changed, model, tmp_path):
    options = {"block_size": 8, "window": 8, "budget": None, "layer_ahead": False} | options
    with scout_hf.patch(model, **options) as handle:
        cache = handle.new_cache()
        first = run(model, left_padded(0, 13), **{CACHE: cache})
        cache.save(tmp_path / "kv")
        later = {"input_ids": first.sequences, "attention_mask": (first.sequences != 0).long()}
        expected = run(model, later, **{CACHE: cache})
        found = ScoutCache.load(tmp_path / "kv", model, **changed)
        got = run(model, later, **{CACHE: found})
    assert_equal(got, expected) if not changed else assert_close(got, expected)
    read = found.to_dynamic().layers[0]
    assert read.keys.shape[-1] != read.values.shape[-1]


@EITHER
def test_a_store_of_texts(options, model, tmp_path):
    """One row that is found whole, and rows of different padding that are put together."""
    both = left_padded(0, 13, tokens=90)
    for inputs in (prompt(1, 101), both):
        expected = run(model, inputs)
        with scout_hf.patch(model, store=tmp_path, **options) as handle:
            for _ in range(2):
                assert_close(run(model, inputs), expected)
            assert handle.stats().found_tokens >= 80


def test_copies_are_independent(model):
    with scout_hf.patch(model, **ONE_TIER) as handle:
        cache = handle.new_cache()
        ids = run(model, prompt(), new=4, **{CACHE: cache}).sequences
        twin = copy.deepcopy(cache)
        expected = run(model, ids, **{CACHE: cache})
        cache.crop(-3)
        assert_close(run(model, ids, **{CACHE: twin}), expected)


# -- sparse -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["off", "cpu"])
@pytest.mark.parametrize("case", ["budget", "share", "no window", "dense layers", "fewer residents than budget"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.thin(3)
def test_what_is_attended_is_what_the_reference_chooses(case, split, dtype):
    cases = TWO_TIER_CASES if split == "cpu" else CASES
    if case not in cases:
        pytest.skip("not of this tier")
    model, oracle = latent_model(dtype, 0.12), Oracle(Rules(**cases[case], two_tiers=split == "cpu"))
    expected = sparse_run(model, INPUTS["padded"], oracle, NEW)
    model = latent_model(dtype, 0.12)
    with scout_hf.patch(model, **settings(cases[case], split=split)) as handle:
        got = run(model, INPUTS["padded"], new=NEW)
        assert (logits(run(model, INPUTS["padded"], new=NEW)) - logits(got)).abs().max() == 0
    assert_close(got, expected, 1e-5)
    for layer in handle.stats().layers:
        counts = oracle.attended[layer.layer]
        assert layer.attended_tokens == pytest.approx(sum(counts) / len(counts))


def test_the_reference_reacts_to_the_budget():
    model, rules = latent_model(spread=0.12), [Rules(budget=budget) for budget in (16, 32, None)]
    found = [logits(sparse_run(model, INPUTS["padded"], Oracle(each), NEW)) for each in rules]
    assert (found[0] - found[1]).abs().max() > 1e-3 and (found[1] - found[2]).abs().max() > 1e-3


def test_prediction_with_recall_runs(model):
    with scout_hf.patch(model, **LOSSY) as handle:
        run(model, left_padded(0, 5, 21), new=20)
        stats = handle.stats()
        assert stats.cosine > 0.5 and stats.recalled_bytes and not stats.exact


def test_a_query_that_cannot_be_predicted_is_told():
    if reason := missing("longcat_flash"):
        pytest.skip(reason)
    model = tiny_model("longcat_flash")
    with scout_hf.patch(model, **TWO_TIERS | {"layer_ahead": True, "cpu_query": "predicted"}) as handle:
        run(model, prompt())
        assert handle.stats().cosine is None and handle.stats().cpu_ratio > 0.2


# -- projections that are more than a weight --------------------------------------------------------------------------


@known
class Adapter(nn.Module):
    """A linear layer with a low-rank addition."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def adapted():
    model = latent_model()
    torch.manual_seed(1)
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj = Adapter(layer.self_attn.kv_b_proj)
    return model


def hooked():
    """A hook of the user's that changes what the projection gives."""
    model = latent_model()
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj.register_forward_hook(lambda module, given, made: made * 0.7)
    return model


def offloaded():
    model = latent_model()
    pytest.importorskip("accelerate").cpu_offload(model, execution_device="cpu")
    return model


@EITHER
@pytest.mark.parametrize("make", [adapted, hooked, offloaded])
def test_the_projection_is_what_the_module_computes(make, options):
    model = make()
    expected = run(model, left_padded(0, 9))
    with scout_hf.patch(model, **options):
        assert_close(run(model, left_padded(0, 9)), expected)
    assert (logits(expected) - logits(run(latent_model(), left_padded(0, 9)))).abs().max() > 1e-3 or make is offloaded


@pytest.mark.parametrize("make", [latent_model, adapted])
def test_an_adapter_is_predicted(make):
    with scout_hf.patch(make(), **TWO_TIERS | {"layer_ahead": True, "cpu_query": "predicted"}) as handle:
        run(handle.model, prompt())
        assert handle.stats().cosine > 0.5


@ONLY_LATENTS
def test_a_projection_with_a_bias_is_refused(model):
    model = latent_model()
    attn = model.model.layers[1].self_attn
    attn.kv_b_proj = nn.Linear(attn.kv_b_proj.in_features, attn.kv_b_proj.out_features)
    with scout_hf.patch(model, **ONE_TIER), pytest.raises(UnsupportedModelError, match="kv_b_proj without bias"):
        run(model, prompt())


# -- models that nobody has heard of ----------------------------------------------------------------------------------


def renamed():
    model = latent_model()
    model.config = copy.deepcopy(model.config)
    model.config.model_type = "latent_of_tomorrow"
    return model


@EITHER
def test_an_unknown_family_is_exact(options):
    model = renamed()
    assert isinstance(family_of(model), ProbeFamily)
    expected = run(model, left_padded(0, 9))
    with scout_hf.patch(model, **options | {"layer_ahead": True, "cpu_query": "real"}):
        assert_close(run(model, left_padded(0, 9)), expected)


def test_an_unknown_family_that_changes_what_it_expands_is_refused(monkeypatch):
    """Its keys are no product of the latent with a matrix, as the trial run sees."""
    model = renamed()
    kind = type(model.model.layers[0].self_attn)
    if not CACHES_LATENTS:
        pytest.skip("this transformers caches expanded keys and values")
    real = kind.expand_kv
    monkeypatch.setattr(kind, "expand_kv", lambda self, *latents: tuple(part.tanh() for part in real(self, *latents)))
    with pytest.raises(UnsupportedModelError, match="logits differ"):
        scout_hf.patch(model)


# -- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [PLAIN, Padded(24, 8), Padded(8, 24), Latent(16, 8)], ids=str)
def test_a_layout_gives_back_what_it_stored(layout):
    widths = (layout.key_width or 24, layout.value_width or 24)
    given = [torch.randn(2, 3, 5, width) for width in widths]
    stored = layout.stored(*given)
    assert stored[0].shape == stored[1].shape == (2, 3, 5, 24)
    assert all(torch.equal(*pair) for pair in zip(layout.given(*stored), given, strict=True))
    assert layout_from(layout.as_json(), 24) == layout


@pytest.mark.parametrize(
    "told",
    [["padded", 24, 8], ["latent", 24, 8], ["latent", 0, 32], ["wide", 32, 8], ["padded", 32.0, 8], ["padded"], "x", 3],
    ids=str,
)
def test_a_layout_that_does_not_fit_is_an_error(told):
    with pytest.raises(SessionError, match="do not fit"):
        layout_from(told, 31)
