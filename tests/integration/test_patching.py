"""patch() and its removal: nothing is left behind, and nothing but this model's ScoutCache passes is touched."""

import copy
import itertools
import pickle

import pytest
import torch

import scout_hf
from scout_hf import PatchError, ScoutCache, graph, pass_hooks, restart
from scout_hf.changes import Changes
from scout_hf.naming import AttentionNames
from tests.faults.injector import inject, record
from tests.integration.common import LOSSY, ONE_TIER, TWO_TIERS, assert_close, assert_equal, llama, logits, prompt, run
from tests.integration.models import snapshot


def plain_forward(model, **options):
    with torch.no_grad():
        return model(prompt(2, 20), **options).logits


@pytest.mark.parametrize("options", [ONE_TIER, TWO_TIERS, LOSSY])
@pytest.mark.parametrize("way", ["remove", "unpatch", "with", "with and error"])
def test_removal_is_exact(options, way):
    model = llama()
    stock, stock_forward = run(model, prompt()), plain_forward(model)
    before = snapshot(model)
    if way.startswith("with"):
        try:
            with scout_hf.patch(model, **options):
                run(model, prompt())
                if way == "with and error":
                    raise KeyError("planted")
        except KeyError:
            pass
    else:
        handle = scout_hf.patch(model, **options)
        assert snapshot(model) != before
        run(model, prompt())
        handle.remove() if way == "remove" else scout_hf.unpatch(model)
    assert snapshot(model) == before
    assert_equal(run(model, prompt()), stock)
    assert torch.equal(plain_forward(model), stock_forward)


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (ONE_TIER, "method='scout', budget=None, exact"),
        (LOSSY | {"budget": 0.25}, "method='scout', budget=0.25, not exact"),
        ({"method": "dense"}, "method='dense', budget='auto', exact"),
        ({"mass": 0.9, "budget": 1.0}, "method='scout', budget=1.0, mass=0.9, not exact"),
    ],
)
def test_a_handle_prints_as_one_short_line(options, settings):
    with scout_hf.patch(llama(), **options) as handle:
        assert repr(handle) == f"Handle(LlamaForCausalLM, {settings}, patched)"
    assert repr(handle) == f"Handle(LlamaForCausalLM, {settings}, removed)"


def test_the_snapshot_sees_a_forgotten_hook():
    model = llama()
    before = snapshot(model)
    hook = model.model.layers[2].mlp.register_forward_hook(lambda *args: None)
    assert snapshot(model) != before
    hook.remove()
    assert snapshot(model) == before
    model.config._attn_implementation_internal = "eager"
    assert snapshot(model) != before


def test_removal_inside_with():
    model = llama()
    before = snapshot(model)
    with scout_hf.patch(model) as handle:
        handle.remove()
    assert snapshot(model) == before


def test_patching_again_after_removal():
    model = llama()
    stock = run(model, prompt())
    for options in (ONE_TIER, TWO_TIERS):
        with scout_hf.patch(model, **options):
            assert_close(run(model, prompt()), stock)


def test_patching_twice():
    model = llama()
    stock, before = run(model, prompt()), snapshot(model)
    handle = scout_hf.patch(model, **TWO_TIERS)
    patched = snapshot(model)
    with pytest.raises(PatchError, match=r"patched already.*handle\.remove\(\).*unpatch"):
        scout_hf.patch(model, **ONE_TIER)
    assert snapshot(model) == patched
    assert_close(run(model, prompt()), stock)
    assert handle.stats().steps == 9
    handle.remove()
    assert snapshot(model) == before


def test_removing_twice():
    model = llama()
    handle = scout_hf.patch(model)
    handle.remove()
    with pytest.raises(PatchError, match="removed already"):
        handle.remove()
    with pytest.raises(PatchError, match="not patched"):
        scout_hf.unpatch(model)
    with scout_hf.patch(model), pytest.raises(PatchError, match="removed already"):
        handle.remove()


