"""Many questions about documents at once, every token of them and of their answers a decode step.

A question fed in one pass would be attended exactly by any cache. Questions of equal length are decoded together, as
rows of one batch that share their document's pages; each row chooses and attends its own blocks.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import Cache, PreTrainedModel

from scout_hf import CACHE


@dataclass
class Answers:
    """What came of questions.

    Attributes
    ----------
    ids : list of list of int
        Answer tokens, in the order asked.
    steps, seconds : int, float
        Tokens decoded over all rows, and the time of that; copies of the cache not included.
    right : list of bool
        Which answers were, once somebody has compared them.
    """

    ids: list[list[int]]
    steps: int = 0
    seconds: float = 0.0
    right: list[bool] = field(default_factory=list)


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    cache: Cache,
    questions: Sequence[list[int]],
    owners: Sequence[int],
    length: int,
    rows: int,
) -> Answers:
    """Greedy answers of ``length`` tokens to each question, as token ids; the cache stays as it is.

    Parameters
    ----------
    model : PreTrainedModel
        Patched or not; must take ``cache``.
    cache : Cache
        Documents, a row each.
    questions : sequence of list of int
        None of them empty.
    owners : sequence of int
        The row of the document that each question is about.
    length : int
        Answer tokens.
    rows : int
        Questions to decode together, at most.
    """
    if length < 1 or rows < 1 or not all(questions) or len(questions) != len(owners):
        raise ValueError(
            f"length={length}, rows={rows}, {len(questions)} questions about {len(owners)} documents: length and rows "
            "from 1 up, no question empty, and a document for each"
        )
    found = Answers([[] for _ in questions])
    same: dict[int, list[int]] = {}
    for index, question in enumerate(questions):
        same.setdefault(len(question), []).append(index)
    for alike in same.values():
        for first in range(0, len(alike), rows):
            chosen = alike[first : first + rows]
            ids = torch.tensor([questions[index] for index in chosen], dtype=torch.int64, device=model.device)
            twin = copy.deepcopy(cache)
            twin.batch_select_indices(
                torch.tensor([owners[index] for index in chosen], dtype=torch.int64, device=model.device)
            )
            begin = time.perf_counter()
            given = decode(model, twin, ids, length)
            found.seconds += time.perf_counter() - begin
            found.steps += len(chosen) * (ids.shape[1] + length - 1)
            for index, answer in zip(chosen, given.tolist()):
                found.ids[index] = answer
    return found


@torch.no_grad()
def decode(model: PreTrainedModel, cache: Cache, ids: torch.Tensor, length: int) -> torch.Tensor:
    """Feed ``ids`` (rows, n) token by token and go on greedily; the new tokens, (rows, length)."""
    for place in range(ids.shape[1] - 1):
        model(ids[:, place : place + 1], **{CACHE: cache}, logits_to_keep=1)
    token, given = ids[:, -1:], []
    for _ in range(length):
        token = model(token, **{CACHE: cache}, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        given.append(token)
    return torch.cat(given, dim=1)
