"""What the prefix store must never do: serve another model's text, lossy tokens, damage, or lose an answer."""

import contextlib
import copy
import inspect
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch

import scout_hf
from scout_hf import CACHE, ConfigError, PrefixStore, SessionError, UnsupportedInputError
from scout_hf.sessions.folder import ABOUT, PAGES, TENSORS
from tests.integration.common import ONE_TIER, TWO_TIERS, assert_close, llama, one_llama, prompt
from tests.integration.common import run as generate
from tests.patches import tiny_vision
from tests.patches.tiny import own_cache, tiny_model

SPARSE = {"block_size": 8, "window": 8, "budget": 32}
IDS = prompt(1, 101)
ONES = torch.ones_like(IDS)


def found(handle):
    """Tokens found by the calls since the last time."""
    tokens = handle.stats().found_tokens
    handle.reset_stats()
    return tokens


def filled(model, folder, ids=IDS, **options):
    """A store that knows a text."""
    with scout_hf.patch(model, store=folder, **(options or ONE_TIER)) as handle:
        generate(model, ids, new=1)
        assert handle.store.segments()
        return handle.store


def tokens_found(model, folder, ids=IDS, **options):
    with scout_hf.patch(model, store=folder, **(options or ONE_TIER)) as handle:
        generate(model, ids, new=1)
        return handle.stats().found_tokens


# -- never a text of something else -----------------------------------------------------------------------------------


def test_another_model_other_weights_or_another_dtype(tmp_path):
    model = llama()
    filled(model, tmp_path)
    assert tokens_found(model, tmp_path) == 96
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[7] += 0.5
    assert tokens_found(model, tmp_path) == 0
    assert tokens_found(llama(seed=1), tmp_path) == 0
    assert tokens_found(llama(dtype=torch.bfloat16), tmp_path) == 0
    assert tokens_found(llama(rope_parameters={"rope_type": "default", "rope_theta": 5000.0}), tmp_path) == 0
    assert tokens_found(llama(), tmp_path) == 96


def test_settings_that_change_keys_and_values(tmp_path):
    model = one_llama()
    filled(model, tmp_path, **SPARSE)
    assert tokens_found(model, tmp_path, **SPARSE | {"host_dtype": "int8"}) == 0
    assert tokens_found(model, tmp_path, **SPARSE | {"block_size": 16}) == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tokens_found(model, tmp_path, **SPARSE) == 0
    # Other choices of blocks, another digest, another tier or method: the same keys and values.
    others = ({"budget": None}, {"digest": "minmax"}, {"split": "cpu"}, {"window": 16}, {"method": "hgca"})
    for more in others:
        assert tokens_found(model, tmp_path, **SPARSE | more) == 96, more


def test_an_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    model = llama()
    filled(model, tmp_path)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    assert tokens_found(adapted, tmp_path) == 0
    assert tokens_found(adapted, tmp_path) == 96
    with adapted.disable_adapter():
        expected = generate(adapted, IDS)
        with scout_hf.patch(adapted, store=tmp_path, **ONE_TIER) as handle:
            assert_close(generate(adapted, IDS), expected)
            first = found(handle)
            assert_close(generate(adapted, IDS), expected)
            assert found(handle) == 96 and first in (0, 96)


NOT_SERVED = {
    "embeddings": lambda model: {"inputs_embeds": model.get_input_embeddings()(IDS)},
    "own positions": lambda model: {"input_ids": IDS, "position_ids": torch.arange(5, 106)[None]},
    "hidden states": lambda model: {"input_ids": IDS, "output_hidden_states": True, "return_dict_in_generate": True},
    "padding inside": lambda model: {"input_ids": IDS, "attention_mask": ONES.index_fill(1, torch.tensor([50]), 0)},
}


@pytest.mark.parametrize("what", NOT_SERVED)
@torch.no_grad()
def test_calls_that_are_not_served(what, tmp_path):
    model = llama()
    store = filled(model, tmp_path)
    inputs = {"attention_mask": ONES} | NOT_SERVED[what](model)
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with scout_hf.patch(model, store=store, **ONE_TIER) as handle:
        got = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert found(handle) == 0
        assert torch.equal(*(each if torch.is_tensor(each) else each.sequences for each in (got, expected)))
        assert len(store.segments()) == 1
        assert what == "padding inside" or any("prefix store" in note for note in handle.stats().notes)