def test_wrong_settings_leave_the_model_alone():
    model = llama()
    before = snapshot(model)
    for options in ({"budget": 0}, {"dense_layers": (9,)}, {"digest": "nope"}, {"bugdet": 64}, {"config": 2048}):
        with pytest.raises(scout_hf.ConfigError):
            scout_hf.patch(model, **options)
        assert snapshot(model) == before


@pytest.mark.parametrize("removed_first", ["original", "copy"])
def test_copy_of_a_patched_model(removed_first):
    model = llama()
    handle = scout_hf.patch(model, **TWO_TIERS)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.layers[1].self_attn.q_proj.weight.mul_(-2)
    own, other = llama(), llama()
    other.load_state_dict(twin.state_dict())
    expected = {"original": run(own, prompt()), "copy": run(other, prompt())}
    models = {"original": model, "copy": twin}
    assert not torch.allclose(logits(expected["original"]), logits(expected["copy"]), atol=1e-3)
    for name in models:
        cache = run(models[name], prompt()).past_key_values
        assert isinstance(cache, ScoutCache)
        assert_close(run(models[name], prompt()), expected[name])
    assert handle.stats().steps == 2 * 9
    scout_hf.unpatch(models.pop(removed_first))
    (kept,) = models
    assert isinstance(run(models[kept], prompt()).past_key_values, ScoutCache)
    assert_close(run(models[kept], prompt()), expected[kept])
    gone = {"original": model, "copy": twin}[removed_first]
    assert_equal(run(gone, prompt()), expected[removed_first])
    scout_hf.unpatch(models[kept])
    assert_equal(run(models[kept], prompt()), expected[kept])


def test_prediction_in_a_copy_uses_the_copys_weights():
    model = llama()
    scout_hf.patch(model, **LOSSY)
    twin = copy.deepcopy(model)
    before = run(twin, prompt())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    assert_equal(run(twin, prompt()), before)


def test_two_models_with_one_config():
    patched, other = llama(0), llama(1)
    other.config = patched.config
    for module in other.modules():
        if "config" in module.__dict__:
            module.config = patched.config
    stock, stock_other, forward = run(patched, prompt()), run(other, prompt()), plain_forward(other)
    with scout_hf.patch(patched, **TWO_TIERS) as handle:
        assert_equal(run(other, prompt()), stock_other)
        assert torch.equal(plain_forward(other), forward)
        assert handle.stats().steps == 0
        assert_close(run(patched, prompt()), stock)
        with scout_hf.patch(other, **ONE_TIER):
            assert_close(run(other, prompt()), stock_other)
            assert_close(run(patched, prompt()), stock)
        assert_equal(run(other, prompt()), stock_other)
        assert_close(run(patched, prompt()), stock)
    assert_equal(run(patched, prompt()), stock)
    assert patched.config._attn_implementation == "sdpa"


def test_two_models_with_one_config_unpatched_in_the_order_of_patching():
    first, second = llama(0), llama(1)
    for module in second.modules():
        if "config" in module.__dict__:
            module.config = first.config
    stock = run(first, prompt()), run(second, prompt())
    one, two = scout_hf.patch(first, **ONE_TIER), scout_hf.patch(second, **ONE_TIER)
    one.remove()
    assert_equal(run(first, prompt()), stock[0])
    assert_close(run(second, prompt()), stock[1])
    two.remove()
    assert first.config._attn_implementation == "sdpa"
    assert_equal(run(second, prompt()), stock[1])


def test_configs_replaced_after_patching():
    """Never wrong output: the next generate says what to do, and the patch can still be taken off."""
    model = llama()
    stock, before = run(model, prompt()), snapshot(model)
    handle = scout_hf.patch(model, **TWO_TIERS)
    config, other = model.config, copy.deepcopy(model.config)
    for layer in model.model.layers:
        layer.self_attn.config = other
    cache = handle.new_cache()
    with pytest.raises(PatchError, match="attention implementation was changed after patch"):
        run(model, prompt(), past_key_values=cache)
    assert cache.get_seq_length() == 0
    handle.remove()
    for layer in model.model.layers:
        layer.self_attn.config = config
    assert snapshot(model) == before
    assert_equal(run(model, prompt()), stock)


