"""The pocket model answers from int8 as it does from what it made."""

import pytest

from scout_hf import ScoutConfig
from scout_hf.eval.decode_path import ask_all
from scout_hf.eval.pocket import ANSWER_WORDS, make_document

DOCUMENTS = [make_document(tokens=500, facts=8, seed=seed) for seed in (7, 8)]
KINDS = [
    {"budget": 128},
    {"budget": None, "split": "cpu", "layer_ahead": False, "resident": 64},
]


def answers(pocket, options):
    quizzes = [(document.text, [fact.question for fact in document.facts]) for document in DOCUMENTS]
    return ask_all(*pocket, ScoutConfig(block_size=16, **options), quizzes, ANSWER_WORDS)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_answers(pocket, options):
    truth = [fact.answer for document in DOCUMENTS for fact in document.facts]
    plain, packed = answers(pocket, options), answers(pocket, options | {"host_dtype": "int8"})
    texts = [[one.text for one in session.answers] for session in (plain, packed)]
    right = [sum(text == answer for text, answer in zip(found, truth)) for found in texts]
    assert len(truth) == 16 and right[0] >= 12
    assert right[1] >= right[0] - 1
    assert sum(a != b for a, b in zip(*texts)) <= 2
    assert not packed.stats.exact and packed.kv_bytes["host"] < 0.4 * plain.kv_bytes["host"]
    # The logits are others: it was int8 that answered.
    assert all((a.logits - b.logits).abs().max() > 1e-4 for a, b in zip(plain.answers, packed.answers))