@pytest.mark.skipif(bool(tiny_vision.missing("qwen2_5_vl")), reason="this release lacks it")
def test_images_are_not_served(tmp_path):
    model, inputs = tiny_vision.tiny_seeing("qwen2_5_vl"), tiny_vision.prompt_with_images("qwen2_5_vl", images=1)
    with scout_hf.patch(model, store=tmp_path, **ONE_TIER) as handle:
        first = generate(model, inputs)
        assert_close(generate(model, inputs), first)
        assert found(handle) == 0 and not handle.store.segments()


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_angles_that_change_with_the_length_are_refused(kind, tmp_path):
    model = tiny_model("phi3") if kind == "longrope" else llama()
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "long_factor": [1.0] * 4, "short_factor": [1.0] * 4}
    model.config.rope_parameters = rope
    with pytest.raises(ConfigError, match=kind):
        scout_hf.patch(model, store=tmp_path)
    scout_hf.patch(model).remove()


def asked(model, ids=IDS, **more):
    return torch.stack(generate(model, ids, new=4, **more).logits)


def assert_as_without(model, folder, ids=IDS, **more):
    """A call with the store gives what one without gives."""
    expected = asked(model, ids, **more)
    with scout_hf.patch(model, store=folder, **ONE_TIER):
        assert (asked(model, ids, **more) - expected).abs().max() <= 3e-6


def adapted(names=("default", "other")):
    peft = pytest.importorskip("peft")
    made = llama()
    for name in names:
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(len(name))
            made = peft.get_peft_model(made, config) if name == names[0] else made
            if name != names[0]:
                made.add_adapter(name, config)
    return made.eval()


def test_adapters_that_are_named_in_a_call(tmp_path):
    model = adapted()
    with scout_hf.patch(model, store=tmp_path, **ONE_TIER) as handle:
        asked(model)
        named = {"adapter_names": ["other"]}
        got = asked(model, **named)
        assert found(handle) == 0 and any("a hook on" in note for note in handle.stats().notes)
    assert (got - asked(model, **named)).abs().max() <= 3e-6


class Changes:
    """A stopping criterion that changes the model in the middle of a call."""

    def __init__(self, change):
        self.change = change

    def __call__(self, ids, scores, **more):
        if ids.shape[1] == 103:
            self.change()
        return torch.zeros(len(ids), dtype=torch.bool)


def test_weights_and_adapters_that_change_during_a_call(tmp_path):
    model = adapted()
    weight = model.base_model.model.model.layers[1].mlp.up_proj.weight

    def there_and_back():
        with torch.no_grad():
            weight.mul_(2)
            weight.div_(2)

    for change in (lambda: model.set_adapter("other"), there_and_back):
        with scout_hf.patch(model, store=tmp_path, **ONE_TIER) as handle:
            asked(model, stopping_criteria=[Changes(change)])
            assert not handle.store.segments()
    with scout_hf.patch(model, store=tmp_path, **ONE_TIER) as handle:
        asked(model)
        assert handle.store.segments()


def test_dropout_is_not_kept(tmp_path):
    model = llama(attention_dropout=0.5)
    with scout_hf.patch(model, store=tmp_path, **ONE_TIER) as handle:
        model.train()
        with pytest.warns(RuntimeWarning, match="training mode"):
            asked(model)
        assert not handle.store.segments() and any("training mode" in note for note in handle.stats().notes)
        model.eval()
        asked(model)
        assert handle.store.segments()


def test_hooks_and_scalings_of_the_users_own(tmp_path):
    model = llama()
    filled(model, tmp_path)
    layer = model.model.layers[1]
    hook = layer.register_forward_hook(lambda module, args, out: (out[0] if isinstance(out, tuple) else out) + 0.1)
    assert tokens_found(model, tmp_path) == 0
    hook.remove()
    assert tokens_found(model, tmp_path) == 96
    layer.self_attn.scaling *= 2
    assert tokens_found(model, tmp_path) == 0


def test_a_few_rows_of_a_large_embedding(tmp_path):
    model, ids = llama(vocab_size=4000), torch.cat([IDS[:, :-9], torch.full((1, 9), 3999)], dim=1)
    filled(model, tmp_path, ids)
    with torch.no_grad():
        model.get_input_embeddings().weight[3998:] += 0.1
    assert tokens_found(model, tmp_path, ids) == 0


