"""The text model reads standard library source it never saw, and reads it better the more of it it has seen."""

import json
import math
import random

import pytest
import torch
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from scout_hf.eval import pocket, text
from scout_hf.eval.text import corpus
from scout_hf.eval.training import text as train
from scout_hf.eval.training.tokenizers import END_OF_TEXT, VOCABULARY, build_text_tokenizer


@pytest.fixture(scope="module")
def loaded():
    return text.load_text_model()


def test_is_a_small_grouped_query_llama(loaded):
    model, tokenizer = loaded
    assert type(model) is LlamaForCausalLM and model.dtype == torch.float32 and not model.training
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert len(tokenizer) == model.config.vocab_size == VOCABULARY
    assert tokenizer.eos_token == END_OF_TEXT and tokenizer.padding_side == "left"
    assert text.load_text_model(torch.bfloat16)[0].dtype == torch.bfloat16


def test_all_shipped_weights_stay_small():
    folders = (pocket.WEIGHTS, text.WEIGHTS)
    assert sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file()) <= 16e6


def test_missing_weights_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(text, "WEIGHTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="eval.training.text"):
        text.load_text_model()


@pytest.mark.parametrize(
    "source", ["def f(x):\n\treturn x  # \u00e9\u4e2d\r\n\n\n    'a'  \n", " \n", "x" * 300, "0123 __init__"]
)
def test_every_text_survives_the_tokenizer(loaded, source):
    assert loaded[1].decode(loaded[1](source).input_ids) == source


def test_held_out_is_a_matter_of_the_name_alone():
    names = corpus.module_files()
    held_out = [name for name in names if corpus.is_held_out(name)]
    assert 0.02 < len(held_out) / len(names) < 0.15
    # Pinned: the weights were trained without these files, whatever Python runs the test.
    assert corpus.is_held_out("threading.py") and corpus.is_held_out("calendar.py")
    assert not corpus.is_held_out("argparse.py") and not corpus.is_held_out("json/decoder.py")


def test_training_text_has_no_held_out_file():
    kept, held = corpus.training_files(), list(corpus.held_out_files(0))
    assert len(kept) + len(held) == len(corpus.module_files())
    assert not {file for file in held if len(file) > 500} & set(kept)


def test_left_out_packages_give_no_text(tmp_path):
    for name in ("a.py", "site-packages/b.py", "json/test/c.py", "config-3.11/d.py", "json/e.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("pass\n")
    assert list(corpus.module_files(tmp_path)) == ["a.py", "json/e.py"]


def held_out_ids(loaded, tokens, seed):
    """Of files, in the order of the seed, that were not trained on."""
    texts, ids = corpus.held_out_files(seed), torch.tensor([], dtype=torch.int64)
    while len(ids) < tokens:
        ids = torch.cat([ids, train.stream_of(loaded[1], [next(texts)], random.Random(0))])
    return ids[:tokens]


def test_held_out_files_follow_the_seed():
    first, again, other = (list(corpus.held_out_files(seed)) for seed in (1, 1, 2))
    assert first == again and first != other and sorted(first) == sorted(other)


def test_more_context_makes_unseen_source_easier(loaded):
    ids = held_out_ids(loaded, 8000, seed=3)
    found = train.perplexity_by_context(loaded[0], ids, (16, 256, 1024), windows=6)
    assert found["1024"] < found["256"] < found["16"] < VOCABULARY
    assert found["1024"] < 40


def test_the_record_is_of_these_weights(loaded):
    record = json.loads((text.WEIGHTS / "training.json").read_text())
    assert [tuple(stage.values()) for stage in record["stages"]] == [tuple(stage) for stage in train.STAGES]
    assert record["parameters"] == sum(weight.numel() for weight in loaded[0].parameters())
    assert list(record["held_out_perplexity_by_context"]) == ["256", "1024", "2048", "4096"]


def test_perplexity_is_that_of_the_targets_alone(loaded):
    ids = held_out_ids(loaded, 700, seed=0)
    found = train.perplexity_by_context(loaded[0], ids, (256,), windows=1)["256"]
    window = ids[: 256 + train.TARGETS]
    with torch.inference_mode():
        losses = torch.nn.functional.cross_entropy(loaded[0](window[None]).logits[0, :-1], window[1:], reduction="none")
    assert found == pytest.approx(math.exp(losses[-train.TARGETS :].mean()), rel=1e-3)


@pytest.mark.full
def test_the_training_command_ends_with_a_model_and_its_record(tmp_path, monkeypatch):
    files = corpus.training_files()[:12]
    monkeypatch.setattr(corpus, "training_files", lambda: files)
    monkeypatch.setattr(train, "STAGES", (train.Stage(64, 4096),))
    monkeypatch.setattr(train, "CONTEXTS_TESTED", (64,))
    monkeypatch.setattr(train, "WINDOWS_TESTED", 2)
    app = train.typer.Typer()
    app.command()(train.main)
    result = CliRunner().invoke(app, ["--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["held_out_perplexity_by_context"]["64"] > 1
    assert (tmp_path / "model.safetensors").stat().st_size == pytest.approx(2 * record["parameters"], rel=0.01)


def test_repeated_passages_come_from_before():
    window = torch.arange(1024)
    train.repeat_passages(window, random.Random(0))
    moved = (window != torch.arange(1024)).nonzero().flatten()
    assert 0.1 < len(moved) / 1024 < 0.35
    assert (window[moved] < moved).all()


def test_started_heads_find_what_was_there_before():
    model = train.build_model(0, seed=0).eval()
    ids = torch.randint(1, VOCABULARY, (2, 200), generator=torch.manual_seed(0))
    with torch.inference_mode():
        again = model(torch.cat([ids, ids], dim=1), use_cache=False).logits[:, 200:-1]
    loss = torch.nn.functional.cross_entropy(again.flatten(0, 1), ids[:, 1:].flatten())
    assert loss < 0.8 * math.log(VOCABULARY)


def test_texts_shorter_than_a_window_are_refused():
    stream = torch.arange(50)
    with pytest.raises(ValueError, match="windows of 64.*50"):
        train.train(train.build_model(0, 0), stream, (train.Stage(64, 128),), seed=0)


def test_a_tokenizer_learns_from_what_it_is_given():
    tokenizer = build_text_tokenizer(["lorem ipsum dolor " * 50])
    assert len(tokenizer(" lorem ipsum dolor").input_ids) == 3
