"""How a draft picks its token: as the loop of ``generate()`` would from these logits, with the same random numbers."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from transformers.generation import logits_process

STATELESS = tuple(
    found
    for name in (
        "EncoderNoRepeatNGramLogitsProcessor",
        "EncoderRepetitionPenaltyLogitsProcessor",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "ExponentialDecayLengthPenalty",
        "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "MinPLogitsWarper",
        "NoBadWordsLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor",
        "SuppressTokensLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopHLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
    )
    if (found := getattr(logits_process, name, None)) is not None
)
"""Processors whose answer depends on ids and logits alone, and that keep nothing: only these are asked about drafts."""


class Picks:
    """Picks the tokens of drafts of one ``generate()``.

    Parameters
    ----------
    processors : iterable
        Those of the call. Others than the known stateless ones are left out: they must see no token that is not
        generated, and leaving them out makes drafts worse, never the text.
    generation_config : GenerationConfig
    prompt : int
        Tokens of the prompt.
    """

    def __init__(self, processors: Any, generation_config: Any, prompt: int):
        self._processors = [processor for processor in processors if type(processor) in STATELESS]
        self._samples, self._prompt = bool(generation_config.do_sample), prompt
        self._ends = _as_list(generation_config.eos_token_id)
        pad = _as_list(generation_config.pad_token_id)
        self._pad = (pad or self._ends or [0])[0]
        self._most = generation_config.max_length

    def with_same_randomness(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Context manager: afterwards random numbers go on as if none had been drawn.

        So the loop draws for a token what its draft was drawn with. For equal probabilities that gives the same token,
        for close ones nearly always: 1 - d at best and (1 - d) / (1 + d) at worst for a total variation d (Daliri et
        al., arXiv 2408.07978).
        """
        if device.type in ("cpu", "cuda"):
            devices = [device] if device.type == "cuda" else []
            return torch.random.fork_rng(devices=devices, enabled=self._samples)
        kind = {"devices": [device], "device_type": device.type}
        return torch.random.fork_rng(**kind, enabled=self._samples)

    def left(self, ids: torch.Tensor) -> int:
        """How many tokens may follow ``ids``, (rows, tokens)."""
        return ids.shape[1] if self._most is None else int(self._most) - ids.shape[1]

    def pick(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The token that follows ``ids`` (rows, tokens) by ``logits`` (rows, vocabulary), (rows, 1).

        Rows that have ended get padding, as in the loop.
        """
        scores = logits.to(copy=True, dtype=torch.float32, device=ids.device)
        for processor in self._processors:
            scores = processor(ids, scores)
        if self._samples:
            tokens = torch.multinomial(torch.nn.functional.softmax(scores, dim=-1), num_samples=1)
        else:
            tokens = scores.argmax(dim=-1, keepdim=True)
        if self._ends and len(ids) > 1:
            tokens = tokens.masked_fill(self._ended(ids)[:, None], self._pad)
        return tokens

    def all_ended(self, ids: torch.Tensor) -> bool:
        """Whether no row goes on behind ``ids``."""
        return bool(self._ends) and bool(self._ended(ids).all())

    def _ended(self, ids: torch.Tensor) -> torch.Tensor:
        new = ids[:, self._prompt :]
        if not new.shape[1]:
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        ends = torch.tensor(self._ends, dtype=ids.dtype, device=ids.device)
        # A row that a stop string ended shows that by its padding alone.
        return torch.isin(new, ends).any(dim=1) | ((new[:, -1] == self._pad) & (len(ids) > 1))


def _as_list(numbers: Any) -> list[int]:
    if numbers is None:
        return []
    if isinstance(numbers, torch.Tensor):
        numbers = numbers.tolist()
    return list(numbers) if isinstance(numbers, (list, tuple)) else [int(numbers)]
