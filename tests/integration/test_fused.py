"""Norms, rotary embedding and gates in one launch: the same tokens, only in decode steps, nothing of others touched.

With the kernels' references on the CPU, but for the tests that ask the kernels themselves, in Triton's interpreter.
"""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from types import FunctionType

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

import scout_hf
from scout_hf import ConfigError
from scout_hf.fused import stock
from scout_hf.fused.forwards import Fused, FusedRotation
from tests.integration.common import (
    LOSSY,
    TWO_TIERS,
    assert_close,
    assert_equal,
    left_padded,
    llama,
    logits,
    prompt,
    run,
)
from tests.integration.models import snapshot
from tests.patches.tiny import missing, tiny_model
from tests.triton import reference

NAMES = ("rms_norm", "rotate", "silu_product")
SPARSE = LOSSY | {"digest": "minmax"}
EXACT = TWO_TIERS | {"layer_ahead": True, "cpu_query": "real"}


@pytest.fixture
def counted(monkeypatch):
    """How often each kernel was launched."""
    found = Counter()

    def spied(name, kernel):
        def launch(*args, **options):
            found[name] += 1
            found["alone"] += name == "rotate" and not args[1].shape[1]
            return kernel(*args, **options)

        return launch

    reference.install(monkeypatch)
    for name in NAMES:
        monkeypatch.setattr(reference.KERNELS, name, spied(name, getattr(reference.KERNELS, name)))
    return found


def fused_modules(model):
    return [module for module in model.modules() if isinstance(module.__dict__.get("forward"), Fused)]


# -- what they compute -----------------------------------------------------------------------------------------------

PER_LAYER = {
    "llama": (2, 1, 1),
    "mistral": (2, 1, 1),
    "mixtral": (2, 1, 0),
    "qwen2": (2, 1, 1),
    "qwen3": (4, 1, 1),
    "gemma": (2, 1, 0),
    "gemma2": (4, 1, 0),
    "gemma3": (6, 1, 0),
    "granite": (2, 1, 1),
    "seed_oss": (2, 1, 0),
    "smollm3": (2, 1, 1),
    "apertus": (4, 1, 0),
    "cohere": (0, 0, 1),
    "olmo2": (0, 0, 1),
    "phi3": (2, 0, 0),
    "starcoder2": (0, 1, 0),
    "gpt2": (0, 0, 0),
}
"""Modules of a layer that are known: norms, attention with its rotary embedding, gated feed-forward blocks."""


