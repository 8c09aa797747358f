"""Settings: what is taken, what is refused, and how a refusal reads."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import scout_hf
from scout_hf import ConfigError, RecallIntervals, ScoutCache, ScoutConfig

NAN = math.nan
PROFILE = RecallIntervals((3, 0), 0.12, "llama")

REFUSED = {
    "method": [None, 3, b"scout", ("scout",)],
    "method_options": [3, "alpha", ("alpha", 1), {1: 2}],
    "link_gbps": [0, -1.0, True, "25", NAN, float("inf")],
    "cpu_gbps": [0, -1.0, True, "25", NAN],
    "block_size": [7, 0, -32, 33, 512, 32.0, "32", True, None, NAN],
    "budget": [0, -1, 1, 31, 0.0, -0.5, 1.5, True, False, "2048", NAN, math.inf, (2048,), [0.5]],
    "mass": [0, 1, 0.0, 1.0, -0.5, 1.5, True, "0.95", NAN, math.inf, (0.95,)],
    "sinks": [-1, 4.0, True, None, "4"],
    "window": [-1, 32.0, False, None, "32"],
    "dense_layers": [-1, 1.0, True, None, "2", (0, -1), (0, 1.0), (True,), (0, "1"), {0, 1}],
    "digest": [None, 1, object],
    "split": ["gpu", "Auto", "", None, True, ["cpu"]],
    "layer_ahead": [1, 0, "yes", None],
    "cpu_query": ["true", "Real", None, 0],
    "recall": [0, -3, 0.0, 1.5, -0.1, True, False, NAN, "0.12", [3, 4], (3,)],
    "resident": [0, -1, 31, 64.0, True, "64"],
    "threads": [0, -2, 1.0, True, "4"],
    "spin_us": [-1, 1.0, True, "100"],
    "host_dtype": ["int4", "INT8", "bfloat16", 8, True, torch.int8, ["int8"]],
    "host_memory": [0, -1, True, 1.5, "much", "8", "8 XB", "1kB"],
    "spill_dir": [0, True, b"/tmp"],
    "gpu_kernels": ["cuda", "Triton", None, True],
    "hand_over": ["graphs", "flag", None, 1],
    "fused": [1, 0, "yes", None, "Auto"],
    "cpu_backend": [None, 0, True],
    "monitor": [0, 1, 0.0, -0.5, 1.5, NAN, math.inf, None, "True", (0.5,)],
}
TAKEN = {
    "method": ["scout", "dense", "kvpr", "infinigen", "hgca"],
    "method_options": [None, {}, {"alpha": 0.5}],
    "link_gbps": [None, 25, 0.5],
    "cpu_gbps": [None, 100, 0.5],
    "block_size": [8, 16, 32, 64, 128, 256],
    "budget": [None, 256, 10**9, 1.0, 0.001, 0.25],
    "mass": [None, 0.5, 0.95, 0.999],
    "sinks": [0, 1, 1000],
    "window": [0, 1, 1000],
    "dense_layers": [0, 2, (), (0,), (1, 5), [0, 3]],
    "digest": ["minmax"],
    "split": ["auto", "cpu", "off"],
    "layer_ahead": [True, False],
    "cpu_query": ["predicted", "auto", "real"],
    "recall": [None, 1, 50, 0.12, 1.0, PROFILE],
    "resident": [None, 256, 4096],
    "threads": [None, 1, 64],
    "spin_us": [None, 0, 100, 5000],
    "host_dtype": [None, "int8"],
    "host_memory": [None, 1 << 20, "8GiB", "500 mb"],
    "spill_dir": [None, "/var/tmp"],
    "gpu_kernels": ["auto", "torch", "triton"],
    "hand_over": ["auto", "join", "flags", "graph"],
    "fused": ["auto", True, False],
    "cpu_backend": ["auto", "torch", "native"],
    "monitor": [False, True, 1.0, 0.01],
}
FIELDS = [field.name for field in dataclasses.fields(ScoutConfig)]


def tiny_llama(**changes):
    sizes = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, **changes)).eval()


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def test_every_field_is_covered_here():
    assert set(FIELDS) == set(REFUSED) == set(TAKEN)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in REFUSED for value in REFUSED[name]], ids=repr)
def test_a_refusal_names_field_value_and_what_is_allowed(name, value):
    with pytest.raises(ConfigError) as caught:
        ScoutConfig(**{name: value})
    message = str(caught.value)
    assert f"{name}={value!r}" in message
    assert "is not allowed" in message and f"{name} takes " in message


@pytest.mark.parametrize("name", FIELDS)
def test_a_refusal_says_what_to_try(name):
    with pytest.raises(ConfigError, match="; try "):
        ScoutConfig(**{name: REFUSED[name][0]})


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in TAKEN for value in TAKEN[name]], ids=repr)
def test_allowed_values_are_kept(name, value):
    kept = getattr(ScoutConfig(**{name: value}), name)
    assert kept == (tuple(value) if isinstance(value, list) else value)
    assert type(kept) is (tuple if isinstance(value, list) else type(value))


@pytest.mark.parametrize(
    "name", ["split", "cpu_query", "block_size", "host_dtype", "gpu_kernels", "hand_over", "fused"]
)
def test_a_refusal_lists_every_choice(name):
    with pytest.raises(ConfigError) as caught:
        ScoutConfig(**{name: "nonsense"})
    assert all(repr(choice) in str(caught.value) for choice in TAKEN[name])


def test_a_budget_of_one_token_is_told_from_the_whole_context():
    with pytest.raises(ConfigError, match="1.0 for the whole context"):
        ScoutConfig(budget=1)
    assert ScoutConfig(budget=1.0).budget == 1.0


@pytest.mark.parametrize("name", ["budget", "resident"])
def test_the_smallest_size_is_one_block(name):
    for size in (8, 64):
        assert getattr(ScoutConfig(**{"block_size": size, name: size}), name) == size
        with pytest.raises(ConfigError, match=f"one block.*{size}"):
            ScoutConfig(**{"block_size": size, name: size - 1})


def test_a_config_is_frozen_equal_by_value_and_usable_as_a_key():
    config = ScoutConfig(dense_layers=[0, 1])
    for name in FIELDS:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, name, None)
    assert config == ScoutConfig(dense_layers=(0, 1)) and hash(config) == hash(ScoutConfig(dense_layers=(0, 1)))
    assert config != ScoutConfig()


def test_replacing_fields_checks_again():
    config = ScoutConfig(budget=64)
    assert ScoutConfig.from_options(config, block_size=64) == ScoutConfig(budget=64, block_size=64)
    assert config == ScoutConfig(budget=64)
    with pytest.raises(ConfigError, match="budget=64"):
        ScoutConfig.from_options(config, block_size=128)


def test_an_unknown_field_is_named_with_the_known_ones(model):
    for make in (
        ScoutConfig,
        ScoutConfig.from_options,
        lambda **o: ScoutCache(model.config, **o),
        lambda **o: scout_hf.patch(model, **o),
    ):
        with pytest.raises(ConfigError) as caught:
            make(budgit=2048, blok=1)
        message = str(caught.value)
        assert "unknown setting 'blok', 'budgit'" in message
        assert all(repr(name) in message for name in (*FIELDS, "attention", "store", "draft"))


def test_a_number_in_the_place_of_a_config_is_taken_for_a_budget(model):
    with pytest.raises(ConfigError, match="of type int; .* try budget=512"):
        scout_hf.patch(model, 512)


@pytest.mark.parametrize("wrong", [2048, {"budget": 2048}, "scout", ScoutConfig])
def test_something_else_than_a_config_is_refused(model, wrong):
    for make in (ScoutConfig.from_options, lambda c: ScoutCache(model.config, c), lambda c: scout_hf.patch(model, c)):
        with pytest.raises(ConfigError, match=f"config is of type {type(wrong).__name__};.*ScoutConfig.*budget=2048"):
            make(wrong)


def test_swapped_arguments_of_the_cache_are_told(model):
    with pytest.raises(ConfigError, match="config is of type LlamaConfig; allowed is a ScoutConfig"):
        ScoutCache(ScoutConfig(), model.config)
    with pytest.raises(ConfigError, match="model.config first"):
        ScoutCache(ScoutConfig())


UNKNOWN = [
    {"method": "nonsense"},
    {"digest": "nonsense"},
    {"cpu_backend": "nonsense"},
    {"dense_layers": (0, 2)},
    {"recall": RecallIntervals((1, 2, 3), 0.12, "llama")},
    {"recall": RecallIntervals((1, 2), 0.12, "mistral")},
]


@pytest.mark.parametrize("options", UNKNOWN, ids=str)
def test_names_that_do_not_exist_here_leave_the_model_as_it_was(model, options):
    def state():
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        return sorted(vars(model)), hooks, model.config._attn_implementation, id(model.config)

    before = state()
    messages = []
    for make in (lambda: ScoutCache(model.config, ScoutConfig(**options)), lambda: scout_hf.patch(model, **options)):
        with pytest.raises(ConfigError) as caught:
            make()
        messages.append(str(caught.value))
    assert state() == before
    assert messages[0] == messages[1]
    (name, value), *_ = options.items()
    if value == "nonsense":
        assert f"{name}='nonsense'" in messages[0] and f"available are {expected_names(name)}" in messages[0]


def expected_names(field):
    from scout_hf.kernels.cpu import backend_names
    from scout_hf.methods import method_names
    from scout_hf.selection import digest_names

    names = {"method": method_names, "digest": digest_names, "cpu_backend": backend_names}[field]()
    assert names
    return ", ".join(map(repr, names))


def test_dense_layers_by_number_and_by_index():
    assert [ScoutConfig(dense_layers=2).is_dense(i) for i in range(4)] == [True, True, False, False]
    assert [ScoutConfig(dense_layers=(1, 3)).is_dense(i) for i in range(4)] == [False, True, False, True]
    assert not any(ScoutConfig().is_dense(i) for i in range(4))
    assert all(ScoutConfig(budget=None).is_dense(i) for i in range(4))


def test_blocks_round_up():
    config = ScoutConfig(block_size=16)
    assert [config.blocks(n) for n in (0, 1, 15, 16, 17, 160)] == [0, 1, 1, 1, 2, 10]


def test_numbers_of_numpy_are_numbers():
    config = ScoutConfig(budget=np.int64(1024), recall=np.float64(0.25), window=np.int32(64))
    assert config == ScoutConfig(budget=1024, recall=0.25, window=64)
    assert [type(value) for value in (config.budget, config.recall, config.window)] == [int, float, int]
    assert ScoutConfig(budget=np.float32(0.5)).budget == 0.5


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"buget": 64}, "unknown setting 'buget', did you mean 'budget'?"),
        ({"recall": "recall.json"}, r"RecallIntervals.load\('recall.json'\)"),
        ({"monitor": 1}, "True, one pair in every eighth step, or 1.0"),
    ],
    ids=str,
)
def test_near_misses_are_told_the_way(options, told):
    with pytest.raises(ConfigError, match=told):
        ScoutConfig(**options)


@pytest.mark.parametrize(("given", "meant"), [("drafts", "draft"), ("stroe", "store"), ("budgte", "budget")])
def test_patch_knows_its_own_names_too(given, meant):
    with pytest.raises(ConfigError, match=f"{given!r}, did you mean {meant!r}"):
        scout_hf.patch(torch.nn.Linear(1, 1), **{given: 1})
