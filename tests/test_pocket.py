"""The packaged pocket models are real, small GQA decoders that retrieve; their texts are exact and repeatable."""

import collections
import json
import random

import pytest
import torch
from transformers import LlamaForCausalLM, Qwen3ForCausalLM
from typer.testing import CliRunner

from scout_hf.eval import pocket
from scout_hf.eval.pocket import tasks, vocabulary
from scout_hf.eval.training import pocket as train
from scout_hf.eval.training.lessons import IDS, drill, exam, make_batch


@pytest.fixture(scope="module")
def loaded():
    return pocket.load_pocket()


@pytest.fixture(scope="module")
def models(loaded):
    return {"llama": loaded, "qwen3": pocket.load_pocket("qwen3")}


@pytest.mark.parametrize(("name", "kind"), [("llama", LlamaForCausalLM), ("qwen3", Qwen3ForCausalLM)])
def test_is_a_small_grouped_query_decoder(models, name, kind):
    model, tokenizer = models[name]
    assert type(model) is kind
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert len(tokenizer) == vocabulary.SIZE == model.config.vocab_size
    assert sum(file.stat().st_size for file in (pocket.WEIGHTS / name).iterdir()) <= 5_000_000
    for ids in (model.config, model.generation_config, tokenizer):
        assert ids.eos_token_id == vocabulary.SPECIAL.index(vocabulary.END)
        assert ids.pad_token_id == vocabulary.SPECIAL.index(vocabulary.PAD)


def test_names_of_packaged_models(models):
    assert set(models) == set(pocket.POCKET_MODELS) == {folder.name for folder in pocket.WEIGHTS.iterdir()}
    with pytest.raises(ValueError, match="'mamba'.*llama, qwen3"):
        pocket.load_pocket("mamba")


