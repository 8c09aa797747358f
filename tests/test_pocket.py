"""The packaged pocket model is a real, small GQA Llama that retrieves; its documents are exact and repeatable."""

import random

import pytest
import torch
from transformers import LlamaForCausalLM

from scout_hf.eval import pocket
from scout_hf.eval.pocket import vocabulary
from scout_hf.eval.pocket.evaluate import accuracy
from scout_hf.eval.pocket.lessons import make_batch


@pytest.fixture(scope="module")
def loaded():
    return pocket.load_pocket()


def test_is_a_small_grouped_query_llama(loaded):
    model, tokenizer = loaded
    assert type(model) is LlamaForCausalLM
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert len(tokenizer) == vocabulary.SIZE == model.config.vocab_size
    assert sum(file.stat().st_size for file in pocket.WEIGHTS.rglob("*") if file.is_file()) <= 5_000_000
    for ids in (model.config, model.generation_config, tokenizer):
        assert ids.eos_token_id == vocabulary.SPECIAL.index(vocabulary.END)
        assert ids.pad_token_id == vocabulary.SPECIAL.index(vocabulary.PAD)


def test_missing_weights_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(pocket, "WEIGHTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="pocket.train"):
        pocket.load_pocket()


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


def test_answers_needles(loaded):
    assert accuracy(*loaded, tokens=1024, n_questions=24, seed=900) >= 0.8


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
    batch = make_batch(random.Random(0), length, 3, exams=0.5, filler=length > 128, jumps=1.0)
    assert batch.ids.shape == batch.positions.shape == batch.weights.shape == (3, length)
    assert (batch.positions[:, 1:] > batch.positions[:, :-1]).all()
    assert batch.positions.max() < 16384
    assert (batch.weights == 1).any()