@pytest.mark.parametrize("name", PER_LAYER)
def test_every_family(counted, name):
    """What is known of its layers, and the tokens of a padded batch in float32."""
    if reason := missing(name):
        pytest.skip(reason)
    model, inputs, options = tiny_model(name), left_padded(0, 9, tokens=40), EXACT
    expected = run(model, inputs, new=6)
    with scout_hf.patch(model, **options, fused=False):
        apart = run(model, inputs, new=6)
        assert not any(counted[kernel] for kernel in NAMES) and not fused_modules(model)
    with scout_hf.patch(model, **options) as handle:
        layers = handle._family.layers(handle._family.decoder(model))
        kinds = [Counter(type(module.__dict__["forward"]).__name__ for module in fused_modules(one)) for one in layers]
        assert {tuple(kind[one] for one in ("FusedNorm", "FusedRotation", "FusedGate")) for kind in kinds} == {
            PER_LAYER[name]
        }
        got = run(model, inputs, new=6)
    for other in (apart, expected):
        assert torch.equal(got.sequences, other.sequences)
        scale = logits(other).abs().max()
        assert (logits(got) - logits(other)).abs().max() <= 1e-5 * scale
    used = [counted[kernel] > 0 for kernel in NAMES]
    assert used == [count > 0 for count in PER_LAYER[name]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", ["one", "padded"])
def test_the_kernels_themselves_give_the_tokens_of_the_model_s_own_operations(monkeypatch, dtype, rows):
    """In the interpreter; what attends are references still."""
    kernels = pytest.importorskip("scout_hf.kernels.triton")
    reference.install(monkeypatch)
    model = llama(num_hidden_layers=2, dtype=dtype, initializer_range=0.12)
    inputs = {"input_ids": prompt(1, 30)} if rows == "one" else left_padded(0, 7, tokens=30)
    with scout_hf.patch(model, **EXACT, fused=False):
        expected = run(model, inputs, new=5)
    for name in NAMES:
        monkeypatch.setattr(reference.KERNELS, name, getattr(kernels, name))
    with scout_hf.patch(model, **EXACT, fused=True):
        assert len(fused_modules(model)) == 2 * 4 + 1
        got = run(model, inputs, new=5)
    assert torch.equal(got.sequences, expected.sequences)
    step = torch.finfo(dtype).eps * logits(expected).abs().max()
    assert (logits(got) - logits(expected)).abs().max() <= 8 * step


@pytest.mark.parametrize("way", ["join", "graph"])
def test_predicted_queries_are_made_by_the_same_kernels(counted, way, monkeypatch):
    """Of each layer but the first, one norm and one rotation of a query alone."""
    if way == "graph":
        from tests.integration import fake_graph

        fake_graph.install(monkeypatch)
    model, steps = llama(), 3
    with scout_hf.patch(model, **SPARSE, hand_over=way):
        run(model, prompt(2), new=steps + 1)
    # Three layers: two norms each, the last one, and two predictions.
    assert counted["rms_norm"] == steps * (3 * 2 + 1 + 2) or way == "graph"
    assert counted["alone"] == steps * 2 or way == "graph"
    assert counted["alone"] > 0


# -- when ------------------------------------------------------------------------------------------------------------


def test_prompts_gradients_and_passes_without_a_scout_cache_run_the_model_s_own(counted):
    model, stock_run = llama().requires_grad_(False), run(llama(), prompt(), new=1)
    ids = prompt(1, 1)
    with scout_hf.patch(model, **TWO_TIERS) as handle:
        assert_equal(run(model, prompt(), new=1), stock_run)
        with torch.no_grad():
            model(prompt(), use_cache=False)
        cache = handle.new_cache()
        model(prompt(), past_key_values=cache)
        model(ids, past_key_values=cache)  # with gradients
        quiet = handle.new_cache(fused=False)
        with torch.no_grad():
            model(prompt(), past_key_values=quiet)
            model(ids, past_key_values=quiet)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                model(ids, past_key_values=quiet)
        assert not any(counted[name] for name in NAMES)
        with torch.inference_mode():
            model(ids, past_key_values=handle.new_cache())
        assert not any(counted[name] for name in NAMES)  # one token, but a prompt
        with torch.inference_mode():
            model(ids, past_key_values=cache)
        assert all(counted[name] for name in NAMES)


def test_autocast_float64_and_compiled_models_run_the_model_s_own(counted):
    with scout_hf.patch(llama(dtype=torch.float64), **TWO_TIERS) as handle:
        run(handle.model, prompt(), new=3)
    with scout_hf.patch(llama(), **TWO_TIERS) as handle, torch.autocast("cpu", dtype=torch.bfloat16):
        run(handle.model, prompt(), new=3)
    assert not any(counted[name] for name in NAMES)
    model = llama(num_hidden_layers=2)
    expected = run(model, prompt(), new=4)
    with scout_hf.patch(torch.compile(model, backend="eager"), **TWO_TIERS):
        model.forward = torch.compile(model.forward, backend="eager")
        assert_close(run(model, prompt(), new=4), expected)
        del model.forward


def test_on_a_cpu_nothing_changes_and_true_says_why():
    model = llama(num_hidden_layers=1)
    with scout_hf.patch(model, **TWO_TIERS):
        assert not fused_modules(model)
    before = snapshot(model)
    for options in ({}, {"gpu_kernels": "torch"}):
        with pytest.raises(ConfigError, match="fused=True is not possible: .* on cpu .*leave fused='auto'"):
            scout_hf.patch(model, **TWO_TIERS, **options, fused=True)
    assert snapshot(model) == before
    for wrong in (1, 0, "yes", None):
        with pytest.raises(ConfigError, match="fused takes one of 'auto', True, False"):
            scout_hf.patch(model, fused=wrong)


# -- what belongs to others ------------------------------------------------------------------------------------------


def test_removal_restores_also_after_an_error(counted, monkeypatch):
    model = llama()
    expected, before = run(model, prompt()), snapshot(model)
    handle = scout_hf.patch(model, **SPARSE)
    assert fused_modules(model) and snapshot(model) != before
    run(model, prompt())
    handle.remove()
    assert snapshot(model) == before
    for other in (pickled(model), copy.deepcopy(model)):
        assert not fused_modules(other)
    monkeypatch.setattr("scout_hf.patching.changes_of_generate", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scout_hf.patch(model, **SPARSE)
    assert snapshot(model) == before
    assert_equal(run(model, prompt()), expected)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_runs_its_own_modules(counted, copied):
    model = llama(num_hidden_layers=2)
    with scout_hf.patch(model, **TWO_TIERS):
        run(model, prompt(), new=3)
        other = copied(model)
    assert not fused_modules(model)
    for module in fused_modules(other):
        assert module.__dict__["forward"]._module is module
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    counted.clear()
    got = run(other, prompt(), new=3)
    assert counted["rotate"] and bool(logits(got).abs().max() > 0)
    scout_hf.unpatch(other)
    assert_close(got, run(other, prompt(), new=3))


def test_an_error_of_a_kernel_is_an_error(counted, monkeypatch):
    """Not a reason to go on without; the step is taken back."""
    model = llama()
    with scout_hf.patch(model, **TWO_TIERS) as handle, torch.no_grad():
        cache = handle.new_cache()
        model(prompt(), past_key_values=cache)
        with monkeypatch.context() as planted:
            planted.setattr(reference.KERNELS, "silu_product", lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(prompt(1, 1), past_key_values=cache)
        assert cache.get_seq_length() == 50
        model(prompt(1, 1), past_key_values=cache)


def test_hooks_are_called_as_often_and_with_the_same(counted):
    def seen_by(model):
        layer, seen = model.model.layers[1], []
        parts = [layer.input_layernorm, layer.mlp, layer.mlp.act_fn, layer.mlp.up_proj, layer.self_attn]
        for part in parts + [layer.self_attn.q_proj, model.model.norm]:

            def note(module, args, kwargs, output):
                seen.append((type(module).__name__, (output[0] if isinstance(output, tuple) else output).clone()))

            part.register_forward_hook(note, with_kwargs=True)
        return seen

    stock_model, model = llama(), llama()
    seen, ours = seen_by(stock_model), seen_by(model)
    run(stock_model, prompt(), new=4)
    with scout_hf.patch(model, **EXACT):
        run(model, prompt(), new=4)
    assert counted["rms_norm"] and counted["rotate"] and counted["silu_product"] == 3 * 2  # one gate has a hook inside
    assert [name for name, _ in seen] == [name for name, _ in ours]
    for (_, theirs), (_, got) in zip(seen, ours):
        torch.testing.assert_close(got, theirs, rtol=1e-4, atol=1e-5)


def test_global_hooks_see_every_module(counted):
    model, seen = llama(num_hidden_layers=1), Counter()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.update([type(module).__name__]))
    try:
        with scout_hf.patch(model, **TWO_TIERS):
            run(model, prompt(), new=3)
    finally:
        handle.remove()
    assert seen["LlamaRMSNorm"] == 3 * 3 and seen[type(model.model.layers[0].mlp.act_fn).__name__] == 3


def test_a_forward_that_somebody_has_replaced_stays(counted):
    """Before patching or since, on a module or its class; and so does what they put there while it was patched."""
    model = llama(num_hidden_layers=2)
    mine = model.model.layers[0].input_layernorm
    mine.forward = lambda x: LlamaRMSNorm.forward(mine, x) * 2
    kept = mine.__dict__["forward"]
    expected = run(model, prompt(), new=4)
    with scout_hf.patch(model, **TWO_TIERS):
        assert mine.__dict__["forward"] is kept
        assert_close(run(model, prompt(), new=4), expected)
        late = model.model.layers[1].input_layernorm
        late.forward = lambda x: LlamaRMSNorm.forward(late, x) * 3
    assert set(late.__dict__) == set(mine.__dict__) and mine.__dict__["forward"] is kept


def test_a_class_or_function_that_somebody_replaces_counts(counted, monkeypatch):
    model = llama(num_hidden_layers=2)
    with scout_hf.patch(model, **TWO_TIERS) as handle:
        for place, name, theirs in (
            (LlamaRMSNorm, "forward", lambda self, x: 0.5 * x * self.weight),
            (modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin, unsqueeze_dim=1: (q, k)),
            (modeling_llama.LlamaMLP, "forward", lambda self, x: self.down_proj(self.up_proj(x))),
            (modeling_llama.LlamaAttention, "forward", lambda self, hidden_states, **_: (0 * hidden_states, None)),
        ):
            with monkeypatch.context() as planted:
                planted.setattr(place, name, theirs)
                expected = run(llama(num_hidden_layers=2), prompt(), new=3)
                if place is modeling_llama.LlamaAttention:
                    inputs = {"hidden_states": torch.ones(1, 1, 64)}
                    assert not model.model.layers[0].self_attn(**inputs)[0].any()
                    continue
                assert_close(run(model, prompt(), new=3), expected, 1e-5)
        assert handle.stats().steps == 2 * 3


def test_an_activation_that_is_replaced_later_counts(counted):
    models = [llama(num_hidden_layers=1) for _ in range(2)]
    with scout_hf.patch(models[0], **TWO_TIERS):
        for model in models:
            model.model.layers[0].mlp.act_fn = nn.ReLU()
        got = run(models[0], prompt(), new=4)
    assert_close(got, run(models[1], prompt(), new=4))


def test_lora_layers_and_their_hooks_are_run(counted):
    peft = pytest.importorskip("peft")
    model = llama(num_hidden_layers=2)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "gate_proj", "down_proj"], init_lora_weights=False)
    ).eval()
    expected = run(wrapped, prompt(), new=5)
    with scout_hf.patch(wrapped, **TWO_TIERS):
        got = run(wrapped, prompt(), new=5)
    assert counted["silu_product"] == 4 * 2 and counted["rotate"] == 4 * 2
    assert_close(got, expected, 1e-5)