def test_soft_prompts_that_are_put_around_a_patched_model(tmp_path):
    peft = pytest.importorskip("peft")
    model = llama()
    filled(model, tmp_path)
    with scout_hf.patch(model, store=tmp_path, **ONE_TIER) as handle:
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        wrapped = peft.get_peft_model(model, config).eval()
        wrapped.generate(input_ids=IDS, attention_mask=ONES, max_new_tokens=2, do_sample=False)
        assert found(handle) == 0


def test_a_cache_that_is_emptied_during_a_call(tmp_path):
    model = one_llama()
    with scout_hf.patch(model, store=tmp_path, **ONE_TIER) as handle:
        cache = handle.new_cache()
        with contextlib.suppress(UnsupportedInputError):  # older releases keep the mask
            generate(model, IDS, new=60, stopping_criteria=[Changes(cache.reset)], **{CACHE: cache})
        assert all(segment.end <= 12 for segment in handle.store.segments())
        assert cache.token_ids is None


def test_offloaded_weights(tmp_path):
    accelerate = pytest.importorskip("accelerate")

    def spread(seed):
        made = llama(seed=seed)
        if seed:  # the layers that stay at hand are the same
            whole = llama()
            made.load_state_dict(whole.state_dict() | {n: w for n, w in made.state_dict().items() if "layers.2" in n})
        places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        places |= {f"model.layers.{number}": "cpu" if number < 2 else "disk" for number in range(3)}
        return accelerate.dispatch_model(made, places, main_device="cpu", offload_dir=tmp_path / f"w{seed}")

    model, other = spread(0), spread(1)
    filled(model, tmp_path / "store")
    assert tokens_found(other, tmp_path / "store") == 0
    assert tokens_found(model, tmp_path / "store") == 96


# -- never a token that is not exact ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [SPARSE, TWO_TIERS | {"budget": 32}], ids=["one tier", "two tiers"])
def test_tokens_of_sparse_steps_are_not_kept(options, tmp_path):
    model = one_llama()
    with scout_hf.patch(model, store=tmp_path, **options) as handle:
        output = generate(model, IDS, new=60)
        assert max(segment.end for segment in handle.store.segments()) == 12
        turned = output.sequences
        found(handle)
        generate(model, turned, new=1)
        assert found(handle) == 96  # the answer is read again, exactly
        generate(model, turned, new=1)
        assert found(handle) == 152  # a prompt of 161 tokens: at least two are left, since one would be a decode step
    expected = generate(model, turned)
    with scout_hf.patch(model, store=tmp_path, **ONE_TIER | {"window": 8}) as handle:
        assert_close(generate(model, turned), expected)
        assert found(handle) == 152


@pytest.mark.parametrize("more", [{"prompt_lookup_num_tokens": 4}, {"assistant_model": 1}], ids=["lookup", "assistant"])
def test_drafts(more, tmp_path):
    """The stored text includes the answer, so that drafts of it are right; verification still gets its logits."""
    model = one_llama()
    more = {name: llama(num_hidden_layers=1) if name == "assistant_model" else value for name, value in more.items()}
    expected = generate(model, IDS, new=30, **more)
    with scout_hf.patch(model, store=tmp_path, **ONE_TIER) as handle:
        for number in range(3):
            assert torch.equal(generate(model, IDS, new=30, **more).sequences, expected.sequences)
            assert found(handle) == (96 if number else 0)