def test_missing_weights_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(pocket, "WEIGHTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="eval.training.pocket --arch qwen3"):
        pocket.load_pocket("qwen3")


@pytest.mark.parametrize(("tokens", "facts"), [(9, 1), (100, 3), (1024, 16), (8192, 32)])
def test_documents_are_exact_and_repeatable(loaded, tokens, facts):
    tokenizer = loaded[1]
    document = pocket.make_document(tokens, facts, seed=3)
    assert document == pocket.make_document(tokens, facts, seed=3)
    assert document.text != pocket.make_document(tokens, facts, seed=4).text
    ids = tokenizer(document.text).input_ids
    assert len(ids) == tokens == document.tokens
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == document.text
    assert len(document.facts) == facts


def test_an_answer_stands_once_in_the_text_right_after_its_key():
    document = pocket.make_document(4096, 32, seed=5)
    words = document.text.split()
    for fact in document.facts:
        answer = fact.answer.split()
        assert len(answer) == pocket.ANSWER_WORDS
        assert document.text.count(f" {fact.answer} ") == 1
        assert words[fact.position : fact.position + len(answer)] == answer
        assert words[fact.position - 2 : fact.position] == document.prompt(fact).split()[-2:]


def test_too_many_facts_are_refused():
    with pytest.raises(ValueError, match="need"):
        pocket.make_document(20, 4, seed=0)


def test_questions_are_whole_prompts():
    document = pocket.make_document(256, 4, seed=0)
    pairs = pocket.questions(document)
    assert pairs[2] == (f"{document.text} {document.facts[2].question}", document.facts[2].answer)


@pytest.mark.parametrize("task", pocket.TASKS)
@pytest.mark.parametrize("tokens", [256, 1024, 8192])
def test_exercises_are_exact_and_repeatable(loaded, task, tokens):
    exercise = pocket.make_exercise(task, tokens, 3)
    assert exercise == pocket.make_exercise(task, tokens, 3)
    assert exercise.text != pocket.make_exercise(task, tokens, 4).text
    words = exercise.text.split()
    assert len(words) == exercise.tokens == tokens
    assert loaded[1].unk_token_id not in loaded[1](exercise.text).input_ids
    assert len({fact.question for fact in exercise.facts}) == len(exercise.facts) >= 1
    assert [fact.position for fact in exercise.facts] == sorted(fact.position for fact in exercise.facts)
    for fact in exercise.facts:
        assert words[fact.position] == fact.answer.split()[0]


def said_after(text, *words):
    """What follows `words` in each place, up to the full stop, in order."""
    parts = f" {text}".split(" " + " ".join(words) + " ")[1:]
    return [part.split(" .")[0].split() for part in parts]


def solve(task, text, key):
    """The answer by the task's own rule, from the text alone."""
    if task == "needle":
        (said,) = said_after(text, "the", *key)
        return said
    if task == "values":
        return [word for said in said_after(text, "note", *key) for word in said]
    if task == "copy":
        (said,) = said_after(text, "copy", *key)
        return said
    if task == "trace":
        hops = 0
        while key[0] not in vocabulary.VALUES:
            (key,) = said_after(text, "value", "of", key[0])
            hops += 1
        assert hops == tasks.HOPS
        return key
    counts = collections.Counter(said[0] for said in said_after(text, "answer", "of", *key)).most_common()
    assert counts[0][1] > counts[1][1]
    return [counts[0][0]]


@pytest.mark.parametrize("task", pocket.TASKS)
@pytest.mark.parametrize("seed", [0, 1])
def test_answers_follow_from_the_text(task, seed):
    exercise = pocket.make_exercise(task, 6000, seed)
    for fact in exercise.facts:
        key = fact.question.split()[-2:] if task == "needle" else fact.question.split()[-1:]
        assert solve(task, exercise.text, key) == fact.answer.split()


def test_values_are_asked_in_order_of_appearance():
    exercise = pocket.make_exercise("values", 2048, 1)
    for fact in exercise.facts:
        assert fact.answer.split()[::2] == ["1", "2", "3"]
        places = [exercise.text.index(f"{fact.question.split()[-1]} {number} ") for number in "123"]
        assert places == sorted(places)


@pytest.mark.parametrize("task", pocket.TASKS)
def test_questions_grow_with_the_text_up_to_a_length(task):
    counts = [len(pocket.make_exercise(task, tokens, 0).facts) for tokens in (1024, 4096, 8192)]
    assert counts[0] < counts[1] == counts[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("guess", 1024, 0), "'guess'.*needle"),
        (("copy", 40, 0), "the document has 40"),
    ],
)
def test_exercises_that_cannot_be_made_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        pocket.make_exercise(*arguments)


def test_a_vocabulary_too_small_for_the_cases_is_told():
    with pytest.raises(ValueError, match="at most 121"):
        tasks.draw_cases(random.Random(0), "trace", 100)


FLOORS = {"needle": 0.85, "values": 0.7, "trace": 0.6, "copy": 0.8, "aggregate": 0.4}


@pytest.mark.parametrize("task", pocket.TASKS)
@pytest.mark.parametrize("name", pocket.POCKET_MODELS)
@pytest.mark.thin(2)
def test_answers_each_task(models, name, task):
    assert train.accuracy(*models[name], tokens=1024, questions=16, seed=900, task=task) >= FLOORS[task]


@pytest.mark.parametrize("name", pocket.POCKET_MODELS)
def test_the_record_is_of_these_weights(name):
    record = json.loads((pocket.WEIGHTS / name / "training.json").read_text())
    assert record["arch"] == name
    assert [tuple(stage.values()) for stage in record["stages"]] == [tuple(stage) for stage in train.STAGES]
    assert record["questions_per_task_and_length"] >= 64
    for task in pocket.TASKS:
        assert set(record["exact_match"][task]) == {"1024", "2048", "4096", "8192"}


def test_a_fact_that_is_not_there_is_not_answered(loaded):
    model, tokenizer = loaded
    document = pocket.make_document(1024, 8, seed=6)
    hits = 0
    for fact in document.facts:
        sentence = f"they call the {' '.join(fact.question.split()[-2:])} {fact.answer} ."
        assert sentence in document.text
        ids = tokenizer(document.text.replace(sentence, "") + " " + fact.question, return_tensors="pt").input_ids
        with torch.inference_mode():
            hits += int(model(ids).logits[0, -1].argmax()) == tokenizer(fact.answer).input_ids[0]
    assert hits <= 1


