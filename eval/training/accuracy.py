"""How many questions a model answers exactly, with stock full attention: the figure everything sparse is held to."""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from scout_hf import CACHE
from scout_hf.eval.pocket import make_exercise


@torch.inference_mode()
def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    n_questions: int,
    seed: int,
    task: str = "needle",
) -> float:
    """Share of `n_questions` answered word for word by greedy decoding, each on its own after a document.

    `tokens` is the length of the document; as many documents are made from `seed` on as the questions need.
    """
    right = asked = 0
    while asked < n_questions:
        document = make_exercise(task, tokens, seed)
        seed += 1
        cache = DynamicCache(config=model.config)
        model(tokenizer(document.text, return_tensors="pt").input_ids, **{CACHE: cache}, logits_to_keep=1)
        for fact in document.facts[: n_questions - asked]:
            step = tokenizer(document.prompt(fact), return_tensors="pt").input_ids
            wanted = tokenizer(fact.answer).input_ids
            answer = []
            for _ in wanted:
                logits = model(step, **{CACHE: cache}, logits_to_keep=1).logits
                step = logits[:, -1].argmax(-1, keepdim=True)
                answer.append(int(step))
            # A negative number of tokens to remove is the one form every release of transformers 5 takes.
            cache.crop(tokens - cache.get_seq_length())
            right += answer == wanted
            asked += 1
    return right / asked
