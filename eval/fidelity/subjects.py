"""The models that a study asks, the questions they get, and a name for their weights."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scout_hf.eval.decode_path import tokenize
from scout_hf.eval.fidelity.cells import TEXT
from scout_hf.eval.fidelity.stress import apply_stress
from scout_hf.eval.pocket import POCKET_MODELS, Fact, load_pocket, make_exercise

# Away from the seeds that the pocket models' own evaluation uses.
FIRST_SEED = 50_000
SEEDS_PER_RUN = 1000
SAMPLE_TOKENS = 1024


class Quiz(NamedTuple):
    """A document as token ids (1, tokens), and the facts of it that are asked for."""

    ids: torch.Tensor
    facts: tuple[Fact, ...]


@lru_cache(maxsize=2)
def load_subject(name: str, stress: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model of its own in eval mode, with outlier channels if asked for, and its tokenizer.

    ValueError for an unknown name, FileNotFoundError where its weights are not installed.
    """
    if name == TEXT:
        from scout_hf.eval.text import held_out_ids, load_text_model

        model, tokenizer = load_text_model()
        sample = held_out_ids(SAMPLE_TOKENS, FIRST_SEED)
    else:
        model, tokenizer = load_pocket(name)
        sample = tokenize(tokenizer, make_exercise("needle", SAMPLE_TOKENS, FIRST_SEED - 1).text)
    apply_stress(model, stress, sample)
    return model, tokenizer


def available() -> dict[str, str]:
    """Names of the models that can be loaded here, with the hash of their weights."""
    found = {}
    for name in (*POCKET_MODELS, TEXT):
        try:
            found[name] = _hash_of(name)
        except (FileNotFoundError, ImportError):
            continue
    return found


@lru_cache
def _hash_of(name: str) -> str:
    return weight_hash(load_subject(name, "none")[0])


def weight_hash(model: PreTrainedModel) -> str:
    """Twelve hexadecimal digits that depend on every weight, its name and its dtype."""
    mark = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        mark.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        mark.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return mark.hexdigest()[:12]


@lru_cache(maxsize=4)
def quizzes(model: str, task: str, tokens: int, questions: int, seed: int, rivals: bool) -> tuple[Quiz, ...]:
    """Documents with ``questions`` questions in all, the same ones for every setting that is measured."""
    _, tokenizer = load_subject(model, "none")
    found: list[Quiz] = []
    while left := questions - sum(len(quiz.facts) for quiz in found):
        number = FIRST_SEED + SEEDS_PER_RUN * seed + len(found)
        document = make_exercise(task, tokens, number, rivals="growing" if rivals else "fixed")
        found.append(Quiz(tokenize(tokenizer, document.text), document.facts[:left]))
    return tuple(found)
