"""The config of a patched model reads as it did before, to everybody; copies of it know nothing of the patch."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

import scout_hf
from scout_hf import ScoutCache
from scout_hf.compat.cache_names import CACHE
from tests.integration.common import ONE_TIER, TWO_TIERS, assert_close, assert_equal, llama, prompt, run


def small(implementation="sdpa", **options):
    model = llama(num_hidden_layers=2, **options)
    model.set_attn_implementation(implementation)
    return model


@pytest.fixture(params=["sdpa", "eager"])
def implementation(request):
    return request.param


@pytest.fixture
def patched(implementation):
    model = small(implementation)
    with scout_hf.patch(model, **TWO_TIERS):
        yield model


class TestReading:
    def test_the_name_is_the_one_there_was(self, patched, implementation):
        name = patched.config._attn_implementation
        assert name == implementation and implementation == name and not name != implementation
        assert name in (implementation,) and name in [implementation] and name != "paged|eager" and name is not None
        assert f"{name}" == str(name) == implementation and repr(name) == repr(implementation)
        assert name.startswith(implementation) and json.dumps(name) == json.dumps(implementation)

    def test_a_set_of_names_is_what_it_cannot_be_found_in(self, patched, implementation):
        """Registries are asked the same way, and there it must be found as another."""
        name = patched.config._attn_implementation
        assert name not in {implementation} and name not in {implementation: 1}
        assert str(name) in {implementation} and str(name) in {implementation: 1}
        assert ALL_ATTENTION_FUNCTIONS[name] is ALL_ATTENTION_FUNCTIONS[f"scout_over_{implementation}"]

    def test_everything_written_is_as_before(self, patched, implementation, tmp_path):
        stock = small(implementation).config
        assert patched.config.to_dict() == stock.to_dict()
        assert patched.config.to_diff_dict() == stock.to_diff_dict()
        assert patched.config.to_json_string(use_diff=False) == stock.to_json_string(use_diff=False)
        assert repr(patched.config) == repr(stock)
        for config, folder in ((patched.config, "patched"), (stock, "stock")):
            config.save_pretrained(tmp_path / folder)
        written = [(tmp_path / folder / "config.json").read_text() for folder in ("patched", "stock")]
        assert written[0] == written[1]

    def test_attention_weights_of_an_eager_model(self):
        model, stock = small("eager"), small("eager")
        with scout_hf.patch(model, **ONE_TIER):
            for each in (model, stock):
                each.config.output_attentions = True
            with torch.no_grad():
                got, expected = (each(prompt(), use_cache=False).attentions for each in (model, stock))
            assert len(got) == 2 and all(torch.equal(*pair) for pair in zip(got, expected))
            got, expected = (run(each, prompt(), new=3, output_attentions=True) for each in (model, stock))
            assert_equal(got, expected)
            assert torch.equal(got.attentions[-1][-1], expected.attentions[-1][-1])

    def test_attention_weights_of_another_model_are_refused_as_before(self):
        model = small("sdpa")
        with scout_hf.patch(model, **ONE_TIER), pytest.raises(ValueError, match="to sdpa"):
            model.config.output_attentions = True

    def test_flash_attention_is_recognised(self):
        model = small()
        model.config._attn_implementation_internal = "flash_attention_2"
        with scout_hf.patch(model, **ONE_TIER):
            assert is_flash_attention_requested(model.config)
            assert is_flash_attention_requested(model.config, version=2)
            assert not is_flash_attention_requested(model.config, version=3)


class TestWriting:
    def test_setting_what_there_is_changes_nothing(self, patched, implementation):
        stock = run(small(implementation), prompt())
        patched.set_attn_implementation(implementation)
        output = run(patched, prompt())
        assert isinstance(output[CACHE], ScoutCache)
        assert_close(output, stock)

    @pytest.mark.parametrize("way", ["method", "config", "internal"])
    def test_another_one_is_taken_over(self, way):
        model, stock = small("sdpa"), small("eager")
        with scout_hf.patch(model, **TWO_TIERS) as handle:
            run(model, prompt())
            handle.reset_stats()
            if way == "method":
                model.set_attn_implementation("eager")
            elif way == "config":
                model.config._attn_implementation = "eager"
            else:
                model.config._attn_implementation_internal = "eager"
            assert_close(run(model, prompt()), run(stock, prompt()))
            assert handle.stats().steps == 9
            assert model.config._attn_implementation == "eager"
            got, expected = (run(each, prompt(), use_cache=False) for each in (model, stock))
            assert_equal(got, expected)
        assert type(model.config._attn_implementation) is str and model.config._attn_implementation == "eager"
        assert_equal(run(model, prompt()), run(stock, prompt()))

    def test_what_somebody_has_set_stays_after_removal(self):
        model = small("sdpa")
        with scout_hf.patch(model, **ONE_TIER):
            model.set_attn_implementation("eager")
        assert model.config._attn_implementation == "eager"


class TestCopies:
    COPIES = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda config: pickle.loads(pickle.dumps(config)),
        "to_dict": lambda config: type(config).from_dict(config.to_dict(), attn_implementation="sdpa"),
    }

    @pytest.mark.parametrize("way", COPIES)
    def test_a_copied_config_is_plain(self, patched, implementation, way):
        config = self.COPIES[way](patched.config)
        assert type(config._attn_implementation) is str
        assert config._attn_implementation == (implementation if way != "to_dict" else "sdpa")
        assert "scout" not in repr(config.__dict__)

    def test_models_made_from_the_config_of_a_patched_one(self, patched, implementation):
        stock = small(implementation)
        for make in (AutoModelForCausalLM.from_config, type(patched)):
            model = make(patched.config).eval()
            model.load_state_dict(stock.state_dict())
            assert model.config._attn_implementation == implementation
            output = run(model, prompt())
            assert isinstance(output[CACHE], DynamicCache)
            assert_equal(output, run(stock, prompt()))

    def test_a_model_saved_and_loaded(self, patched, implementation, tmp_path):
        patched.save_pretrained(tmp_path)
        loaded = type(patched).from_pretrained(tmp_path, attn_implementation=implementation).eval()
        output = run(loaded, prompt())
        assert isinstance(output[CACHE], DynamicCache)
        assert_close(output, run(small(implementation), prompt()))

    def test_a_config_without_a_name(self):
        """What patch() did with None is undone, and copied as None."""
        model = small()
        for module in model.modules():
            if "config" in module.__dict__:
                module.config._attn_implementation_internal = None
        with scout_hf.patch(model, **ONE_TIER):
            assert copy.deepcopy(model.config)._attn_implementation is None
            assert pickle.loads(pickle.dumps(model.config))._attn_implementation is None
        assert model.config._attn_implementation is None


class TestShallowCopies:
    """Their dictionary holds the very name, which stands for the patches of one config alone."""

    @pytest.fixture
    def shared(self, implementation):
        """A model, a shallow copy of its config made while it was patched, and the handle."""
        model = small(implementation)
        handle = scout_hf.patch(model, **TWO_TIERS)
        return model, copy.copy(model.config), handle

    def model_of(self, config, implementation):
        model = type(small())(config).eval()
        model.load_state_dict(small(implementation).state_dict())
        return model

    def test_it_is_as_good_as_plain_once_the_patch_is_gone(self, shared, implementation):
        model, config, handle = shared
        handle.remove()
        name = config._attn_implementation
        assert name in {implementation} and {implementation: 1}[name] == 1 and hash(name) == hash(implementation)
        assert ALL_ATTENTION_FUNCTIONS.get(name) is ALL_ATTENTION_FUNCTIONS.get(implementation)
        assert name == implementation and name != f"scout_over_{implementation}"
        assert type(model.config._attn_implementation) is str

    @pytest.mark.parametrize("removed", [False, True])
    def test_a_model_made_from_it_is_stock(self, shared, implementation, removed):
        _, config, handle = shared
        if removed:
            handle.remove()
        model = self.model_of(config, implementation)
        output = run(model, prompt())
        assert isinstance(output[CACHE], DynamicCache)
        assert_equal(output, run(small(implementation), prompt()))

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first one first", "second one first"])
    def test_patches_of_both_leave_nothing(self, shared, implementation, order):
        first, config, handle = shared
        second, stock = self.model_of(config, implementation), run(small(implementation), prompt())
        handles = [handle, scout_hf.patch(second, **ONE_TIER)]
        models = [first, second]
        for index in order:
            for model in models:
                assert_close(run(model, prompt()), stock)
            handles[index].remove()
            name = models[index].config._attn_implementation_internal
            assert type(name) is str and name == implementation
        for model in models:
            assert_equal(run(model, prompt()), stock)

    def test_a_name_that_was_read_and_set_on_another_config(self, implementation):
        first, second = small(implementation), small("sdpa")
        with scout_hf.patch(first, **ONE_TIER):
            second.config._attn_implementation = first.config._attn_implementation
            with scout_hf.patch(second, **ONE_TIER):
                assert_close(run(second, prompt()), run(small(implementation), prompt()))
            name = second.config._attn_implementation_internal
            assert type(name) is str and name == implementation

    def test_two_patches_of_one_config(self, shared, implementation):
        """Models may share a config itself: the name goes with the last patch."""
        first, _, handle = shared
        second = self.model_of(first.config, implementation)
        again = scout_hf.patch(second, **ONE_TIER)
        handle.remove()
        assert isinstance(run(second, prompt())[CACHE], ScoutCache)
        assert type(first.config._attn_implementation_internal) is not str
        again.remove()
        assert type(first.config._attn_implementation_internal) is str


CHILD = """
import sys, torch
for what, file in zip(sys.argv[1::2], sys.argv[2::2]):
    loaded = torch.load(file, weights_only=False)
    if what == "config":
        assert not [name for name in sys.modules if name.startswith("scout_hf")], "a config needs no scout_hf"
        from transformers import AutoModelForCausalLM
        config, state = loaded
        assert type(config._attn_implementation) is str
        model = AutoModelForCausalLM.from_config(config).eval()
        model.load_state_dict(state)
    else:
        model = loaded
    ids = torch.load(file + ".ids")
    output = model.generate(input_ids=ids, max_new_tokens=10, min_new_tokens=10, do_sample=False,
                            return_dict_in_generate=True, output_logits=True)
    cache = getattr(output, "cache", None) or output.past_key_values
    torch.save((type(cache).__name__, output.sequences, torch.stack(output.logits)), file + ".out")