@pytest.mark.parametrize("tokens", [64, 65, 66, 67])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_last_token_of_a_prompt_is_no_sparse_step(name, tokens, tmp_path):
    model = llama(initializer_range=0.12) if name == "llama" else tiny_model(name)
    ids = prompt(1, tokens)
    expected = generate(model, ids, new=1)
    with scout_hf.patch(model, store=tmp_path, block_size=8, window=8, budget=16) as handle:
        for _ in range(2):
            assert_close(generate(model, ids, new=1), expected, 2e-5)
            assert handle.stats().steps == 0


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss", "qwen3_next"])
def test_drafts_of_models_with_states_of_their_own(name, tmp_path):
    """They record more than is kept; the answer must come in any order of calls."""
    if reason := own_cache(name):
        pytest.skip(reason)
    model, ids = tiny_model(name), prompt(1, 101)
    plain, drafts = {}, {"prompt_lookup_num_tokens": 3}
    if name == "qwen3_next":
        drafts = plain  # its linear layers cannot be rolled back
    expected = [generate(model, ids, new=12, **more) for more in (plain, drafts)]
    for order in ((plain, drafts, plain), (drafts, plain, drafts)):
        with scout_hf.patch(model, store=tmp_path / str(len(order[0])), **ONE_TIER):
            for more in order:
                got = generate(model, ids, new=12, **more)
                assert torch.equal(got.sequences, expected[more is drafts].sequences)


def test_prefill_in_chunks(tmp_path):
    model = one_llama()
    expected = generate(model, IDS)
    with scout_hf.patch(model, store=tmp_path, **ONE_TIER) as handle:
        for tokens in (0, 32):  # of the first chunk, of which a token must be left
            assert_close(generate(model, IDS, prefill_chunk_size=40), expected)
            assert found(handle) == tokens


# -- never lose an answer, or what was whole --------------------------------------------------------------------------


def test_a_full_disk_costs_a_warning(tmp_path):
    model = one_llama()
    expected = generate(model, IDS)
    store = filled(model, tmp_path, prompt(1, 40, seed=3))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with scout_hf.patch(model, store=store, **ONE_TIER):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        try:
            with pytest.warns(RuntimeWarning, match="did not keep"):
                assert_close(generate(model, IDS), expected)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, before)
        assert len(store.segments()) == 1
        assert [name for _, folders, _ in os.walk(tmp_path) for name in folders if name.startswith(".")] == []
        generate(model, IDS)
        assert len(store.segments()) == 2
    assert tokens_found(model, tmp_path, prompt(1, 40, seed=3)) == 32


@pytest.mark.parametrize("name", [ABOUT, TENSORS, PAGES])
@pytest.mark.parametrize("options", [ONE_TIER, TWO_TIERS], ids=["one tier", "two tiers"])
def test_damage_is_an_error_or_a_new_read(name, options, tmp_path):
    """Where it is seen at once, the text is read again; where it is seen later, the next call reads it again."""
    model = one_llama()
    expected = generate(model, IDS)
    store = filled(model, tmp_path, **options)
    [segment] = store.segments()
    path = segment.path / name
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(bytes(whole))
    store = PrefixStore(tmp_path)
    with scout_hf.patch(model, store=store, **options) as handle:
        if name == PAGES:
            with pytest.raises(SessionError, match="damaged"):
                generate(model, IDS)
            assert not store.segments()
        elif name == TENSORS:
            with pytest.warns(RuntimeWarning, match="read again"):
                assert_close(generate(model, IDS), expected)
        for tokens in (0, 96) if name != TENSORS else (96,):
            handle.reset_stats()
            assert_close(generate(model, IDS), expected)
            assert found(handle) == tokens


