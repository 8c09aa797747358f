"""Other ways in: pipelines, embeddings, positional arguments, low precision; and what is refused, in words."""

import warnings

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

import scout_hf
from scout_hf import CacheStateError, ScoutCache, UnsupportedInputError
from tests.integration.common import ONE_TIER, TWO_TIERS, assert_close, assert_equal, left_padded, llama, prompt, run

TIERS = pytest.mark.parametrize("settings", [ONE_TIER, TWO_TIERS], ids=["one tier", "two tiers"])
TOKENS = prompt(2, 60, seed=4)


@TIERS
@pytest.mark.parametrize("batch_size", [1, 2])
def test_pipeline(settings, batch_size):
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, 128)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    texts = [" ".join(f"w{i}" for i in row) for row in (range(4, 64), range(20, 40), range(30, 90))]
    model = llama()
    options = {"batch_size": batch_size, "max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    expected = generate(texts, **options)
    with scout_hf.patch(model, **settings) as handle:
        assert generate(texts, **options) == expected
        assert handle.stats().steps > 0
    assert len({output[0]["generated_text"] for output in expected}) == 3


@TIERS
def test_embeddings_instead_of_ids(settings):
    stock, model = llama(), llama()
    inputs = left_padded(0, 7)
    inputs["inputs_embeds"] = stock.get_input_embeddings()(inputs.pop("input_ids")).detach()
    with scout_hf.patch(model, **settings):
        assert_close(run(model, inputs), run(stock, inputs))


@TIERS
def test_positional_arguments(settings):
    stock, model = llama(), llama()
    inputs = left_padded(0, 7)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with scout_hf.patch(model, **settings) as handle, torch.no_grad():
        for module, other in ((stock, model), (stock.model, model.model)):
            expected = module(inputs["input_ids"], inputs["attention_mask"], positions)[0]
            got = other(inputs["input_ids"], inputs["attention_mask"], positions, handle.new_cache())[0]
            real = inputs["attention_mask"].bool()
            assert (got - expected)[real].abs().max() <= 3e-6


def test_the_decoder_alone_takes_a_scout_cache():
    """Embedding models and reward models call the decoder, not the causal LM."""
    stock, model = llama(), llama()
    ids = prompt(2)
    with scout_hf.patch(model, **TWO_TIERS) as handle, torch.no_grad():
        cache = handle.new_cache()
        model.model(ids[:, :40], past_key_values=cache)
        got = [model.model(ids[:, i : i + 1], past_key_values=cache)[0] for i in range(40, 50)]
        assert (torch.cat(got, dim=1) - stock.model(ids)[0][:, 40:]).abs().max() <= 1e-5
        assert handle.stats().steps == 10


PASSES = (30, 14, *[1] * 14, 2)


def decode(model, cache=None):
    """Logits of a prompt, a second chunk, single tokens and two more; the same tokens whatever the model says."""
    mask = torch.ones_like(TOKENS)
    mask[1, :5] = 0
    found, at = [], 0
    with torch.no_grad():
        for count in PASSES:
            tokens, known = TOKENS[:, at : at + count], mask[:, : at + count]
            output = model(tokens, attention_mask=known, past_key_values=cache, use_cache=True)
            found.append(output.logits[:, -1])
            cache, at = output.past_key_values, at + count
    return torch.stack(found).double()


@TIERS
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "autocast"], ids=str)
def test_low_precision(settings, dtype, implementation):
    """The error against float64 is at most twice that of stock attention in the same precision."""
    autocast = dtype == "autocast"
    model = llama(dtype=torch.float32 if autocast else dtype)
    model.set_attn_implementation(implementation)
    truth = decode(in_float64(model))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        stock = decode(model)
        with scout_hf.patch(model, **settings) as handle:
            got = decode(model, handle.new_cache())
    for measure in (lambda x: x.square().mean().sqrt(), lambda x: x.abs().max()):
        assert 0 < measure(got - truth) <= 2 * measure(stock - truth)


def in_float64(model):
    twin = llama(dtype=torch.float64)
    twin.load_state_dict(model.state_dict())
    return twin


@TIERS
def test_float64(settings):
    model = llama(dtype=torch.float64)
    stock = run(model, left_padded(0, 5))
    with scout_hf.patch(model, **settings):
        assert_close(run(model, left_padded(0, 5)), stock, 1e-6)


