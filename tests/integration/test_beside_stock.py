"""A patched model beside everything else: calls without a ScoutCache, files, dtypes, threads, compile, offloading."""

import io
import threading

import accelerate
import pytest
import torch
from transformers import DynamicCache

import scout_hf
from scout_hf import ScoutCache, ScoutConfig
from tests.integration.common import LOSSY, ONE_TIER, TWO_TIERS, assert_close, assert_equal, llama, prompt, run


def plain_forward(model, **options):
    with torch.no_grad():
        return model(prompt(2, 20), **options).logits


class TestWithoutScoutCache:
    """A patched model that gets no ScoutCache is the stock model, bit for bit."""

    @pytest.fixture
    def models(self):
        model = llama()
        with scout_hf.patch(model, **LOSSY) as handle:
            yield model, llama()
            assert handle.stats().steps == 0

    def test_forward(self, models):
        for options in ({}, {"use_cache": False}, {"attention_mask": torch.ones(2, 20).tril(-5).flip(1)}):
            got, stock = (plain_forward(model, **options) for model in models)
            assert torch.equal(got, stock)

    def test_packed_positions(self, models):
        positions = torch.cat([torch.arange(12), torch.arange(8)]).expand(2, -1)
        got, stock = (plain_forward(model, position_ids=positions) for model in models)
        assert torch.equal(got, stock)

    @pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}])
    def test_generate(self, models, options):
        got, stock = (run(model, prompt(), **options) for model in models)
        assert_equal(got, stock)
        assert not isinstance(got.past_key_values, ScoutCache)

    def test_dynamic_cache_given(self, models):
        got, stock = (run(model, prompt(), past_key_values=DynamicCache(config=model.config)) for model in models)
        assert_equal(got, stock)
        assert isinstance(got.past_key_values, DynamicCache)

    def test_training_step(self, models):
        for model in models:
            model.train()
            model(prompt(2, 20), labels=prompt(2, 20)).loss.backward()
        for got, stock in zip(models[0].parameters(), models[1].parameters()):
            assert torch.equal(got.grad, stock.grad)


def test_save_pretrained_writes_nothing_of_the_patch(tmp_path):
    model = llama(num_hidden_layers=4)
    stock = run(model, prompt())
    with scout_hf.patch(model, **TWO_TIERS):
        run(model, prompt())
        model.save_pretrained(tmp_path / "patched")
        model.config.save_pretrained(tmp_path / "config")
    model.save_pretrained(tmp_path / "stock")
    for file in (tmp_path / "patched").iterdir():
        assert file.read_bytes() == (tmp_path / "stock" / file.name).read_bytes(), file.name
        assert b"scout" not in file.read_bytes()
    assert "scout" not in (tmp_path / "config" / "config.json").read_text()
    reloaded = type(model).from_pretrained(tmp_path / "patched").eval()
    assert reloaded.config._attn_implementation == "sdpa"
    assert_equal(run(reloaded, prompt()), stock)
    assert not isinstance(run(reloaded, prompt()).past_key_values, ScoutCache)


def test_torch_save_of_a_patched_model():
    model = llama()
    stock = run(model, prompt())
    handle = scout_hf.patch(model, **TWO_TIERS)
    run(model, prompt())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert_close(run(loaded, prompt()), stock)
    assert isinstance(run(loaded, prompt()).past_key_values, ScoutCache)
    assert handle.stats().steps == 9
    scout_hf.unpatch(loaded)
    assert_equal(run(loaded, prompt()), stock)
    assert_close(run(model, prompt()), stock)


def test_dtype_changed_after_patching():
    model, stock = llama(), llama().double()
    with scout_hf.patch(model, **TWO_TIERS):
        run(model, prompt())
        model.double()
        assert_close(run(model, prompt()), run(stock, prompt()), 1e-6)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_patch_keeps_the_implementation_there_was(implementation):
    model = llama()
    model.set_attn_implementation(implementation)
    stock, forward = run(model, prompt()), plain_forward(model)
    with scout_hf.patch(model, **TWO_TIERS):
        assert torch.equal(plain_forward(model), forward)
        assert_close(run(model, prompt()), stock)
    assert model.config._attn_implementation == implementation
    assert_equal(run(model, prompt()), stock)


def test_two_threads_on_one_model(executor):
    model = llama()
    prompts = [prompt(1, 40, seed) for seed in range(4)]
    stock = [run(model, ids) for ids in prompts]
    found, errors = {}, []

    def work(index):
        try:
            found[index] = [run(model, prompts[index]) for _ in range(3)]
        except BaseException as error:
            errors.append(error)

    with scout_hf.patch(model, **TWO_TIERS):
        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert not errors
    for index, outputs in found.items():
        for output in outputs:
            assert_close(output, stock[index])


def test_settings_object_and_keyword_agree():
    model = llama()
    with scout_hf.patch(model, ScoutConfig(**LOSSY)) as handle:
        first = run(model, prompt())
        assert handle.config == ScoutConfig(**LOSSY)
    with scout_hf.patch(model, ScoutConfig(), **LOSSY):
        assert_equal(run(model, prompt()), first)


@pytest.mark.parametrize(
    "options", [pytest.param(ONE_TIER, marks=pytest.mark.full), TWO_TIERS], ids=["one tier", "two tiers"]
)
def test_compiled_forward(options):
    """A user's own torch.compile of forward, with graph breaks, over prefill and decode."""
    stock = run(llama(num_hidden_layers=2), prompt(), new=4)
    model = llama(num_hidden_layers=2)
    with scout_hf.patch(model, **options) as handle, torch.no_grad():
        compiled = torch.compile(model.forward, backend="eager")
        cache, ids, found = handle.new_cache(), prompt(), []
        for _ in range(4):
            found.append(compiled(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1])
            ids = found[-1].argmax(-1, keepdim=True)
        assert handle.stats().steps == 3
    torch._dynamo.reset()
    error = (torch.stack(found) - torch.stack(stock.logits)).abs().max()
    assert error <= 3e-6


@pytest.mark.parametrize("order", ["patch first", "offload first"])
@pytest.mark.parametrize("layer_ahead", [False, True])
def test_weights_offloaded_by_accelerate(order, layer_ahead):
    """Weights are on the meta device between passes: prediction is skipped, so the result is exact either way."""
    model, options = llama(), TWO_TIERS | {"layer_ahead": layer_ahead}
    stock = run(model, prompt())
    if order == "offload first":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with scout_hf.patch(model, **options) as handle:
        if order == "patch first":
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert next(model.model.layers[0].parameters()).device.type == "meta"
        output = run(model, prompt())
        assert isinstance(output.past_key_values, ScoutCache)
        assert_close(output, stock)
        assert handle.stats().cosine is None
    assert_equal(run(model, prompt()), stock)