def test_a_segment_that_leaves_between_finding_and_opening(tmp_path, monkeypatch):
    model = one_llama()
    expected = generate(model, IDS)
    store = filled(model, tmp_path)
    find = store.find

    def found_and_gone(*given):
        pieces = find(*given)
        for piece in pieces:
            shutil.rmtree(piece.segment.path, ignore_errors=True)
        return pieces

    with scout_hf.patch(model, store=store, **ONE_TIER) as handle:
        monkeypatch.setattr(store, "find", found_and_gone)
        with pytest.warns(RuntimeWarning, match="read again"):
            assert_close(generate(model, IDS), expected)
        monkeypatch.undo()
        generate(model, IDS)
        handle.reset_stats()
        assert_close(generate(model, IDS), expected)
        assert found(handle) == 96


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError, ValueError])
def test_an_error_in_the_first_pass_stays_what_it_is(error, tmp_path):
    model = llama()

    def fail(*given):
        raise error("planted")

    with scout_hf.patch(model, store=tmp_path, **ONE_TIER) as handle:
        hook = model.model.layers[1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(error, match="planted"):
            generate(model, IDS)
        cache = handle.new_cache()
        with pytest.raises(error, match="planted"), torch.no_grad():
            model(IDS, **{CACHE: cache})
        assert cache.token_ids is None
        hook.remove()
        generate(model, IDS)
        assert handle.store.segments()


def test_a_config_with_infinities(tmp_path):
    """As those of models with state spaces."""
    model = llama()
    model.config.time_step_limit = (0.0, float("inf"))
    with scout_hf.patch(model, store=tmp_path, **ONE_TIER) as handle:
        cache = handle.new_cache()
        generate(model, IDS, **{CACHE: cache})
        assert handle.store.segments()
        cache.save(tmp_path / "kv")


def test_a_store_that_became_something_else(tmp_path):
    model = one_llama()
    expected = generate(model, IDS)
    store = filled(model, tmp_path / "store")
    room = store.segments()[0].path.parent
    shutil.rmtree(room)
    room.write_text("a file")
    with scout_hf.patch(model, store=store, **ONE_TIER), pytest.warns(RuntimeWarning, match="prefix store"):
        assert_close(generate(model, IDS), expected)
    shutil.rmtree(store.folder)
    store.folder.write_text("a file")
    with scout_hf.patch(model, store=store, **ONE_TIER), pytest.warns(RuntimeWarning, match="prefix store"):
        assert_close(generate(model, IDS), expected)


def test_a_lock_that_is_held_and_a_pipe_in_place_of_a_file(tmp_path, monkeypatch):
    import fcntl

    from scout_hf.prefix import store as stores

    monkeypatch.setattr(stores, "LOCK_SECONDS", 0.05)
    model = one_llama()
    store = filled(model, tmp_path)
    with (store.folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match="locked"):
            store.prune(0)
    expected = generate(model, IDS)
    path = store.segments()[0].path
    for name in (TENSORS, PAGES):
        whole = (path / name).read_bytes()
        (path / name).unlink()
        os.mkfifo(path / name)
        with scout_hf.patch(model, store=store, **ONE_TIER), pytest.warns(RuntimeWarning, match="read again"):
            assert_close(generate(model, IDS), expected)
        (path / name).unlink()
        (path / name).write_bytes(whole)
    assert tokens_found(model, store) == 96


def test_a_shortage_removes_nothing(tmp_path, monkeypatch):
    model = one_llama()
    store = filled(model, tmp_path)

    def no_more(*given):
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr("scout_hf.sessions.container.open_regular", no_more)
        with scout_hf.patch(model, store=store, **ONE_TIER), pytest.warns(RuntimeWarning, match="Too many open files"):
            generate(model, IDS)
    assert tokens_found(model, store) == 96


@pytest.mark.parametrize("damage", ["cut", "garbage", "gone"])
def test_a_broken_session_json_is_written_anew_and_pruned(damage, tmp_path):
    model = one_llama()
    store = filled(model, tmp_path)

    def break_it():
        path = store.segments()[0].path / ABOUT
        whole = path.read_bytes()
        path.unlink()
        if damage != "gone":
            path.write_bytes(whole[:100] if damage == "cut" else b"garbage")

    break_it()
    store = PrefixStore(tmp_path)
    assert tokens_found(model, store) == 0 and tokens_found(model, store) == 96
    break_it()
    PrefixStore(tmp_path).prune()
    assert [path.name for path in store.folder.glob("*/*")] == []


def test_a_patched_model_with_a_store_can_be_pickled(tmp_path):
    model = llama()
    with scout_hf.patch(model, store=tmp_path, **ONE_TIER):
        generate(model, IDS)
        twin = pickle.loads(pickle.dumps(model))
        assert_close(generate(twin, IDS), generate(model, IDS))
        assert found(twin._scout_handle) == 96


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_was_read_is_kept_when_decoding_is_interrupted(error, tmp_path):
    model = one_llama()

    class Stop:
        def __call__(self, ids, scores, **more):
            if ids.shape[1] > 104:
                raise error("planted")
            return torch.zeros(len(ids), dtype=torch.bool)

    with scout_hf.patch(model, store=tmp_path, **ONE_TIER) as handle:
        with pytest.raises(error, match="planted"):
            generate(model, IDS, stopping_criteria=[Stop()])
        generate(model, IDS, new=1)
        assert found(handle) == 96


def test_removal_restores_the_model_and_copies_have_their_own(tmp_path):
    model = llama()
    before = set(vars(model))
    handle = scout_hf.patch(model, store=tmp_path, **ONE_TIER)
    generate(model, IDS)
    twin = copy.deepcopy(model)
    handle.remove()
    assert set(vars(model)) == before and "generate" not in vars(model)
    own = twin._scout_handle
    own.reset_stats()
    expected = generate(model, IDS)
    assert_close(generate(twin, IDS), expected)
    assert found(own) == 96 and own.store.folder == handle.store.folder
    own.remove()
    assert "generate" not in vars(twin)


def test_signatures_stay_what_pipelines_read(tmp_path):
    model = llama()

    def signatures():
        return [inspect.signature(function) for function in (model.generate, model.prepare_inputs_for_generation)]

    before = signatures()
    with scout_hf.patch(model, store=tmp_path):
        assert signatures() == before


def test_under_inference_mode_and_with_a_cache_of_the_callers_own(tmp_path):
    model = one_llama()
    expected = generate(model, IDS)
    with scout_hf.patch(model, store=tmp_path, **ONE_TIER) as handle:
        with torch.inference_mode():
            generate(model, IDS)
        cache = handle.new_cache()
        assert_close(generate(model, IDS, **{CACHE: cache}), expected)
        assert found(handle) == 96
        # It is an ordinary cache: the next turn goes on with it, and nothing is looked up.
        turned = torch.cat([expected.sequences, prompt(1, 9, seed=2)], dim=1)
        got = generate(model, turned, **{CACHE: cache})
        assert found(handle) == 0
        fork = cache.fork()
        fork.crop(-30)
        assert torch.equal(fork.token_ids, got.sequences[:, : fork.get_seq_length()])
    assert_close(got, generate(model, turned))


@pytest.mark.parametrize("more", [{"host_memory": "64KiB"}, {"host_memory": "64KiB", "budget": 32}], ids=str)
def test_within_a_limit_of_memory(more, tmp_path):
    model = one_llama()
    options = ONE_TIER | more
    with scout_hf.patch(model, **options):
        expected = generate(model, prompt(1, 301))
    with scout_hf.patch(model, store=tmp_path, **options) as handle:
        for tokens in (0, 296):
            assert_close(generate(model, prompt(1, 301)), expected)
            assert found(handle) == tokens


# -- several at once --------------------------------------------------------------------------------------------------


def test_threads_with_one_store(tmp_path):
    model = one_llama()
    texts = [torch.cat([IDS[:, :64], prompt(1, 30, seed=seed)], dim=1) for seed in range(4)]
    expected = [generate(model, text) for text in texts]
    wrong = []
    with scout_hf.patch(model, store=tmp_path, **ONE_TIER) as handle:

        def ask(first):
            for number in range(6):
                place = (first + number) % 4
                try:
                    assert_close(generate(model, texts[place]), expected[place])
                except BaseException as error:
                    wrong.append(error)

        threads = [threading.Thread(target=ask, args=(first,)) for first in (0, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert handle.stats().found_tokens > 10 * 64


def test_the_limit_lets_the_longest_unused_leave_first_and_children_before_parents(tmp_path):
    model = one_llama()
    with scout_hf.patch(model, store=tmp_path, **ONE_TIER) as handle:
        first = generate(model, IDS, new=9).sequences
        generate(model, torch.cat([first, prompt(1, 40, seed=2)], dim=1), new=1)  # behind it
        generate(model, prompt(1, 101, seed=6), new=1)
        generate(model, IDS, new=1)  # used again
        sizes = {segment.first: segment.size for segment in handle.store.segments()}
        total = sum(segment.size for segment in handle.store.segments())
        assert len(handle.store.segments()) == 3
        assert handle.store.prune(total) == 0
        assert handle.store.prune(total - 1) == sizes[13]  # what lies behind the first text
        assert sorted(segment.first for segment in handle.store.segments()) == [0, 0]
        handle.store.prune(total // 2)
        assert tokens_of(handle, model, IDS) == 96
        assert tokens_of(handle, model, prompt(1, 101, seed=6)) == 0
        handle.store.prune(0)
        assert handle.store.segments() == []


def tokens_of(handle, model, ids):
    handle.reset_stats()
    generate(model, ids, new=1)
    return handle.stats().found_tokens


def test_a_store_stays_within_its_limit_by_itself(tmp_path):
    model = one_llama()
    size = filled(model, tmp_path / "a").segments()[0].size
    store = PrefixStore(tmp_path / "b", limit=int(2.5 * size))
    with scout_hf.patch(model, store=store, **ONE_TIER):
        for seed in range(5):
            generate(model, prompt(1, 101, seed=seed), new=1)
            assert sum(segment.size for segment in store.segments()) <= store.limit
        assert len(store.segments()) == 2
        generate(model, prompt(1, 500), new=1)  # larger than all of it: not kept, and nothing leaves for it
        assert len(store.segments()) == 2


def test_folders(tmp_path):
    store = PrefixStore(tmp_path / "new" / "store")
    model = one_llama()
    filled(model, store)
    modes = {path.stat().st_mode & 0o077 for path in store.folder.rglob("*")}
    assert modes == {0} and store.folder.stat().st_mode & 0o077 == 0
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    for wrong in (tmp_path / "open", "", 7, PAGES and tmp_path / "file"):
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match="store="):
            scout_hf.patch(model, store=wrong)
    with pytest.raises((ConfigError, ValueError), match="size"):
        PrefixStore(tmp_path, limit="much")
    (store.folder / "notes").mkdir()
    (store.folder / "notes" / "a").mkdir()
    assert len(store.segments()) == 1 and store.prune() == 0


def test_a_text_is_in_the_store_only_if_asked_for(tmp_path):
    model = one_llama()
    for flag in (False, True):
        store = PrefixStore(tmp_path / str(flag), token_ids=flag)
        filled(model, store)
        said = b"".join(path.read_bytes() for path in store.segments()[0].path.iterdir() if path.name != PAGES)
        assert (IDS[0, :8].numpy().tobytes() in said) is flag


# -- kills ------------------------------------------------------------------------------------------------------------

KILLED = """
import os, random, signal, sys, time, traceback, warnings
import torch
import scout_hf
from tests.integration.common import llama, prompt, run, assert_close
warnings.simplefilter("ignore")
folder, times = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
OPTIONS = {"budget": None, "block_size": 8, "split": "off"}
model = llama()
texts = [torch.cat([prompt(1, 64), prompt(1, 300, seed=seed)], dim=1) for seed in range(3)]
expected = [run(model, text, new=4) for text in texts]
size = 3 * 364 * 3 * 2 * 2 * 8 * 4

parent = os.getpid()

def child(seed):
    chosen = random.Random(seed)
    store = scout_hf.PrefixStore(folder, limit=int(size * chosen.choice([0.3, 0.9, 2])))
    spill = {"host_memory": "64KiB"} if chosen.random() < 0.5 else {}
    with scout_hf.patch(model, store=store, **OPTIONS, **spill):
        while os.getppid() == parent:
            run(model, chosen.choice(texts), new=2)
            if chosen.random() < 0.3:
                store.prune(int(size * chosen.random()))

dice, hits = random.Random(0), 0
for number in range(times):
    children = []
    for half in range(2):
        pid = os.fork()
        if not pid:
            try:
                child(2 * number + half)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        children.append(pid)
    time.sleep(0.02 + dice.random() * 0.15)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        found, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), "a child ended by itself"
    store = scout_hf.PrefixStore(folder)
    for segment in store.segments():
        scout_hf.sessions.read_session(segment.path).check_pages()
    if number % 4 == 0:
        with scout_hf.patch(model, store=store, **OPTIONS) as handle:
            for text, wanted in zip(texts, expected):
                assert_close(run(model, text, new=4), wanted)
            hits += handle.stats().found_tokens
for room in store.folder.iterdir():
    for left in room.glob(".*") if room.is_dir() else ():
        os.utime(left, (0, 0))
store.prune()
orphans = [str(path) for path in store.folder.rglob(".*")]
assert not orphans, orphans
assert hits, "nothing was ever found"
print("killed", 2 * times, "found", hits)
"""


def killed(folder, times):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), str(times)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_processes_that_share_a_store_and_are_killed(tmp_path):
    killed(tmp_path / "store", 4)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_hundred_killed_processes(tmp_path, capsys):
    said = killed(tmp_path / "store", 100)
    with capsys.disabled():
        print(said)