class TestRefused:
    """Every refusal names what was given and what to do, leaves the cache empty and the next call unharmed."""

    @pytest.fixture(params=[ONE_TIER, TWO_TIERS], ids=["one tier", "two tiers"])
    def model(self, request):
        model = llama()
        expected = run(model, prompt())
        with scout_hf.patch(model, **request.param) as handle:
            self.cache = handle.new_cache()
            yield model
            assert self.cache.get_seq_length() == 0
            assert_close(run(model, prompt(), past_key_values=self.cache), expected)

    @pytest.mark.parametrize("training", [True, False])
    def test_gradients(self, model, training):
        model.train(training)
        with pytest.raises(UnsupportedInputError, match="no gradients.*torch.no_grad"):
            model(prompt(), past_key_values=self.cache, labels=prompt())
        model.eval()

    def test_attention_weights(self, model):
        with torch.no_grad(), pytest.raises(UnsupportedInputError, match="output_attentions=True.*DynamicCache"):
            model(prompt(), past_key_values=self.cache, output_attentions=True)

    def test_4d_mask(self, model):
        mask = torch.ones(1, 1, 50, 50, dtype=torch.bool).tril()
        with torch.no_grad(), pytest.raises(UnsupportedInputError, match="4-D.*2-D padding mask"):
            model(prompt(), past_key_values=self.cache, attention_mask=mask)
        with torch.no_grad():
            assert torch.equal(model(prompt(), attention_mask=mask).logits, llama()(prompt(), mask).logits)

    @pytest.mark.parametrize("length", [49, 51])
    def test_wrong_length_of_the_mask(self, model, length):
        with torch.no_grad(), pytest.raises(UnsupportedInputError, match=f"covers {length} tokens.*are 50"):
            model(prompt(), past_key_values=self.cache, attention_mask=torch.ones(1, length))

    def test_mask_of_the_new_tokens_only(self, model):
        with torch.no_grad():
            cache = self.cache.fork()
            model(prompt(), past_key_values=cache)
            with pytest.raises(UnsupportedInputError, match="covers 1 tokens.*are 51"):
                model(prompt(1, 1), past_key_values=cache, attention_mask=torch.ones(1, 1))
            assert cache.get_seq_length() == 50

    def test_other_number_of_rows(self, model):
        with torch.no_grad():
            cache = self.cache.fork()
            model(prompt(2), past_key_values=cache)
            for rows in (1, 3):
                with pytest.raises(CacheStateError, match=f"holds 2 rows and got {rows}"):
                    model(prompt(rows, 1), past_key_values=cache)
            assert [layer.get_seq_length() for layer in cache.layers] == [50] * 3

    def test_fewer_ids_than_the_cache_holds(self, model):
        cache = self.cache.fork()
        run(model, prompt(), past_key_values=cache)
        held = cache.get_seq_length()
        with pytest.raises(UnsupportedInputError, match=f"holds {held}.*from the beginning.*cache.token_ids"):
            run(model, prompt(1, 4), past_key_values=cache)
        assert cache.get_seq_length() == held

    def test_cache_and_cache_implementation(self, model):
        with pytest.raises(ValueError, match="cache_implementation"):
            run(model, prompt(), past_key_values=self.cache, cache_implementation="static")


def test_generate_with_attention_weights_is_stock():
    model = llama()
    model.set_attn_implementation("eager")
    expected = run(model, prompt(), output_attentions=True)
    with scout_hf.patch(model, **TWO_TIERS):
        got = run(model, prompt(), output_attentions=True)
        assert not isinstance(got.past_key_values, ScoutCache)
        assert_equal(got, expected)
        for a, b in zip(got.attentions, expected.attentions):
            assert all(torch.equal(x, y) for x, y in zip(a, b))
        assert isinstance(run(model, prompt()).past_key_values, ScoutCache)
    assert expected.attentions[0][0].shape[-1] == 50


@TIERS
def test_training_mode_with_attention_dropout_is_told_once(settings):
    """Gradients off, as in evaluation during training: the prompt has stock's dropout, what comes after has none."""
    model = llama(attention_dropout=0.5)
    ids, token = prompt(), prompt(tokens=1, seed=2)
    with scout_hf.patch(model, **settings) as handle, torch.no_grad():
        found = []
        for training in (False, True):
            cache = handle.new_cache()
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always", RuntimeWarning)
                model.eval()(ids, past_key_values=cache)
                model.train(training)
                found.append([model(token, past_key_values=cache).logits for _ in range(3)])
                model(prompt(tokens=9), past_key_values=cache)
            told = [str(one.message) for one in told if issubclass(one.category, RuntimeWarning)]
            assert len(told) == training
        assert "training mode with an attention dropout of 0.5" in told[0] and "model.eval()" in told[0]
        assert all(torch.equal(a, b) for a, b in zip(*found))
        assert [note for note in handle.stats().notes if "dropout" in note]
        prompts = {float(model(ids, past_key_values=handle.new_cache()).logits.sum()) for _ in range(3)}
        assert len(prompts) == 3


@TIERS
def test_training_mode_without_dropout_is_nothing_to_tell(settings):
    model = llama().train()
    with scout_hf.patch(model, **settings), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        run(model, prompt(), new=3)