# -- what is known ---------------------------------------------------------------------------------------------------


def same_with(**changed):
    """``norm_of_llama`` with other code, constants or globals."""
    known = stock.norm_of_llama
    names = {**known.__globals__, **changed.pop("names", {})}
    return FunctionType(known.__code__.replace(**changed), names, known.__name__)


def test_code_is_compared_not_names():
    known = stock.norm_of_llama
    assert stock.is_same(LlamaRMSNorm.forward, known) and stock.is_same(same_with(co_name="another"), known)
    numbers = tuple(2 if part == 2 else part for part in known.__code__.co_consts)
    assert stock.is_same(same_with(co_consts=numbers), known)
    cubed = tuple(3 if isinstance(part, int) and part == 2 else part for part in known.__code__.co_consts)
    names = tuple({"rsqrt": "sqrt"}.get(name, name) for name in known.__code__.co_names)
    for other in (same_with(co_names=names), same_with(names={"torch": nn}), len, None, LlamaRMSNorm):
        assert not stock.is_same(other, known)
    assert cubed == known.__code__.co_consts or not stock.is_same(same_with(co_consts=cubed), known)


def test_a_rotary_function_is_known_by_what_it_calls_too():
    known, own = stock.apply_rotary_pos_emb, apply_rotary_pos_emb

    def interleaved(x):
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)

    other = FunctionType(own.__code__, {**own.__globals__, "rotate_half": interleaved}, "f", own.__defaults__)
    before = FunctionType(own.__code__, own.__globals__, "f", (2,))
    assert stock.is_same(own, known) and not stock.is_same(other, known) and not stock.is_same(before, known)


def test_functions_that_the_package_kernels_has_made_modules_of(counted, monkeypatch):
    """As ``use_kernel_forward_from_hub`` does where that package is installed; ``kernelize`` sets ``forward`` later."""

    def module_of(func):
        class Func(nn.Module):
            def forward(self, *args, **kwargs):
                return func(*args, **kwargs)

        return Func()

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", function := module_of(apply_rotary_pos_emb))
    model = llama(num_hidden_layers=2)
    expected = run(model, prompt(), new=4)
    with scout_hf.patch(model, **EXACT):
        assert sum(isinstance(one.__dict__["forward"], FusedRotation) for one in fused_modules(model)) == 2
        assert_close(run(model, prompt(), new=4), expected)
        assert counted["rotate"] == 3 * 3 and counted["alone"] == 3
        function.forward = lambda q, k, cos, sin: (q, k)
        run(model, prompt(), new=4)
        assert counted["rotate"] == 3 * 3
