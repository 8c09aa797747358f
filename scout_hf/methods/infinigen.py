"""InfiniGen (arXiv 2406.19707): predict the next layer's important tokens, recall them, attend on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from scout_hf.config import ScoutConfig
from scout_hf.errors import ConfigError
from scout_hf.fusion import Partial, fuse
from scout_hf.kernels.attend import attend, fold_group
from scout_hf.methods.base import register_method
from scout_hf.methods.host_to_device import InFlightCopy, tokens_to_device
from scout_hf.methods.offloading import OFFLOADING, OffloadingMethod
from scout_hf.selection.partial import PartialKeys
from scout_hf.step import Step
from scout_hf.stores.state import State, count_in, state_in
from scout_hf.stores.token_cache import StreamedTokens, TokenCache

if TYPE_CHECKING:
    from typing_extensions import Self


@register_method
class InfiniGen(OffloadingMethod):
    """InfiniGen: recall single tokens in every step, chosen one layer ahead from partial queries and keys.

    A token is important if its approximate score is within ``alpha`` of the best score of its query head. All KV heads
    of a row recall the same number of tokens, each its own top-k: the mean number of important tokens over the row's
    query heads, limited to the budget minus the window. With GQA, tokens are ranked by the sum of their attention
    weights over the group (the paper has one query head per KV head).

    ``method_options``:

    * ``alpha`` (4.0): None always fills the budget.
    * ``ratio`` (0.2): share of the channels of partial keys; at least 16 channels.
    * ``keep`` (False, as published): True keeps recalled tokens on the device until others replace them. Only tokens
      that are not resident are then copied, but every layer needs device memory for the budget.

    Examples
    --------
    >>> from scout_hf import ScoutConfig
    >>> from scout_hf.methods import InfiniGen
    >>> InfiniGen.check(ScoutConfig(method="infinigen", method_options={"keep": True}))
    """

    name = "infinigen"
    options = {"alpha": 4.0, "ratio": 0.2, "keep": False}
    uses = OFFLOADING | {"budget", "window", "dense_layers", "layer_ahead", "link_gbps"}

    def __init__(self, config: ScoutConfig, layer_idx: int, keys: torch.Tensor):
        super().__init__(config, layer_idx, keys)
        self.partial = PartialKeys(self.settings["ratio"])
        self._guessed_from = 0  # tokens whose keys replaced queries, if no query was seen
        self._coming: InFlightCopy | None = None
        sizes = (self.batch, self.kv_heads, keys.shape[-1], self.dtype, keys.device)
        self.tokens = TokenCache(*sizes) if self.settings["keep"] else StreamedTokens()
        self._predicted: torch.Tensor | None = None

    @classmethod
    def check(cls, config: ScoutConfig) -> None:
        super().check(config)
        settings = cls.options | (config.method_options or {})
        for name, allowed, fits in (
            ("alpha", "a positive number, or None", lambda value: value is None or value > 0),
            ("ratio", "a share of the channels in (0, 1]", lambda value: 0 < value <= 1),
        ):
            value = settings[name]
            if isinstance(value, bool) or not isinstance(value, (int, float, type(None))) or not fits(value):
                raise ConfigError(f"{name}={value!r} is not allowed: {name} takes {allowed}; try {cls.options[name]}")
        if not isinstance(keep := settings["keep"], bool):
            raise ConfigError(f"keep={keep!r} is not allowed: keep takes True or False; try False, as published")

    @classmethod
    def is_exact(cls, config: ScoutConfig, device: torch.device) -> bool:
        return config.sparse_budget in (None, 1.0)

    @classmethod
    def over_heads(cls, config: ScoutConfig) -> str | None:
        if cls.is_exact(config, torch.device("cpu")) or (cls.options | (config.method_options or {}))["alpha"] is None:
            return None
        return (
            "with alpha, it takes as many tokens as all heads need on average; use method_options={'alpha': None}, "
            "or method='scout'"
        )

    # -- hooks --------------------------------------------------------------------------------------------------

    @property
    def wants_ahead(self) -> bool:
        return self.query_shape is not None and self.kv.host.blocks > 0 and self.config.layer_ahead

    def ahead(self, step: Step, query: torch.Tensor | None) -> None:
        if query is not None:
            self._predicted = query.to(self.dtype)
            self._recall(step, self._predicted)

    def observe(self, step: Step, query: torch.Tensor) -> None:
        if (not self.partial.known or self._guessed_from) and self._wants_partial():
            folded = fold_group(query, self.kv_heads)
            if step.mask is not None:
                new = step.padding(query.device)[:, None, -step.queries :, None]
                folded = fold_group(query * new, self.kv_heads)
            partial = PartialKeys(self.settings["ratio"])
            partial.learn(folded)
            self.partial, self._guessed_from = partial, 0

    def attend(self, step: Step, query: torch.Tensor) -> Partial:
        parts, tail = [self._attend_tail(step, query)], self.padding_mask(step, self.kv.host.length)
        attended: float | torch.Tensor = self.kv.length - self.kv.host.length
        if tail is not None:
            attended = tail.sum(dtype=torch.float32) / self.batch
        if self.kv.host.blocks:
            if not self.tokens.planned:
                self._recall(step, query)
            self._arrive(step)
            keys, values, valid = self.tokens.content()
            parts.append(attend(query, keys, values, *self.scoring, valid[:, :, None]))
            attended = attended + valid.sum(dtype=torch.float32) / (self.batch * self.kv_heads)
            self._give_back()
        step.counters.attended(self.layer_idx, step.context(), attended)
        if self._predicted is not None:
            step.counters.predicted(self.layer_idx, self._predicted, query)
            self._predicted = None
        return fuse(parts)

    def prefilled(self, step: Step, query: torch.Tensor) -> None:
        if self._wants_partial():
            self._catch_up()

    def end_step(self) -> None:
        self.drain()

    def flush(self) -> None:
        super().flush()
        if self._wants_partial():
            if self._guessed_from and self.kv.host.length >= 2 * self._guessed_from:
                self.partial = PartialKeys(self.settings["ratio"])
            known = self.partial.known
            self._catch_up()
            if self.partial.known and not known:
                self._guessed_from = self.partial.length

    # -- structure ----------------------------------------------------------------------------------------------

    def crop(self, length: int) -> None:
        super().crop(length)
        self._fit_to_host()

    def mark(self) -> Any:
        return super().mark(), self.partial, self._guessed_from

    def rollback(self, mark: Any) -> None:
        kv, self.partial, self._guessed_from = mark
        super().rollback(kv)
        self._fit_to_host()

    def _fit_to_host(self) -> None:
        self.partial.crop(self.kv.host.length)
        self.tokens.crop(self.kv.host.length)

    def select_rows(self, rows: torch.Tensor) -> None:
        super().select_rows(rows)
        self.partial.select_rows(rows)
        self.tokens.select_rows(rows)

    def fork(self) -> Self:
        twin = super().fork()
        twin.partial, twin.tokens = self.partial.fork(), self.tokens.fork()
        return twin

    def state_dict(self) -> State:
        held = {"partial": self.partial.state_dict(), "guessed_from": self._guessed_from}
        return super().state_dict() | held | {"tokens": self.tokens.state_dict()}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        held = self.kv.host.length
        self.partial.load_state_dict(state_in(state, "partial"), self.batch, self.kv_heads, held, self.kv.device)
        self._guessed_from = count_in(state, "guessed_from", self.kv.length)
        self.tokens.load_state_dict(state_in(state, "tokens"), held)

    def drain(self) -> None:
        super().drain()
        self._predicted = None
        if self._coming is not None:
            self._coming.drain()
            self._give_back()
        self.tokens.forget()

    def tier_bytes(self) -> dict[str, int]:
        held = super().tier_bytes() | {"digests": self.partial.used_bytes}
        held["device"] += self.tokens.used_bytes
        return held

    # -- the parts of a step ------------------------------------------------------------------------------------

    def _wants_partial(self) -> bool:
        return not self.config.is_dense(self.layer_idx)

    def _write_back(self, step: Step | None) -> None:
        full = self.kv.full_blocks(self.window_blocks) if self.partial.known else None
        if full is not None and self.partial.length == self.kv.host.length:
            self.partial.extend(full[0])
        super()._write_back(step)

    def _recall(self, step: Step, query: torch.Tensor) -> None:
        self.written.finish()
        missing = self.tokens.plan(*self.choose_tokens(step, query), self.kv.host.length)
        if missing is not None:
            ids, real = missing
            real = None if real is None else real.cpu()
            self._coming = tokens_to_device(step, self.kv.host, ids.cpu(), self.kv.device, self.config.link_gbps, real)

    def _give_back(self) -> None:
        coming, self._coming = self._coming, None
        if coming is not None:
            coming.give_back()

    def _arrive(self, step: Step) -> None:
        if self._coming is not None:
            with step.counters.timed(self.layer_idx, "join"):
                came = self._coming.wait()
            step.counters.recalled(self.layer_idx, 0, self._coming.nbytes)
            self.tokens.put(*came)

    def choose_tokens(self, step: Step, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The chosen tokens, best first, (batch, kv_heads, n) of int64, and which of these entries are valid."""
        held, shape = self.kv.host.length, (self.batch, self.kv_heads)
        padding_mask = self.padding_mask(step, 0, held)
        if not self._wants_partial():
            ids = torch.arange(held, dtype=torch.int64, device=self.kv.device).expand(*shape, -1)
            return ids, torch.ones_like(ids, dtype=torch.bool) if padding_mask is None else padding_mask[
                :, 0
            ].expand_as(ids)
        self._catch_up()
        scores = self.partial.scores(query) * self.scoring.scale
        if self.scoring.softcap is not None:
            scores = self.scoring.softcap * torch.tanh(scores / self.scoring.softcap)
        if padding_mask is not None:
            scores = scores.masked_fill(~padding_mask, -torch.inf)
        # A row of only padding has no weights.
        weights = scores.log_softmax(-1).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
        count = self._most(step, padding_mask)
        if (alpha := self.settings["alpha"]) is not None:
            near = (
                (weights - weights.amax(-1, keepdim=True) > -alpha)
                .sum(-1)
                .to(scores.dtype)
                .mean((1, 2))
                .ceil()
                .to(torch.int64)
            )
            count = torch.minimum(near, count)
        worth, most = weights.logsumexp(2), max(1, int(count.max()))
        best = worth.topk(min(most, held), dim=-1)
        order = torch.arange(best.indices.shape[-1], dtype=torch.int64, device=worth.device)
        return best.indices, (order < count[:, None, None]) & (best.values > -torch.inf)

    def _most(self, step: Step, padding_mask: torch.Tensor | None) -> torch.Tensor:
        """The budget minus the window, in tokens per row."""
        budget, device, window = self.config.sparse_budget, self.kv.device, self.window_blocks * self.config.block_size
        if isinstance(budget, float):
            context = torch.full((self.batch,), step.tokens, dtype=torch.int64, device=device)
            if padding_mask is not None:
                context = step.padding(device).sum(-1)
            total = (budget * context.float()).to(torch.int64)
        else:
            most = step.tokens if budget is None else budget
            total = torch.full((self.batch,), most, dtype=torch.int64, device=device)
        return (total - window).clamp(min=1)

    def _catch_up(self) -> None:
        """Compute the missing partial keys: of tokens from outside a forward pass, or from before the first query."""
        held = self.kv.host.length
        if self.partial.length < held:
            self.written.finish()
            keys = self.kv.read(self.partial.length, held)[0]
            if not self.partial.known:
                self.partial.learn(keys)
            self.partial.extend(keys)
