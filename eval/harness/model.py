"""The lm-eval model class ``scout``: HFLM on a patched model, with middle truncation and decode-path scores."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import DynamicCache

import scout_hf
from scout_hf import ConfigError, RecallIntervals, ScoutCache, ScoutConfig
from scout_hf.eval.harness.tally import Tally, measured
from scout_hf.eval.scoring import decode_steps, score_pairs

TRUNCATIONS = ("middle", "left")


def truncate(ids: Sequence[int], limit: int, how: str) -> list[int]:
    """At most ``limit`` tokens of a prompt, special tokens included.

    ``middle`` keeps the first and the last ``limit // 2`` tokens (LongBench, ``pred.py``), ``left`` the last ``limit``.
    """
    if len(ids) <= limit:
        return list(ids)
    half = limit // 2 if how == "middle" else 0
    return [*ids[:half], *ids[-half:]] if half else list(ids[-limit:])


SCORINGS = ("decode", "prefill")
ATTENTIONS = ("scout", "stock")
SETTINGS = tuple(field.name for field in dataclasses.fields(ScoutConfig))
log = logging.getLogger(__name__)


class ScoutLM(HFLM):
    """HFLM whose model is patched; every field of :class:`scout_hf.ScoutConfig` is a model argument.

    Parameters
    ----------
    pretrained : str or PreTrainedModel
        As for HFLM; a model object must not be patched yet.
    truncation : {"middle", "left"}
        What a prompt that is too long loses; ``left`` is what lm-eval does.
    scoring : {"decode", "prefill"}
        ``decode`` takes log-likelihoods from decode steps, ``prefill`` from one dense pass, as HFLM does.
    attention : {"scout", "stock"}
        ``stock`` leaves the model unpatched, for a comparison in which nothing else differs.
    **options
        Settings of ScoutConfig (``recall`` may also be the path of a saved profile); everything else goes to HFLM, and
        what that does not know to ``from_pretrained``.

    Raises
    ------
    ConfigError
        For a setting that is not allowed, before any weight is loaded.
    """

    def __init__(
        self,
        pretrained: Any,
        truncation: str = "middle",
        scoring: str = "decode",
        attention: str = "scout",
        **options: Any,
    ) -> None:
        for name, value, allowed in (
            ("truncation", truncation, TRUNCATIONS),
            ("scoring", scoring, SCORINGS),
            ("attention", attention, ATTENTIONS),
        ):
            if value not in allowed:
                raise ConfigError(f"{name}={value!r} is not allowed: {' or '.join(map(repr, allowed))}")
        self.scout_config = _take_settings(options)
        self.cut, self.scoring, self.attention = truncation, scoring, attention
        self.handle: scout_hf.Handle | None = None
        self.tallies: dict[str, Tally] = {}
        self._tally = Tally()
        self._found_batch_size: int | None = None
        super().__init__(pretrained, **options)
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None and self.world_size == 1:
            # HFLM leaves this out where the processes have no GPU, or one each: all of them would do all of the work.
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        if attention == "scout":
            self.handle = scout_hf.patch(self.model, self.scout_config)

    def _create_model(self, *args: Any, **options: Any) -> None:
        # Names of digests, backends and layers are checked against the model's config, ahead of its weights.
        ScoutCache(self.config, self.scout_config)
        super()._create_model(*args, **options)

    # -- generation ---------------------------------------------------------------------------------------------

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask, (rows, tokens); rows longer than ``left_truncate_len`` are cut as ``truncation`` says."""
        if self.cut == "left" or left_truncate_len is None:
            return super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if ids.shape[1] <= left_truncate_len:
            return ids, mask
        rows = [truncate(row[real.bool()].tolist(), left_truncate_len, self.cut) for row, real in zip(ids, mask)]
        log.warning("prompts of up to %d tokens lose their middle: %d tokens fit", ids.shape[1], left_truncate_len)
        longest = max(map(len, rows))
        cut, kept = ids.new_full((len(rows), longest), self.tokenizer.pad_token_id), mask.new_zeros(len(rows), longest)
        for number, row in enumerate(rows):
            place = slice(longest - len(row), longest) if padding_side == "left" else slice(len(row))
            cut[number, place], kept[number, place] = ids.new_tensor(row), 1
        return cut, kept

    def _model_generate(self, *args: Any, **options: Any) -> torch.Tensor:
        with measured(self.model, self._tally):
            return super()._model_generate(*args, **options)

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        return self._by_task(requests, lambda part: super(ScoutLM, self).generate_until(part, _unseen(disable_tqdm)))

    # -- log-likelihoods ----------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._by_task(requests, lambda part: super(ScoutLM, self).loglikelihood(part, _unseen(disable_tqdm)))

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        # Several processes exchange numbers in there, and need not have the same tasks.
        together = self.world_size > 1
        run = lambda part: super(ScoutLM, self).loglikelihood_rolling(part, _unseen(disable_tqdm))  # noqa: E731
        return self._by_task(requests, run, together)

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Scores of (key, context ids, continuation ids); contexts that are too long are cut first."""
        cut = []
        for key, context, continuation in requests:
            capacity = self.max_length + 1 - len(continuation)
            if capacity < 1:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens does not fit: max_length is {self.max_length}; set "
                    "a larger one, or score such a text with loglikelihood_rolling"
                )
            cut.append((key, truncate(context, capacity, self.cut), list(continuation)))
        if self.scoring == "prefill" or self.backend != "causal":
            with measured(self.model, self._tally):
                return super()._loglikelihood_tokens(cut, disable_tqdm, override_bs)
        batch_size = self.batch_size if self.batch_size != "auto" else override_bs or self._detect_batch_size()
        pairs = [(context, continuation) for _, context, continuation in cut]
        quiet = _unseen(disable_tqdm) or self.rank != 0
        with (
            measured(self.model, self._tally),
            self._autocast(),
            tqdm(
                total=decode_steps(pairs), disable=quiet, unit="token", mininterval=0.5, desc="Decoding continuations"
            ) as bar,
        ):
            scores = [tuple(score) for score in score_pairs(self.model, pairs, self._new_cache, batch_size, bar.update)]
        for (key, _, _), score in zip(cut, scores):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, score)
        return scores

    def _new_cache(self) -> DynamicCache | ScoutCache:
        return self.handle.new_cache() if self.handle else DynamicCache(config=self.model.config)

    def _autocast(self) -> contextlib.AbstractContextManager:
        dtype = self.mixed_precision_dtype
        return torch.autocast(device_type=self.device.type, dtype=dtype, enabled=dtype is not None)

    def _detect_batch_size(self, requests: list | None = None, pos: int = 0) -> int:
        if requests is not None:
            return super()._detect_batch_size(requests, pos)
        # Five passes over max_length tokens: once for all tasks.
        self._found_batch_size = self._found_batch_size or super()._detect_batch_size()
        return self._found_batch_size

    # -- what it cost -------------------------------------------------------------------------------------------

    def _by_task(self, requests: list, run: Callable[[list], list], together: bool = False) -> list:
        """Run requests task by task, or all together, and keep a tally of each."""
        parts: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            parts.setdefault("" if together else request.task_name or "", []).append(number)
        answers, tallies = [None] * len(requests), {}
        for name, numbers in parts.items():
            with self._tallied() as tally:
                for number, answer in zip(numbers, run([requests[number] for number in numbers])):
                    answers[number] = answer
            names = {request.task_name or "" for request in requests} if together else {name}
            tallies.update(dict.fromkeys(names, tally))
        for number, part in enumerate(self.gather_object(tallies) or ()):
            for name, tally in part.items():
                # Processes work at the same time, request types one after the other.
                self.tallies.setdefault(name, Tally()).add(tally, at_once=number > 0)
        return answers

    @contextmanager
    def _tallied(self) -> Iterator[Tally]:
        self._tally = Tally()
        if self.handle:
            self.handle.reset_stats()
        yield self._tally
        if self.handle:
            self._tally.add_stats(self.handle.stats())

    def get_model_info(self) -> dict[str, Any]:
        """HFLM's, and under ``scout_hf`` the settings and what every task cost."""
        settings = dataclasses.asdict(self.scout_config)
        return super().get_model_info() | {
            "scout_hf": {
                "version": scout_hf.__version__,
                "attention": self.attention,
                "truncation": self.cut,
                "scoring": self.scoring,
                "settings": settings if self.handle else None,
                "exact": self.handle.exact if self.handle else None,
                "tasks": {name: tally.as_dict() for name, tally in self.tallies.items()},
            }
        }


def _take_settings(options: dict[str, Any]) -> ScoutConfig:
    """The ScoutConfig among model arguments, which are taken out."""
    known = {*SETTINGS, *inspect.signature(HFLM.__init__).parameters}
    for name in set(options) - known:
        if close := difflib.get_close_matches(name, SETTINGS, n=1, cutoff=0.8):
            raise ConfigError(f"model argument {name!r} is unknown; {close[0]!r} is a setting of ScoutConfig")
    given = {name: options.pop(name) for name in SETTINGS if name in options}
    # lm-eval's command line takes None for itself and none for a word.
    given = {name: None if value == "none" else value for name, value in given.items()}
    if isinstance(profile := given.get("recall"), str):
        if not Path(profile).is_file():
            raise ConfigError(f"recall={profile!r}: there is no such file; give a saved recall profile, or a number")
        given["recall"] = RecallIntervals.load(profile)
    return ScoutConfig(**given)


def _unseen(disabled: bool) -> bool:
    """Whether a progress bar would be seen by nobody, as in a file."""
    return disabled or not sys.stderr.isatty()
