"""One round: sparse steps draft tokens, an exact pass over all of them checks them, and the loop is served from it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from scout_hf.cache import ScoutCache
from scout_hf.compat.cache_names import CACHE, OLD
from scout_hf.drafting.picks import Picks
from scout_hf.errors import CacheStateError
from scout_hf.step import Role

CONTINUED = {CACHE, OLD, "input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep", "return_dict"}
KNOWN = CONTINUED | {"tokenizer"}
"""Arguments of a decode step that drafts can continue; stop strings bring the tokenizer, which models ignore."""


class Round:
    """Outputs of an exact pass that the loop has not asked for yet. The cache is ahead of the loop by so many tokens.

    Parameters
    ----------
    cache : ScoutCache
    before : int
        Tokens in the cache before this round.
    drafts : Tensor (rows, drafts)
    outputs : ModelOutput
        Of the check: logits (rows, 1 + drafts, vocabulary).

    Attributes
    ----------
    drafts, outputs
        As given.
    served : int
        Positions of the check that the loop was given.
    """

    def __init__(self, cache: ScoutCache, before: int, drafts: torch.Tensor, outputs: Any):
        self.cache, self.drafts, self.served = cache, drafts, 0
        self._before, self.outputs = before, outputs

    @property
    def left(self) -> int:
        """Drafts that the loop has not come to."""
        return self.drafts.shape[1] - self.served + 1

    def fits(self, ids: torch.Tensor) -> bool:
        """Whether the loop goes on with the next draft in all rows; ``ids`` is (rows, 1)."""
        return self.left > 0 and torch.equal(ids, self.drafts[:, self.served - 1 : self.served].to(ids.device))

    def serve(self) -> Any:
        """The output for the next position, as a decode step gives it."""
        at, parts = self.served, dict(self.outputs.items())
        # A copy: what is kept of one step must not keep the logits of the others.
        parts["logits"] = self.outputs.logits[:, at : at + 1].clone()
        output = type(self.outputs)(**parts)
        self.served += 1
        return output

    def take_back(self) -> None:
        """Remove from the cache what the loop has not come to."""
        crop_to(self.cache, self._before + self.served)


def unknown_inputs(given: dict[str, Any]) -> list[str]:
    """Arguments of a decode step that drafts cannot continue."""
    # Settings that are off change nothing.
    return sorted(name for name in given.keys() - KNOWN if given[name] is not None and given[name] is not False)


def draft(
    run: Callable[..., Any],
    cache: ScoutCache,
    given: dict[str, Any],
    ids: torch.Tensor,
    picks: Picks,
    most: int,
) -> torch.Tensor:
    """Draft up to ``most`` tokens by sparse steps, (rows, drafts), and leave the cache as it was.

    Parameters
    ----------
    run : callable
        A pass of the model.
    cache : ScoutCache
    given : dict
        Arguments of the decode step that is due.
    ids : Tensor (rows, tokens)
        All tokens up to the one that this step takes.
    picks : Picks
    most : int
    """
    before, start = cache.get_seq_length(), ids.shape[1]
    with _taken_back(cache, before), picks.with_same_randomness(ids.device), torch.no_grad():
        for number in range(most):
            tokens = ids[:, -1:].to(given["input_ids"].device)
            outputs = run(**_continued(given, tokens, skipped=number))
            ids = torch.cat([ids, picks.pick(ids, outputs.logits[:, -1])], dim=-1)
            if picks.all_ended(ids):
                break
    return ids[:, start:]


def check(run: Callable[..., Any], cache: ScoutCache, given: dict[str, Any], drafts: torch.Tensor) -> Round:
    """One exact pass over the token that is due and its drafts; the cache then holds all of them."""
    before, ids = cache.get_seq_length(), given["input_ids"]
    with _in_role(cache, Role.CHECK):
        outputs = run(**_continued(given, torch.cat([ids, drafts.to(ids.device)], dim=-1)))
    return Round(cache, before, drafts, outputs)


def crop_to(cache: ScoutCache, length: int) -> None:
    """Remove what the cache holds beyond ``length`` tokens."""
    beyond = cache.get_seq_length() - length
    if beyond > 0:
        cache.crop(-beyond)


def wait(outputs: Any) -> float:
    """The time when this pass is done."""
    if outputs.logits.is_cuda:
        torch.cuda.synchronize(outputs.logits.device)
    return time.perf_counter()


@contextlib.contextmanager
def _in_role(cache: ScoutCache, role: Role) -> Iterator[None]:
    cache.role = role
    try:
        yield
    finally:
        cache.role = Role.ORDINARY


@contextlib.contextmanager
def _taken_back(cache: ScoutCache, length: int) -> Iterator[None]:
    """Passes inside are drafts; what they stored is removed at the end, also after an error or interrupt."""
    try:
        with _in_role(cache, Role.DRAFT):
            yield
    finally:
        try:
            crop_to(cache, length)
        except BaseException:
            # Interrupted before it began, sparse tokens would stay; half cropped, the cache refuses to go on.
            with contextlib.suppress(CacheStateError):
                crop_to(cache, length)
            raise


def _continued(given: dict[str, Any], ids: torch.Tensor, skipped: int = 0) -> dict[str, Any]:
    """Arguments of a pass over ``ids`` (rows, n), whose first token stands ``skipped`` behind that of ``given``."""
    count = ids.shape[1]
    inputs, more = dict(given, input_ids=ids), skipped + count - 1
    if (mask := given.get("attention_mask")) is not None and more:
        inputs["attention_mask"] = torch.cat([mask, mask.new_ones((len(mask), more))], dim=-1)
    if (positions := given.get("position_ids")) is not None:
        steps = torch.arange(skipped, skipped + count, dtype=positions.dtype, device=positions.device)
        inputs["position_ids"] = positions[..., -1:] + steps
    if "logits_to_keep" in given:
        inputs["logits_to_keep"] = count
    return inputs
