"""HGCA (arXiv 2507.03153): dense attention over a window on the device, sparse CPU attention over older tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from scout_hf.config import ScoutConfig
from scout_hf.errors import ConfigError, SessionError
from scout_hf.fusion import Partial, fuse
from scout_hf.kernels.cpu import Attended, Ticket
from scout_hf.kernels.weigh import attend_weighing, mean_weights
from scout_hf.methods.base import register_method
from scout_hf.methods.offloading import OFFLOADING, OffloadingMethod
from scout_hf.step import Step
from scout_hf.stores.retained_tokens import RetainedTokens
from scout_hf.stores.state import State, state_in, tensor_in

if TYPE_CHECKING:
    from typing_extensions import Self

WINDOW_TOKENS = 1024


@register_method
class HGCA(OffloadingMethod):
    """HGCA: window and CPU attention run in the same layer, with the real query.

    Each token in the window has a weight: an exponential moving average of its attention weights, with factor
    ``alpha`` for the new one; a pass of several tokens contributes its mean. When a block leaves the window, each KV
    head retains the tokens with a weight of at least ``threshold / n`` (``n`` tokens weighed), and in any case the
    ``least`` tokens of largest weight. The others are not attended again, unless a later pass of several tokens, which
    weighs all tokens on the host, retains them. With GQA a token's weight is the maximum over the query heads of its
    group. (The prototype has one query head per KV head, and groups of heads retain equally many tokens, which depends
    on the batch; here each head has its own list.)

    The window is ``resident`` tokens, by default half of the budget. The rest of the budget limits the retained tokens
    (the prototype has no limit; nor has ``budget=None``).

    ``method_options``: ``alpha`` (0.5), ``threshold`` (0.5; 0 retains everything, which is exact), ``least`` (10).

    Examples
    --------
    >>> from scout_hf import ScoutConfig
    >>> from scout_hf.methods import HGCA
    >>> HGCA.check(ScoutConfig(method="hgca", method_options={"alpha": 0.3}))
    """

    name = "hgca"
    options = {"alpha": 0.5, "threshold": 0.5, "least": 10}
    uses = OFFLOADING | {"budget", "resident", "dense_layers", "cpu_gbps"}

    def __init__(self, config: ScoutConfig, layer_idx: int, keys: torch.Tensor):
        super().__init__(config, layer_idx, keys)
        batch, heads, _, dim = keys.shape
        wide = torch.promote_types(keys.dtype, torch.float32)
        self.kept = RetainedTokens(batch, heads, dim, config.block_size, keys.dtype)
        # Weights of the tokens in the window, and of those on the host.
        self._weights = torch.zeros((batch, heads, 0), dtype=wide, device=keys.device)
        self._past = torch.zeros((batch, heads, 0), dtype=wide, device="cpu")
        self._ticket: Ticket[Attended] | None = None

    @classmethod
    def check(cls, config: ScoutConfig) -> None:
        super().check(config)
        settings = cls.options | (config.method_options or {})
        for name, allowed, most in (("alpha", "a share in [0, 1]", 1.0), ("threshold", "a number from 0 up", None)):
            value = settings[name]
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not value >= 0 or (most is not None and value > most):
                raise ConfigError(f"{name}={value!r} is not allowed: {name} takes {allowed}; try {cls.options[name]}")
        least = settings["least"]
        if isinstance(least, bool) or not isinstance(least, int) or least < 0:
            raise ConfigError(
                f"least={least!r} is not allowed: least takes a number of tokens, 0 or more; try {cls.options['least']}"
            )

    @classmethod
    def is_exact(cls, config: ScoutConfig, device: torch.device) -> bool:
        return config.sparse_budget in (None, 1.0) and (config.method_options or {}).get("threshold") == 0

    # -- hooks --------------------------------------------------------------------------------------------------

    def attend(self, step: Step, query: torch.Tensor) -> Partial:
        marks, held = self.kept.valid, self.kept.total / (self.batch * self.kv_heads)
        if held:
            if step.mask is not None:
                # A retained token may be padding in this step.
                padding = step.padding(torch.device("cpu")).repeat_interleave(self.kv_heads, dim=0)
                marks = marks & padding.gather(1, self.kept.tokens)
                held = int(marks.sum()) / (self.batch * self.kv_heads)
            # The layout of the retained tokens: each (row, KV head) is a row with one head.
            grouped = query.detach().cpu().reshape(self.batch * self.kv_heads, -1, 1, query.shape[3])
            ticket = step.backend.start(grouped, self.kept.kv, None, *self.scoring, marks)
            read = self.kept.total * 2 * query.shape[3] * self.dtype.itemsize
            self._ticket = step.links.limit_cpu(ticket, read, self.config.cpu_gbps)
        keys, values = self.kv.tail()
        padding_mask = self.padding_mask(step, self.kv.host.length)
        here, weights = attend_weighing(query, keys, values, *self.scoring, padding_mask)
        self._weigh(weights)
        parts, window = (
            [here],
            keys.shape[2] if padding_mask is None else padding_mask.sum(dtype=torch.float32) / self.batch,
        )
        if self._ticket is not None:
            with step.counters.timed(self.layer_idx, "join"):
                share = self._ticket.wait().partial
            self._ticket = None
            out, lse = share.out.to(query.device), share.lse.to(query.device)
            parts.append(Partial(out.reshape(query.shape), lse.reshape(query.shape[:3])))
        step.counters.attended(self.layer_idx, step.context(), window + held)
        step.counters.cpu_share(self.layer_idx, held, window + held)
        return fuse(parts)

    def observe(self, step: Step, query: torch.Tensor) -> None:
        """Compute the weights of all tokens from the queries of this pass, separately for window and host."""
        new = None if step.mask is None else step.padding(query.device)[:, -step.queries :]
        keys, held = self.kv.tail()[0], self.kv.host.length
        weighed = mean_weights(query, keys, *self.scoring, self.padding_mask(step, held), new, causal=True)
        self._weigh(weighed)
        if held:
            self._weigh_host(step, query.cpu(), None if new is None else new.cpu())

    # -- structure ----------------------------------------------------------------------------------------------

    def crop(self, length: int) -> None:
        before = self.kv.host.length
        super().crop(length)
        held = self.kv.host.length
        if held < before:
            self.kept.crop(held)
            self._weights = self._past[:, :, held:length].to(self._weights.device)
            self._past = self._past[:, :, :held]
        else:
            self._weights = self._weights[:, :, : length - held]

    def mark(self) -> Any:
        # All of these are replaced, not changed in place.
        return super().mark(), self.kept, self.kept.mark(), self._past, self._weights

    def rollback(self, mark: Any) -> None:
        kv, self.kept, kept, self._past, self._weights = mark
        super().rollback(kv)
        self.kept.rollback(kept)

    def select_rows(self, rows: torch.Tensor) -> None:
        super().select_rows(rows)
        self.kept.select_rows(rows)
        self._past, self._weights = self._past[rows.cpu()], self._weights[rows.to(self._weights.device)]

    def fork(self) -> Self:
        twin = super().fork()
        twin.kept, twin._ticket = self.kept.fork(), None
        return twin

    def state_dict(self) -> State:
        held = {"retained": self.kept.state_dict(), "past": self._past, "weights": self._weights}
        return super().state_dict() | held

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        held, lead, dtype = self.kv.host.length, (self.batch, self.kv_heads), self._weights.dtype
        past = tensor_in(state, "past", (*lead, held), dtype)
        weights = tensor_in(state, "weights", (*lead, None), dtype)
        if weights.shape[2] > self.kv.length - held:
            raise SessionError(f"there are weights of {weights.shape[2]} tokens in a window of {self.kv.length - held}")
        self.kept.load_state_dict(state_in(state, "retained"), held)
        self._past, self._weights = past.clone(), weights.to(self._weights.device, copy=True)
        self.window_blocks = self.config.blocks(self._window_tokens())

    def drain(self) -> None:
        super().drain()
        if self._ticket is not None:
            self._ticket.drain()
            self._ticket = None

    def tier_bytes(self) -> dict[str, int]:
        held = super().tier_bytes()
        held["host"] += self.kept.kv.used_bytes + self._past.nbytes
        held["device"] += self._weights.nbytes
        return held

    # -- the parts of a step ------------------------------------------------------------------------------------

    def _window_tokens(self) -> int:
        budget = self.config.sparse_budget
        if self.config.resident is not None or budget is None:
            return self.config.resident or WINDOW_TOKENS
        return int(budget * self.kv.length) // 2 if isinstance(budget, float) else budget // 2

    def _weigh(self, new: torch.Tensor) -> None:
        """Update the moving averages with the attention weights of the tail, (batch, kv_heads, tail)."""
        known, alpha = self._weights.shape[2], self.settings["alpha"]
        old, now = self._weights, new[:, :, :known]
        average = torch.where(old.isinf(), now, alpha * now + (1 - alpha) * old)
        self._weights = torch.cat([average, new[:, :, known:]], dim=2)

    def _weigh_host(self, step: Step, query: torch.Tensor, real: torch.Tensor | None) -> None:
        self.written.finish()
        host = self.kv.host
        keys, values = host.read(0, host.length)
        padding_mask = None if step.mask is None else step.padding(torch.device("cpu"))[:, None, None, : host.length]
        self._past = mean_weights(query, keys, *self.scoring, padding_mask, real)
        self.kept = RetainedTokens(self.batch, self.kv_heads, host.head_dim, host.block_size, self.dtype)
        self._keep(step, 0, keys, values, self._past, padding_mask, host.length)

    def _write_back(self, step: Step | None) -> None:
        missing = self.kv.length - self.kv.host.length - self._weights.shape[2]
        if missing:
            # Tokens appended outside a forward pass get infinite weight until a pass weighs them.
            self._weights = torch.nn.functional.pad(self._weights, (0, missing), value=torch.inf)
        self.window_blocks = self.config.blocks(self._window_tokens())
        full = self.kv.full_blocks(self.window_blocks)
        if full is None:
            return
        first, moved = self.kv.host.length, full[0].shape[2]
        weights = self._weights[:, :, :moved].cpu()
        weighed: int | torch.Tensor = self._weights.shape[2]
        padding_mask = None
        if step is not None and step.mask is not None:
            padding_mask = step.padding(torch.device("cpu"))[:, None, None, first : first + moved]
            weighed = step.padding(torch.device("cpu"))[:, first:].sum(-1).clamp(min=1).to(weights.dtype)[:, None, None]
        keys, values = full
        self._keep(step, first, keys.cpu(), values.cpu(), weights, padding_mask, weighed)
        self._past = torch.cat([self._past, weights], dim=2)
        self._weights = self._weights[:, :, moved:]
        super()._write_back(step)

    def _keep(
        self,
        step: Step | None,
        first: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        weights: torch.Tensor,
        padding_mask: torch.Tensor | None,
        weighed: int | torch.Tensor,
    ) -> None:
        """Retain the tokens of sufficient weight, from position ``first`` on; all tensors are on the CPU."""
        rank = weights.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        threshold = 0.0 if self.config.names_dense(self.layer_idx) else self.settings["threshold"]
        valid, most = (weights >= threshold / weighed) | (rank < self.settings["least"]), self._most(step)
        if padding_mask is not None and (threshold or most is not None):
            # If everything is retained, keep padding too: a later mask may differ.
            valid = valid & padding_mask[:, 0]
        tokens = torch.arange(first, first + weights.shape[2], dtype=torch.int64, device="cpu")
        self.kept.add(keys, values, tokens, weights, valid)
        if most is not None:
            self.kept.limit(most)

    def _most(self, step: Step | None) -> torch.Tensor | None:
        """The budget minus the window, in tokens per row; None for no limit."""
        budget, window = self.config.sparse_budget, self.config.blocks(self._window_tokens()) * self.config.block_size
        if budget is None or self.config.is_dense(self.layer_idx):
            return None
        tokens: float | torch.Tensor = budget
        if isinstance(budget, float):
            context = self.kv.length if step is None or step.mask is None else step.row_tokens().cpu().float()
            tokens = budget * context
        total = torch.as_tensor(tokens, dtype=torch.float32, device="cpu").expand(self.batch)
        return (total - window).clamp(min=1).to(torch.int64)
