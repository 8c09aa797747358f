"""``handle.read``: a text is read ahead in chunks and kept on the way; questions find it."""

import pytest
import torch

import scout_hf
from scout_hf import CACHE, ConfigError
from scout_hf.prefix import reading
from tests.integration.common import ONE_TIER, TWO_TIERS, assert_close, left_padded, llama, one_llama, prompt
from tests.integration.common import run as generate
from tests.patches.tiny import own_cache, tiny_model

SIZE = 8
CHUNK, EVERY = 24, 48


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Chunks and segments as small as the texts of these tests."""
    monkeypatch.setattr(reading, "CHUNK", CHUNK)
    kept = reading.read_ahead
    monkeypatch.setattr("scout_hf.patching.read_ahead", lambda *given: kept(*given, every=EVERY))


def question(text, tokens: int = 20):
    return {"input_ids": torch.cat([text, prompt(1, tokens, seed=9)], dim=1)}


@pytest.mark.parametrize("options", [ONE_TIER, TWO_TIERS], ids=["one tier", "two tiers"])
def test_a_text_that_was_read_ahead_is_found(options, tmp_path):
    """From its cache, and by generate() in another patch; the text ends inside a block."""
    model, text, ticks = one_llama(), prompt(1, 125), []
    expected = generate(model, question(text))
    with scout_hf.patch(model, store=tmp_path, **options) as handle:
        made = handle.read(text, ticks.append)
        assert ticks == [0, 24, 48, 72, 96, 120] and (made.tokens, made.found, made.kept) == (120, 0, 120)
        ends = [piece.end * SIZE for piece in made.pieces]
        # On two tiers the newest block of a segment does not lie in its pages: the next one has it too.
        assert ends == ([48, 96, 120] if options is ONE_TIER else [40, 88, 120])
        assert made.size == sum(one.size for one in handle.store.segments()) > 0
        assert_close(generate(model, question(text), **{CACHE: made.cache.fork()}), expected)
    with scout_hf.patch(model, store=tmp_path, **options) as handle:
        assert_close(generate(model, question(text)), expected)
        assert handle.stats().found_tokens == 120
        again = handle.read(text[0], ticks.append)
        assert ticks[6:] == [120] and (again.found, again.kept) == (120, 120)
        assert_close(generate(model, question(text), **{CACHE: again.cache}), expected)


@pytest.mark.parametrize("name", ["gemma3", "qwen3_next"])
def test_layers_with_states_of_their_own(name, tmp_path):
    if reason := own_cache(name):
        pytest.skip(reason)
    model, text = tiny_model(name), prompt(1, 125)
    expected = generate(model, question(text))
    with scout_hf.patch(model, store=tmp_path, **ONE_TIER) as handle:
        assert handle.read(text).kept == 120
        longer = handle.read(torch.cat([text[:, :100], prompt(1, 30, seed=3)], dim=1))
        assert longer.found == 96  # at the end of a segment: states fit at one place only
        handle.reset_stats()
        assert_close(generate(model, question(text)), expected, 2e-5)
        assert handle.stats().found_tokens == 120


class Stop:
    """Raises at the n-th tick."""

    def __init__(self, after: int, error: BaseException):
        self.left, self.error = after, error

    def __call__(self, tokens: int) -> None:
        self.left -= 1
        if not self.left:
            raise self.error


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_an_interrupt_loses_nothing_that_was_read(name, tmp_path):
    model, text = tiny_model(name), prompt(1, 125)
    expected = generate(model, question(text))
    with scout_hf.patch(model, store=tmp_path, **ONE_TIER) as handle:
        with pytest.raises(KeyboardInterrupt):
            handle.read(text, Stop(4, KeyboardInterrupt()))
        made = handle.read(text)
        assert (made.found, made.kept) == (72, 120)
        assert_close(generate(model, question(text), **{CACHE: made.cache}), expected, 2e-5)


def test_an_interrupt_in_the_middle_of_a_pass_loses_that_pass(tmp_path, monkeypatch):
    model, text, passes = llama(), prompt(1, 125), []
    mlp = model.model.layers[1].mlp
    forward = mlp.forward

    def interrupted(hidden):
        passes.append(hidden)
        if len(passes) == 2:
            raise KeyboardInterrupt
        return forward(hidden)

    with scout_hf.patch(model, store=tmp_path, **ONE_TIER) as handle:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(mlp, "forward", interrupted)
            handle.read(text)
        assert handle.read(text).found == 24


def test_an_end_that_leaves_no_time_loses_what_was_read_since_the_last_segment(tmp_path):
    model, text = one_llama(), prompt(1, 125)
    with scout_hf.patch(model, store=tmp_path, **ONE_TIER) as handle:
        with pytest.raises(SystemExit):
            handle.read(text, Stop(4, SystemExit()))
        assert handle.read(text).found == 48


def test_a_full_disk(tmp_path, monkeypatch):
    model, text = one_llama(), prompt(1, 60)

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scout_hf.PrefixStore, "write", full)
    with scout_hf.patch(model, store=tmp_path, **ONE_TIER) as handle:
        with pytest.raises(OSError, match="No space"):
            handle.read(text)
        with pytest.warns(RuntimeWarning, match="did not keep what was read: .*No space"):
            made = handle.read(text, must_keep=False)
        assert (made.tokens, made.kept, made.pieces) == (56, 0, ()) and made.cache.get_seq_length() == 56


def test_a_damaged_text_is_read_again(tmp_path):
    model, text = one_llama(), prompt(1, 125)
    with scout_hf.patch(model, store=tmp_path, **ONE_TIER) as handle:
        pages = handle.read(text).pieces[1].segment.path / "pages.safetensors"
        data = bytearray(pages.read_bytes())
        data[-1] ^= 1
        pages.write_bytes(data)
        with pytest.raises(scout_hf.SessionError):
            handle.read(torch.cat([text, prompt(1, 50, seed=4)], dim=1))
        made = handle.read(text)
        assert (made.found, made.kept) == (48, 120)


def test_what_is_no_text_is_refused(tmp_path):
    model = one_llama()
    with scout_hf.patch(model) as handle, pytest.raises(scout_hf.ConfigError, match="needs a store .* try patch"):
        handle.read(prompt())
    with scout_hf.patch(model, store=tmp_path, **ONE_TIER) as handle:
        for wrong in ("text", [1, 2], prompt(2), torch.ones(1, 4), left_padded(0, 3)["input_ids"]):
            with pytest.raises(scout_hf.ConfigError, match="read\\(\\) got .* it takes the token ids of one text"):
                handle.read(wrong)
        made = handle.read(prompt(1, SIZE - 1))
        assert (made.tokens, made.kept, made.size) == (0, 0, 0) and made.cache.get_seq_length() == 0
    with pytest.raises(scout_hf.PatchError, match="removed"):
        handle.read(prompt())


def test_a_model_whose_state_its_weights_do_not_tell_is_not_read(tmp_path):
    model = llama(attention_dropout=0.5)
    with scout_hf.patch(model, store=tmp_path, block_size=8) as handle:
        model.train()
        with pytest.raises(ConfigError, match="training mode"):
            handle.read(prompt(1, 40))
        model.eval()
        hook = model.model.layers[1].register_forward_hook(lambda *given: None)
        with pytest.raises(ConfigError, match="hook"):
            handle.read(prompt(1, 40))
        hook.remove()

        def change(tokens):
            with torch.no_grad():
                model.model.layers[0].mlp.up_proj.weight.add_(0.1)

        with pytest.raises(ConfigError, match="changed while"):
            handle.read(prompt(1, 40), tick=change)
        assert not handle.store.segments()
