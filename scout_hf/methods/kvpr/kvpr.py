"""KVPR (arXiv 2411.17089): exact offloading that recomputes a part of KV while the rest is copied."""

from __future__ import annotations

import time
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import torch

from scout_hf.config import ScoutConfig
from scout_hf.errors import ConfigError, ScoutError
from scout_hf.fusion import Partial, fuse
from scout_hf.kernels.attend import attend
from scout_hf.methods.base import register_method
from scout_hf.methods.dense import Dense
from scout_hf.methods.host_to_device import InFlightCopy, blocks_to_device
from scout_hf.methods.kvpr.inputs import LayerInputs
from scout_hf.split import Rates, best_split
from scout_hf.step import Step
from scout_hf.stores.state import State, number_in, state_in

if TYPE_CHECKING:
    from typing_extensions import Self

TRIAL_TOKENS = 256
# Tolerated rounding error of recomputed keys, relative to the largest.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@register_method
class KVPR(Dense):
    """KVPR: for the first ``l`` tokens, copy the layer's inputs instead of KV and recompute keys and values.

    Without GQA, inputs are half as large as KV. They are copied first; the device recomputes while the KV of the other
    tokens is in flight. ``l`` is chosen per layer and step so that both take the same time. The rates of link and layer
    are measured after the prompt, and on a CPU in every step.

    If inputs are no smaller than KV (two or more query heads per KV head), nothing can be gained: ``l`` is 0, no inputs
    are stored, the method works as ``dense``, and ``stats().notes`` says so. The same holds if recomputed keys differ
    from the stored ones (dynamic rotary embeddings, tokens from outside a forward pass).

    ``method_options``:

    * ``inputs`` ("host"): "device" keeps the inputs in device memory, without a copy per step.
    * ``share`` (None): a float in [0, 1] fixes ``l`` to that share of the tokens on the host.
    * ``heads``: as for ``dense``.

    Examples
    --------
    >>> from scout_hf import ScoutConfig
    >>> from scout_hf.methods import KVPR
    >>> KVPR.check(ScoutConfig(method="kvpr", method_options={"share": 0.25}))
    """

    name = "kvpr"
    blockwise = False  # it keeps inputs of tokens too
    options = {"inputs": "host", "share": None, **Dense.options}
    takes_inputs = True
    can_lend = False

    def __init__(self, config: ScoutConfig, layer_idx: int, keys: torch.Tensor):
        super().__init__(config, layer_idx, keys)
        self.inputs: LayerInputs | None = None
        self._against: str | None = None  # why no inputs are stored
        self._rates: Rates | None = None
        self._split = 0
        self._apart = 0.0  # seconds of this attention that were waited or recomputed
        self._inputs_coming: InFlightCopy | None = None

    @classmethod
    def check(cls, config: ScoutConfig) -> None:
        super().check(config)
        settings = cls.options | (config.method_options or {})
        if settings["inputs"] not in ("host", "device"):
            raise ConfigError(f"inputs={settings['inputs']!r} is not allowed: take 'host' or 'device'; try 'host'")
        share = settings["share"]
        if share is not None and not (isinstance(share, float) and 0.0 <= share <= 1.0):
            raise ConfigError(f"share={share!r} is not allowed: take None or a float in [0, 1]; try None")

    # -- hooks --------------------------------------------------------------------------------------------------

    def append(self, keys: torch.Tensor, values: torch.Tensor, step: Step | None = None) -> None:
        before = self.kv.length
        super().append(keys, values, step)
        entered = None if step is None or step.inputs is None else step.inputs.pop(self.layer_idx, None)
        if entered is not None:
            self.remember(*entered, before)

    def remember(self, hidden: torch.Tensor, position_ids: torch.Tensor | None, first: int | None = None) -> None:
        """Store the inputs of tokens; for code that fills a cache outside a forward pass.

        Parameters
        ----------
        hidden : Tensor (batch, tokens, hidden_size)
        position_ids : Tensor (1 or batch, tokens), or None
        first : int or None
            Position of the first token; None for the newest tokens.
        """
        first = self.kv.length - hidden.shape[1] if first is None else first
        # The inputs of a layer may come from another device.
        hidden = hidden.to(self.kv.device)
        if self.inputs is None:
            self._against = self._against or self._cannot_pay(hidden)
            if self._against is not None:
                return
            self.inputs = LayerInputs(hidden, self.config.block_size, self.settings["inputs"] == "host")
        self.inputs.append(hidden, position_ids, first)
        self.inputs.write_back(self.kv.host.length)

    def prefilled(self, step: Step, query: torch.Tensor) -> None:
        inputs = self.inputs
        if self._rates is None and inputs is not None and inputs.blocks and self.kv.host.blocks:
            self._rates = self._measure(step, inputs)
            if self._rates is None:
                self.inputs = None
        if self._against is not None:
            step.counters.note("kvpr", self._against, self.layer_idx)

    # -- structure ----------------------------------------------------------------------------------------------

    def crop(self, length: int) -> None:
        super().crop(length)
        if self.inputs is not None:
            self.inputs.crop(length)

    def mark(self) -> Any:
        return super().mark(), self.inputs, self.inputs and self.inputs.mark()

    def rollback(self, mark: Any) -> None:
        kv, self.inputs, inputs = mark
        super().rollback(kv)
        if self.inputs is not None:
            self.inputs.rollback(inputs)

    def select_rows(self, rows: torch.Tensor) -> None:
        super().select_rows(rows)
        if self.inputs is not None:
            self.inputs.select_rows(rows)

    def fork(self) -> Self:
        twin = super().fork()
        twin.inputs, twin._inputs_coming = self.inputs and self.inputs.fork(), None
        return twin

    def drain(self) -> None:
        self._split = 0  # first: after an error below, the inputs may be gone
        super().drain()
        coming = self._inputs_coming
        if coming is not None:
            coming.drain()
            self._inputs_coming = None
            coming.give_back()

    def state_dict(self) -> State:
        inputs = self.inputs
        return super().state_dict() | {
            "inputs": inputs and inputs.state_dict(),
            "against": self._against,
            "rates": self._rates and asdict(self._rates),
        }

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        against = state.get("against")
        self._against = None if against is None else str(against)
        if state.get("rates") is not None:
            rates = state_in(state, "rates")
            self._rates = Rates(*(number_in(rates, field.name) for field in fields(Rates)))
        if state.get("inputs") is not None:
            held = state_in(state, "inputs")
            self.inputs = LayerInputs.of_state(
                held, self.batch, self.config.block_size, self.settings["inputs"] == "host", self.kv.device
            )

    def tier_bytes(self) -> dict[str, int]:
        held, inputs = super().tier_bytes(), self.inputs
        for tier, nbytes in (inputs.tier_bytes() if inputs else {}).items():
            held[tier] += nbytes
        return held

    # -- the parts of a step ------------------------------------------------------------------------------------

    def _start(self, step: Step) -> None:
        self.drain()
        self._split = self._best_split(step)
        self._bring_inputs(step)
        if self._split < self.kv.host.blocks:
            self.stream.start(self._pieces(self._split), self._bringer(step))

    def _attend_all(self, step: Step, query: torch.Tensor) -> Partial:
        self._apart = 0.0
        result = super()._attend_all(step, query)
        if self.kv.device.type == "cpu" and self._rates is not None:
            end = time.perf_counter()
            # The time between two attentions is the rest of a layer.
            before = step.shared.get(self.name)
            if before is not None:
                self._rates.did_besides(end - before - self._apart)
            step.shared[self.name] = end
        return result

    def _first_block(self, step: Step) -> int:
        return self._split

    def _write_back(self, step: Step | None) -> None:
        super()._write_back(step)
        if self.inputs is not None:
            self.inputs.write_back(self.kv.host.length, None if step is None else step.links)

    def _attend_host(self, step: Step, query: torch.Tensor, first: int) -> Partial:
        parts, inputs = [], self.inputs
        if first and inputs is not None:
            parts.append(self._attend_recomputed(step, query, inputs, first * self.config.block_size))
        if first < self.kv.host.blocks:
            parts.append(super()._attend_host(step, query, first))
        return fuse(parts)

    def _attend_recomputed(self, step: Step, query: torch.Tensor, inputs: LayerInputs, tokens: int) -> Partial:
        """Attention over the first ``tokens``, whose KV is recomputed while other KV is in flight."""
        coming = self._inputs_coming
        hidden = inputs.read(tokens) if coming is None else inputs.joined(self._wait(step, coming))
        begin = time.perf_counter()
        keys, values = self._recompute(step, inputs, hidden, tokens)
        seconds = time.perf_counter() - begin
        self._apart += seconds
        rates = self._rates
        if rates is not None and self.kv.device.type == "cpu":
            rates.computed(tokens, seconds)
        result = attend(
            query, keys.to(self.dtype), values.to(self.dtype), *self.scoring, self.padding_mask(step, 0, tokens)
        )
        if coming is not None:
            step.counters.recalled(self.layer_idx, 0, coming.nbytes)
            self._inputs_coming = None
            coming.give_back()
        if rates is not None:
            step.counters.add("recomputed", self.layer_idx, tokens)
        return result

    def _recompute(
        self, step: Step, inputs: LayerInputs, hidden: torch.Tensor, tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values recomputed from ``hidden``; if that fails, the stored ones, and none is recomputed later."""
        reason = "the weights of the layer are not loaded"
        try:
            made = step.keys_values(self.layer_idx, hidden, inputs.positions(tokens))
        except ScoutError as error:
            made, reason = None, str(error)
        if made is None:
            self.written.finish()
            made = self.kv.read(0, tokens)
            self._rates = None
            step.counters.note("kvpr", f"nothing is recomputed: {reason}", self.layer_idx)
        return made

    def _wait(self, step: Step, coming: InFlightCopy) -> tuple[torch.Tensor, torch.Tensor]:
        begin = time.perf_counter()
        found = super()._wait(step, coming)
        self._apart += time.perf_counter() - begin
        return found

    def _bring_inputs(self, step: Step) -> None:
        inputs = self.inputs
        if self._split and inputs is not None and (host := inputs.host) is not None:
            inputs.written.finish()
            device, link = self.kv.device, self.config.link_gbps
            self._inputs_coming = blocks_to_device(step, host, 0, self._split, slice(0, 1), device, link)

    # -- how much to compute ------------------------------------------------------------------------------------

    def _best_split(self, step: Step) -> int:
        """Blocks to recompute."""
        if self.inputs is None or self._rates is None:
            return 0
        known = min(self.inputs.blocks, self.kv.host.blocks)
        if (share := self.settings["share"]) is not None:
            return min(known, round(share * self.kv.host.blocks))
        split = best_split(self._rates, self.kv.host.length, known * self.config.block_size)
        return split // self.config.block_size

    def _sizes(self, hidden_size: int, dtype: torch.dtype) -> tuple[int, int]:
        """Bytes per token and row to copy: as inputs, and as keys and values."""
        inputs = hidden_size * dtype.itemsize if self.settings["inputs"] == "host" else 0
        return inputs, 2 * self.kv_heads * self.kv.host.head_dim * self.dtype.itemsize

    def _cannot_pay(self, hidden: torch.Tensor) -> str | None:
        inputs, kv = self._sizes(hidden.shape[2], hidden.dtype)
        if inputs < kv or self.settings["share"] is not None:
            return None
        return (
            f"nothing is recomputed: the inputs of a token ({inputs} bytes) are no smaller than its keys and values "
            f"({kv} bytes), as in every model with two or more query heads per KV head"
        )

    def _measure(self, step: Step, inputs: LayerInputs) -> Rates | None:
        """Time per token of link and layer; None if recomputed keys and values differ from the stored ones."""
        # Inputs that stay on the device may cover more tokens than the host.
        known = min(inputs.blocks, self.kv.host.blocks) * self.config.block_size
        tokens = min(TRIAL_TOKENS // self.config.block_size * self.config.block_size, known)
        self.written.finish()
        hidden, stored = inputs.read(tokens), self.kv.read(0, tokens)
        reason = None
        try:
            made = step.keys_values(self.layer_idx, hidden, inputs.positions(tokens))
            if made is None:
                reason = "this model family cannot recompute keys from inputs, or the layer's weights are not loaded"
            elif not all(self._same(step, a, b, tokens) for a, b in zip(made, stored)):
                reason = "recomputed keys and values differ from the stored ones"
        except ScoutError as error:
            reason = str(error)
        if reason is not None:
            self._against = f"nothing is recomputed: {reason}"
            return None
        seconds = []
        for _ in range(2):
            self._synchronise()
            begin = time.perf_counter()
            step.keys_values(self.layer_idx, hidden, inputs.positions(tokens))
            self._synchronise()
            seconds.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        blocks, host = tokens // self.config.block_size, self.kv.host
        coming = blocks_to_device(step, host, 0, blocks, slice(0, host.heads), self.kv.device, self.config.link_gbps)
        coming.wait()
        self._synchronise()
        per_byte = (time.perf_counter() - begin) / coming.nbytes
        coming.give_back()
        of_inputs, kv = (size * self.batch for size in self._sizes(inputs.hidden_size, inputs.dtype))
        return Rates(input_s=of_inputs * per_byte, kv_s=kv * per_byte, compute_s=min(seconds) / tokens)

    def _same(self, step: Step, made: torch.Tensor, stored: torch.Tensor, tokens: int) -> bool:
        made = made.to(stored.dtype)
        if made.shape != stored.shape:
            return False
        error, padding_mask = (made - stored).abs(), self.padding_mask(step, 0, tokens)
        if padding_mask is not None:
            error = error * padding_mask[:, :, 0, :, None]
        return bool(error.max() <= TOLERANCE[stored.dtype] * stored.abs().max())

    def _synchronise(self) -> None:
        if self.kv.device.type == "cuda":
            torch.cuda.synchronize(self.kv.device)