class Wrapper(torch.nn.Module):
    """What peft does: a module around the model that hands out the model."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def get_base_model(self):
        return self.base_model

    def generate(self, *args, **kwargs):
        return self.base_model.generate(*args, **kwargs)


def test_adapter_wrapper():
    model = llama()
    stock = run(model, prompt())
    wrapper = Wrapper(model)
    before = snapshot(model)
    handle = scout_hf.patch(wrapper, **TWO_TIERS)
    assert_close(run(wrapper, prompt()), stock)
    assert handle.stats().steps == 9
    with pytest.raises(PatchError, match="patched already"):
        scout_hf.patch(model)
    scout_hf.unpatch(wrapper)
    assert snapshot(model) == before


def test_users_own_prepare_method_is_kept():
    model = llama()
    calls = []

    def prepare(generation_config, model_kwargs, *args, **kwargs):
        calls.append(generation_config.use_cache)
        return type(model)._prepare_cache_for_generation(model, generation_config, model_kwargs, *args, **kwargs)

    model._prepare_cache_for_generation = prepare
    stock = run(model, prompt())
    with scout_hf.patch(model, **ONE_TIER):
        assert_close(run(model, prompt()), stock)
        assert len(calls) == 1
        assert_equal(run(model, prompt(), use_cache=False), run(llama(), prompt(), use_cache=False))
        assert len(calls) == 2
    assert model.__dict__["_prepare_cache_for_generation"] is prepare


# -- errors and interrupts on the way --------------------------------------------------------------------------------

ROOMS = (
    "patching.py",
    "pass_hooks.py",
    "changes.py",
    "generating.py",
    "naming.py",
    "attention_name.py",
    "attention.py",
)
GRAPH = TWO_TIERS | {"hand_over": "graph"}


@pytest.fixture
def graphs(monkeypatch):
    """Steps that would be captured, without a GPU: what is installed for them is all that matters here."""
    monkeypatch.setattr("scout_hf.patching.check_names", lambda *_: None)


@pytest.mark.parametrize("shared", [False, True], ids=["alone", "beside a patch with the same config"])
def test_an_interrupt_at_any_line_of_patch_leaves_nothing(shared):
    model, other = llama(0), llama(1)
    other.config = model.config
    for module in other.modules():
        if "config" in module.__dict__:
            module.config = model.config
    handle = scout_hf.patch(other, **ONE_TIER) if shared else None
    before = snapshot(model), snapshot(other)
    for number in itertools.count():
        if not inject(lambda: scout_hf.patch(model, **TWO_TIERS), number, KeyboardInterrupt, rooms=ROOMS):
            break
        assert (snapshot(model), snapshot(other)) == before, number
    assert number > 60
    scout_hf.unpatch(model)
    assert (snapshot(model), snapshot(other)) == before
    if shared:
        assert isinstance(run(other, prompt()).past_key_values, ScoutCache)
        handle.remove()
        assert other.config._attn_implementation_internal == "sdpa"
        assert type(other.config._attn_implementation_internal) is str


def test_an_interrupted_removal_can_be_made_again():
    model = llama()
    before, again = snapshot(model), 0
    for number in range(len(record(scout_hf.patch(model, **TWO_TIERS).remove, rooms=ROOMS))):
        handle = scout_hf.patch(model, **TWO_TIERS)
        inject(handle.remove, number, KeyboardInterrupt, rooms=ROOMS)
        if "removed" not in repr(handle):
            again += 1
            scout_hf.unpatch(model)
        assert snapshot(model) == before, number
    assert again > 20


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["hooks", "inputs", "names"])
def test_patch_that_fails_halfway_is_undone(place, error, monkeypatch):
    def fail(*_, **__):
        raise error("planted")

    model = llama()
    before = snapshot(model)
    owner, name = {
        "hooks": (pass_hooks.PassHooks, "install"),
        "inputs": (restart.RestartingInputs, "__init__"),
        "names": (AttentionNames, "put_on"),
    }[place]
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(error, match="planted"):
        scout_hf.patch(model, **TWO_TIERS)
    assert snapshot(model) == before
    monkeypatch.undo()
    scout_hf.patch(model, **TWO_TIERS).remove()
    assert snapshot(model) == before


def test_an_undoing_that_fails_keeps_no_other_from_its_turn(monkeypatch):
    """The error comes out at the end, the patch counts as there until all is undone, and removal can be made again."""
    model = llama()
    before = snapshot(model)
    handle = scout_hf.patch(model, **TWO_TIERS)
    during, fail = snapshot(model), True
    take_off = AttentionNames.take_off

    def failing(self):
        if fail:
            raise RuntimeError("planted")
        take_off(self)

    monkeypatch.setattr(AttentionNames, "take_off", failing)
    with pytest.raises(RuntimeError, match="planted"):
        handle.remove()
    after = snapshot(model)
    left = {key for key, value in after.items() if before.get(key) != value}
    assert ("", "_scout_handle") in left
    assert {key[-1] for key in left} <= {"_scout_handle", "attributes"}, "the name in the config, and the handle"
    assert during["", "_forward_pre_hooks"] != after["", "_forward_pre_hooks"]
    assert after["", "_forward_pre_hooks"] == before["", "_forward_pre_hooks"]
    with pytest.raises(PatchError, match="patched already"):
        scout_hf.patch(model)
    fail = False
    handle.remove()
    assert snapshot(model) == before


def test_changes_are_undone_the_newest_first_all_of_them_and_once():
    class Change:
        def __init__(self, name, error=None):
            self.name, self.error = name, error

        def __enter__(self):
            pass

        def __exit__(self, *_):
            undone.append(self.name)
            if self.error is not None:
                raise self.error

    undone, changes = [], Changes()
    kept = [Change("first"), Change("second", KeyError("second")), Change("third", ValueError("third")), Change("last")]
    for change in kept:
        changes.make(change)
    with pytest.raises(ValueError, match="third"):
        changes.undo()
    assert undone == ["last", "third", "second", "first"]
    kept[0].error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        changes.undo()
    for change in kept:
        change.error = None
    changes.undo()
    assert undone == ["last", "third", "second", "first"] * 3
    changes.undo()
    assert len(undone) == 12


def test_what_others_put_over_forward_stays(graphs):
    """As accelerate does, which wraps the forward that it finds."""
    model = llama()
    before = snapshot(model)
    handle = scout_hf.patch(model, **GRAPH)
    steps = model.model.__dict__["forward"]
    assert isinstance(steps, graph.StepGraphs)
    handle.remove()
    assert snapshot(model) == before
    handle = scout_hf.patch(model, **GRAPH)
    model.model.forward = theirs = lambda *args, **kwargs: steps(*args, **kwargs)
    handle.remove()
    assert model.model.__dict__.pop("forward") is theirs and snapshot(model) == before


@pytest.mark.parametrize("how", ["model", "decoder", "pickle"])
def test_a_copy_is_unpatched_by_itself(how, graphs):
    """Copied from wherever: what undoes the patch of a copy changes the copy alone."""
    model = llama()
    before = snapshot(model)
    handle = scout_hf.patch(model, **GRAPH)
    during = snapshot(model)
    if how == "model":
        twin = copy.deepcopy(model)
    elif how == "decoder":
        memo = {}
        copy.deepcopy(model.model, memo)
        twin = memo[id(model)]
    else:
        twin = pickle.loads(pickle.dumps(model))
    scout_hf.unpatch(twin)
    assert snapshot(model) == during
    for module in twin.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks and "forward" not in module.__dict__
    handle.remove()
    assert snapshot(model) == before and set(twin.__dict__) == set(model.__dict__)
