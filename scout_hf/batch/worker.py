"""One model that answers groups of prompts: what a group shares is read once, and each prompt begins at its end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from scout_hf import CACHE, ConfigError, Handle, PrefixStore, SessionError, patch
from scout_hf.batch.groups import Group
from scout_hf.batch.prompts import Prompt
from scout_hf.batch.settings import Settings
from scout_hf.prefix import Reading
from scout_hf.sessions import fingerprint


@dataclass(frozen=True)
class Result:
    """What became of one prompt.

    Attributes
    ----------
    index : int
    tokens : tuple of int
        Of the answer.
    error : str or None
    read, found : int
        Tokens that were read for it, and that the store had; those that a group shares count for its first prompt.
    weights : str or None
        One word for the weights that answered.
    """

    index: int
    tokens: tuple[int, ...] = ()
    error: str | None = None
    read: int = 0
    found: int = 0
    weights: str | None = None


@dataclass(frozen=True)
class Recipe:
    """What a worker is made from; can be sent to another process.

    Attributes
    ----------
    load : callable
        Returns the model, in eval mode.
    settings : Settings
    store : PrefixStore, path-like or None
    keep_all : bool
        Whether the store keeps whole prompts.
    pad : int or None
        The token id that ``generate()`` pads with.
    """

    load: Callable[[], Any]
    settings: Settings
    store: PrefixStore | str | os.PathLike[str] | None
    keep_all: bool
    pad: int | None


class Worker:
    """A loaded model.

    Parameters
    ----------
    recipe : Recipe

    Raises
    ------
    ScoutError
        If the model cannot be patched with these settings and this store.
    """

    def __init__(self, recipe: Recipe):
        self.model, self._recipe = recipe.load(), recipe
        with patch(self.model, recipe.settings.config, store=recipe.store):
            self.weights = fingerprint(self.model).key[:32]

    def answers(self, group: Group, refusal: Callable[[Prompt], str | None] = lambda prompt: None) -> Iterator[Result]:
        """The prompts of a group one by one; what goes wrong with one is told in its result.

        ``refusal``: why a prompt is not to be answered; asked right before it would be.
        """
        recipe = self._recipe
        store = recipe.store if group.shared or recipe.keep_all else None
        with patch(self.model, recipe.settings.config, store=store) as handle:
            begin, before = _Begin(handle, group, recipe.keep_all), (0, 0)
            for prompt in group.prompts:
                tokens: tuple[int, ...] = ()
                error = refusal(prompt)
                try:
                    tokens = () if error else self._answer(begin, prompt)
                except Exception as reason:
                    error = f"{type(reason).__name__}: {reason}"
                stats = handle.stats()
                now = stats.prefill_tokens, stats.found_tokens
                counts = {"read": now[0] - before[0], "found": now[1] - before[1]}
                yield Result(prompt.index, tokens, error, **counts, weights=self.weights)
                before = now

    def _answer(self, begin: _Begin, prompt: Prompt) -> tuple[int, ...]:
        settings = self._recipe.settings
        window = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if window and len(prompt.ids) + settings.max_new_tokens > window:
            raise ConfigError(
                f"the prompt has {len(prompt.ids)} tokens, and {settings.max_new_tokens} for the answer, and this "
                f"model was made for {window}"
            )
        try:
            return self._generate(begin.cache(), prompt)
        except SessionError:
            if not begin.drop_damaged():
                raise
            return self._generate(begin.cache(), prompt)

    @torch.no_grad()
    def _generate(self, cache: Any, prompt: Prompt) -> tuple[int, ...]:
        device, settings = self.model.device, self._recipe.settings
        ids = torch.tensor(prompt.ids[None], dtype=torch.int64, device=device)
        own = {} if cache is None else {CACHE: cache}
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            # Of the row, not of its turn: whoever takes it, and after whatever, draws the same numbers.
            torch.manual_seed(settings.seed + int(prompt.key[:12], 16))
            made = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=settings.max_new_tokens,
                pad_token_id=self._recipe.pad,
                **{"do_sample": False, **settings.generate, **own},
            )
        return tuple(made[0, ids.shape[1] :].tolist())


class _Begin:
    """What the prompts of a group share, read when the first one wants it."""

    def __init__(self, handle: Handle, group: Group, keep_all: bool):
        self._handle, self._group, self._keep_all = handle, group, keep_all
        self._reading: Reading | None = None

    def cache(self) -> Any:
        """A cache of its own with what is shared; None where ``generate()`` makes its own, which the store fills."""
        if not self._group.shared:
            return None
        if self._reading is None:
            ids = torch.tensor(self._group.prompts[0].ids[: self._group.shared], dtype=torch.int64, device="cpu")
            self._reading = self._handle.read(ids, must_keep=False)
        # What generate() reads behind the tokens of a cache that it is given, it does not keep.
        return None if self._keep_all else self._reading.cache.fork()

    def drop_damaged(self) -> bool:
        """After a SessionError: forget what was read, and what of it is damaged on disk; False if nothing is."""
        reading, self._reading = self._reading, None
        store = self._handle.store
        # Without a reading it failed while reading, which has removed it already.
        return store is not None and (reading is None or store.remove_damaged(reading.pieces) > 0)
