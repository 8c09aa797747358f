"""``IndexedLayer``: a layer whose model chooses with an indexer what it attends to, as in MiniMax M3."""

from __future__ import annotations

from typing import Any

import torch

from scout_hf.cache_layer import ScoutLayer
from scout_hf.cache_reading import KV
from scout_hf.compat.indexed_layers import chooses_first, fill_indexer
from scout_hf.compat.modes import keeps_tensors
from scout_hf.config import ScoutConfig
from scout_hf.errors import CacheStateError, SavingError, SessionError
from scout_hf.methods import Method
from scout_hf.methods.own_choice import ChosenByModel
from scout_hf.step import active_step
from scout_hf.stores.state import State

TOKENS_PER_PAGE = 4
"""Where single tokens are chosen: the fewest that native code serves."""


class IndexedLayer(ScoutLayer):
    """Keys and values are kept in pages, the keys of the indexer in a tensor as transformers keeps them.

    Parameters
    ----------
    stock : type
        The layer of transformers in whose place this one stands.
    text_config : PreTrainedConfig
        Says how many tokens the model chooses at once: those are a page.
    *args
        As for ``ScoutLayer``.

    Attributes
    ----------
    index_keys : Tensor (batch, ..., tokens, channels) or None
        Replaced and never written to, so that forks and marks share it. None where another layer chooses.
    index_ahead : Tensor or None
        Outside of a pass: all keys of the indexer, the last of which are of tokens that ``update`` has not brought yet.
    indexer_position_ids : Tensor (axes, batch, tokens) or None
        As ``index_keys``, where the model keeps the positions of all tokens in a layer.
    """

    def __init__(self, stock: type, text_config: Any, *args: Any):
        super().__init__(*args)
        self.stock, self.text_config, self.chooses_first = stock, text_config, chooses_first(text_config)
        self.index_keys: torch.Tensor | None = None
        self.index_ahead: torch.Tensor | None = None
        self.indexer_position_ids: torch.Tensor | None = None

    def _new_method(self, like: torch.Tensor) -> Method:
        page = getattr(self.text_config, "index_block_size", None) or TOKENS_PER_PAGE
        return ChosenByModel(self.config, self.layer_idx, like, page)

    @keeps_tensors
    def update_indexer(self, keys: torch.Tensor) -> torch.Tensor:
        """Add keys of the indexer, (batch, ..., tokens, channels); returns those of all tokens.

        CacheStateError, with nothing changed, unless they are of the tokens that ``update`` adds too.
        """
        step = active_step()
        inside = step is not None and step.cache.guard is self.guard
        self.guard.check() if inside else self.guard.between_passes("update_indexer()")
        held, stored = self.index_keys, self.get_seq_length()
        past = 0 if held is None else held.shape[-2]
        self._check_shape(keys)
        tokens = past + keys.shape[-2]
        if inside and step is not None and tokens != step.tokens:
            raise self._refusal(keys, f"in a pass over {step.tokens} tokens")
        if not inside and (past if self.chooses_first else tokens) != stored:
            raise self._refusal(keys, f"where {stored} tokens have keys and values")
        found = keys if held is None else torch.cat([held, keys], dim=-2)
        if inside or not self.chooses_first:
            self.index_keys = found
        else:
            self.index_ahead = found
        return found

    update_index = update_indexer

    def _check_shape(self, keys: torch.Tensor) -> None:
        held, rows = self.index_keys, self.method and self.method.batch
        if not _is_of(keys, 3) or (rows is not None and len(keys) != rows):
            raise self._refusal(keys, f"for {rows} rows")
        if held is not None and (held.dim() != keys.dim() or held[..., :0, :].shape != keys[..., :0, :].shape):
            raise self._refusal(keys, f"beside {tuple(held.shape)}")

    def _refusal(self, keys: Any, where: str) -> CacheStateError:
        got = tuple(keys.shape) if isinstance(keys, torch.Tensor) else type(keys).__name__
        past = 0 if self.index_keys is None else self.index_keys.shape[-2]
        order = "before" if self.chooses_first else "behind"
        return CacheStateError(
            f"update_indexer() of layer {self.layer_idx} got {got} {where}, and the indexer holds {past} tokens. Give "
            "(batch, ..., tokens, channels), once for each token that update() adds too, as a forward pass does, "
            f"{order} update(). Nothing was changed; where update() was called alone, take those tokens back with "
            "cache.crop()"
        )

    def _update_outside(self, method: Method, keys: torch.Tensor, values: torch.Tensor) -> KV:
        given = super()._update_outside(method, keys, values)
        ahead, self.index_ahead = self.index_ahead, None
        if ahead is not None and (len(ahead), ahead.shape[-2]) == (method.batch, method.length):
            self.index_keys = ahead
        return given

    def mark(self) -> Any:
        return super().mark(), self.index_keys, self.indexer_position_ids

    def rollback(self, mark: Any) -> None:
        held, *beside = mark
        super().rollback(held)
        self.index_keys, self.indexer_position_ids = beside

    @keeps_tensors
    def crop(self, length: int | torch.Tensor) -> None:
        """As of ``ScoutLayer``, and the keys of the indexer."""
        super().crop(length)
        self.index_ahead = None
        if self.index_keys is not None:
            self.index_keys = self.index_keys[..., : self.get_seq_length(), :]
        if self.indexer_position_ids is not None:
            self.indexer_position_ids = self.indexer_position_ids[..., : self.get_seq_length()]

    def _select_rows(self, method: Method, rows: torch.Tensor) -> None:
        super()._select_rows(method, rows)
        self.index_ahead = None
        if self.index_keys is not None:
            self.index_keys = self.index_keys.index_select(0, rows.to(self.index_keys.device))
        if self.indexer_position_ids is not None:
            self.indexer_position_ids = self.indexer_position_ids.index_select(
                1, rows.to(self.indexer_position_ids.device)
            )

    def reset(self) -> None:
        """Remove all tokens."""
        super().reset()
        self.index_keys = self.index_ahead = self.indexer_position_ids = None

    def to_dynamic(self) -> Any:
        """A stock layer with copies of the same tokens."""
        twin, plain = self.stock(), super().to_dynamic()
        if plain.is_initialized:
            twin.update(plain.keys, plain.values)
        if self.index_keys is not None:
            fill_indexer(twin, self.index_keys.clone())
        if self.indexer_position_ids is not None:
            twin.indexer_position_ids = self.indexer_position_ids.clone()
        return twin

    def empty_twin(self, config: ScoutConfig) -> ScoutLayer:
        return IndexedLayer(self.stock, self.text_config, config, self.layer_idx)

    def state_dict(self) -> State | None:
        state, keys = super().state_dict(), self.index_keys
        if state and keys is not None and keys.shape[-2] != self.get_seq_length():
            raise SavingError(
                f"layer {self.layer_idx} holds {self.get_seq_length()} tokens and its indexer {keys.shape[-2]}: a pass "
                "of the unpatched model was interrupted; take back with cache.crop() what is not in all layers"
            )
        return state and state | {"index_keys": self.index_keys, "index_positions": self.indexer_position_ids}

    def load_states(self, state: State, device: torch.device) -> None:
        rows, tokens = self.method and self.method.batch, self.get_seq_length()
        keys, positions = state.get("index_keys"), state.get("index_positions")
        fits = keys is None or (_is_of(keys, 3) and (keys.shape[0], keys.shape[-2]) == (rows, tokens))
        if not fits or not (positions is None or (_is_of(positions, 3) and positions.shape[1:] == (rows, tokens))):
            raise SessionError(f"what the indexer of layer {self.layer_idx} holds is not of its tokens")
        self.index_keys = None if keys is None else keys.to(device)
        self.indexer_position_ids = None if positions is None else positions.to(device)


def _is_of(held: Any, axes: int) -> bool:
    return isinstance(held, torch.Tensor) and held.dim() >= axes