"""


@pytest.fixture(scope="class")
def elsewhere(tmp_path_factory):
    """Of a config and of two models, what was before and, from a process that loads them one after the other, after.

    Each as the name of the cache's class, sequences and logits of generate(); the config comes first.
    """
    folder, before, words = tmp_path_factory.mktemp("things"), {}, []
    for what, implementation, options in (
        ("config", "eager", TWO_TIERS),
        ("one tier", "sdpa", ONE_TIER),
        ("two tiers", "sdpa", TWO_TIERS),
    ):
        model, file = small(implementation), str(folder / what)
        stock = run(model, prompt())
        before[what] = stock.sequences, torch.stack(stock.logits)
        with scout_hf.patch(model, **options):
            run(model, prompt())
            torch.save((model.config, model.state_dict()) if what == "config" else model, file)
        torch.save(prompt(), f"{file}.ids")
        words += ["config" if what == "config" else "model", file]
    subprocess.run([sys.executable, "-c", CHILD, *words], check=True, timeout=300)
    return {what: (*before[what], *torch.load(folder / f"{what}.out")) for what in before}


class TestNewProcess:
    @pytest.mark.parametrize("tiers", ["one tier", "two tiers"])
    def test_a_patched_model_comes_out_patched(self, elsewhere, tiers):
        stock, stock_logits, cache, sequences, logits = elsewhere[tiers]
        assert cache == "ScoutCache"
        assert torch.equal(sequences, stock)
        assert (logits - stock_logits).abs().max() <= 3e-6

    def test_a_config_of_a_patched_model_is_stock(self, elsewhere):
        stock, stock_logits, cache, sequences, logits = elsewhere["config"]
        assert cache == "DynamicCache"
        assert torch.equal(sequences, stock) and torch.equal(logits, stock_logits)
