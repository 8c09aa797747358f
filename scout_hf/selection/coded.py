"""Codes together with the digest that made them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from scout_hf.errors import SessionError
from scout_hf.selection.digest import Digest, make_digest
from scout_hf.selection.table import DigestTable
from scout_hf.stores.state import State, maybe_tensor_in, state_in, tensor_in

# A digest is fitted to the first keys, and again each time a short context has grown GROWN-fold.
ENOUGH_TOKENS, GROWN = 4096, 8


class Coded(NamedTuple):
    """Codes and the digest that made them; one object, because codes are void with another digest.

    digest, table : Digest, DigestTable
    fitted_blocks : int
        Blocks that the digest was fitted to.
    fitted_blindly : bool
        Whether it was fitted before any query was seen.
    """

    digest: Digest
    table: DigestTable
    fitted_blocks: int = 0
    fitted_blindly: bool = False

    def fit_is_due(self, new: int, block_size: int) -> bool:
        """Whether the digest must be fitted before ``new`` blocks more are encoded."""
        blocks, fitted = self.table.blocks, self.fitted_blocks
        if not self.digest.needs_fit or not blocks:
            return self.digest.needs_fit
        return fitted * block_size < ENOUGH_TOKENS and blocks + new >= GROWN * fitted

    def loaded(
        self, state: State, like: torch.Tensor, block_size: int, batch: int, blocks: int, device: torch.device
    ) -> Coded:
        """Codes and constants of the same digest as ``Selector.state_dict`` gave them.

        Parameters
        ----------
        state : dict
        like : Tensor (any, kv_heads, 0, head_dim)
            Keys, for sizes and dtype.
        block_size, batch : int
        blocks : int
            Most blocks that may have codes.
        device : torch.device

        Raises
        ------
        SessionError
            If they do not fit.
        """
        digest, table, (heads, dim) = make_digest(self.digest.name), DigestTable(), like.shape[1::2]
        digest.load_state_dict(state_in(state, "constants"), batch, device)
        codes = maybe_tensor_in(state, "codes", (batch, heads, None, None))
        if codes is not None:  # a digest that was never fitted has none, and could encode nothing
            one = digest.encode(like.new_zeros((batch, heads, 1, block_size, dim)), None)
            # Native code reads as many bytes as it expects.
            codes = tensor_in(state, "codes", (batch, heads, None, one.shape[3]), one.dtype)
            if codes.shape[2] > blocks:
                raise SessionError(f"there are codes of {codes.shape[2]} blocks, and {blocks} blocks")
            table.load(codes, device)
        return Coded(digest, table)