def test_generate_takes_padded_batches_and_beams(loaded):
    model, tokenizer = loaded
    documents = [pocket.make_document(tokens, 4, seed=tokens) for tokens in (300, 420)]
    pairs = [pocket.questions(document)[1] for document in documents]
    batch = tokenizer([prompt for prompt, _ in pairs], return_tensors="pt", padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch.attention_mask[0, 0] == 0
    for options in ({}, {"num_beams": 2}):
        out = model.generate(**batch, max_new_tokens=pocket.ANSWER_WORDS, do_sample=False, **options)
        texts = tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :])
        assert texts == [answer for _, answer in pairs]


@pytest.mark.parametrize("length", [128, 1024])
def test_training_batches_have_the_asked_shape_and_rising_positions(length):
    mix = dict.fromkeys(pocket.TASKS, 1.0)
    batch = make_batch(random.Random(0), length, 8, exams=0.5, filler=length > 128, jumps=1.0, tasks=mix)
    assert batch.ids.shape == batch.positions.shape == batch.weights.shape == (8, length)
    assert (batch.positions[:, 1:] > batch.positions[:, :-1]).all()
    assert batch.positions.max() < 16384
    assert (batch.weights == 1).any()


@pytest.mark.parametrize("task", pocket.TASKS)
@pytest.mark.parametrize("seed", range(3))
def test_lessons_ask_only_what_was_told(task, seed):
    rng = random.Random(seed)
    for items in (exam(rng, 1024, task), drill(rng, 1024, True, task)):
        asked = 0
        for number, (words, weights) in enumerate(items):
            assert len(words) == len(weights)
            answer = [word for word, weight in zip(words, weights, strict=True) if weight > 0.05]
            if not answer:
                continue
            asked += 1
            told = " ".join(word for before, marks in items[:number] if max(marks) <= 0.05 for word in before)
            question = words[: -len(answer) - 1]
            assert solve(task, told, question[-2:] if task == "needle" else question[-1:]) == answer
        assert asked >= 2
        assert set(IDS) >= {word for words, _ in items for word in words}
    assert sum(len(words) for words, _ in exam(rng, 1024, task)) == 1024


@pytest.mark.parametrize("arch", pocket.POCKET_MODELS)
def test_training_is_repeatable_and_lets_the_started_heads_rest_at_first(arch, monkeypatch):
    monkeypatch.setattr(train, "HOLD_TOKENS", 1024)
    monkeypatch.setattr(train, "STEP_TOKENS", 256)
    stages = (train.Stage(128, 1024, 0.0, 0.0, 1.0), train.Stage(256, 512, 0.5, 0.5, 0.8))
    fresh = train.build_model(arch, 0).state_dict()
    first, again, whole = (train.train(arch, 0, some)[0].state_dict() for some in (stages[:1], stages[:1], stages))
    assert all(torch.equal(first[name], again[name]) for name in first)
    # The started heads rest in the first stage, nothing does in the second.
    assert {name for name in fresh if torch.equal(first[name], fresh[name])} == {
        name for name in fresh if "self_attn" in name and "layers.5" not in name
    }
    assert not any(torch.equal(whole[name], first[name]) for name in whole if "proj" in name)


def test_the_training_command_ends_with_a_model_and_its_record(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "STAGES", (train.Stage(128, 2048, 0.0, 0.0, 1.0),))
    monkeypatch.setattr(train, "LENGTHS_TESTED", (128,))
    app = train.typer.Typer()
    app.command()(train.main)
    result = CliRunner().invoke(app, ["--arch", "qwen3", "--out", str(tmp_path), "--questions", "2"])
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["arch"] == "qwen3" and set(record["exact_match"]) == set(pocket.TASKS)
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= {file.name for file in tmp_path.iterdir()}
