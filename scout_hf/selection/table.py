"""The codes of all whole blocks of one layer, contiguous per row and KV head, so that scoring is one product."""

from __future__ import annotations

import torch

from scout_hf.stores.memory import allocate_slab

SLACK_BLOCKS = 32


class DigestTable:
    """A growing table of codes, (batch, kv_heads, blocks, code), with spare capacity.

    Examples
    --------
    >>> import torch
    >>> from scout_hf.selection import DigestTable
    >>> table = DigestTable()
    >>> table.append(torch.zeros(1, 2, 3, 16))
    >>> table.blocks, table.codes().shape
    (3, torch.Size([1, 2, 3, 16]))
    """

    def __init__(self) -> None:
        self._codes = torch.empty((0, 0, 0, 0), dtype=torch.float32, device="cpu")
        self.blocks = 0

    @property
    def used_bytes(self) -> int:
        """Bytes of the codes, spare capacity included."""
        return self._codes.numel() * self._codes.element_size()

    def codes(self, blocks: int | None = None) -> torch.Tensor:
        """Codes of the first ``blocks`` blocks (all by default), a view."""
        return self._codes[:, :, : self.blocks if blocks is None else blocks]

    @property
    def capacity(self) -> int:
        """Blocks that fit before the buffer is reallocated."""
        return self._codes.shape[2]

    def all_codes(self) -> torch.Tensor:
        """The whole buffer, (batch, kv_heads, capacity, code); undefined from ``blocks`` on."""
        return self._codes

    def append(self, codes: torch.Tensor, follow: int = 0) -> None:
        """Append the codes of further blocks, (batch, kv_heads, n, code); ``follow`` more will be appended next."""
        self.reserve(codes.shape, codes.dtype, codes.device, follow)[:, :, self.blocks :] = codes
        self.grew(codes.shape[2])

    def grew(self, blocks: int) -> None:
        """Count ``blocks`` further blocks, whose codes were written into the spare capacity."""
        self.blocks += blocks

    def reserve(self, shape: torch.Size, dtype: torch.dtype, device: torch.device, follow: int = 0) -> torch.Tensor:
        """Make capacity for codes of ``shape`` (batch, kv_heads, n, code); returns a view of all, the new ones last."""
        total = self.blocks + shape[2]
        if not self.capacity or total > self.capacity:
            most = total + follow
            capacity = most + max(SLACK_BLOCKS, most // 8)
            grown = allocate_slab((*shape[:2], capacity, shape[3]), dtype, device)
            if self.blocks:
                grown[:, :, : self.blocks] = self.codes()
            self._codes = grown
        return self.codes(total)

    def crop(self, blocks: int) -> None:
        """Keep the codes of the first ``blocks`` blocks."""
        self.blocks = min(self.blocks, blocks)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Replace row ``i`` by the former row ``rows[i]``, for every ``i``."""
        if self.capacity:
            self._codes = self._codes[rows.to(self._codes.device)]

    def fork(self) -> DigestTable:
        """An independent copy."""
        twin = DigestTable()
        twin.blocks = self.blocks
        twin._codes = self._codes.clone()
        return twin

    def load(self, codes: torch.Tensor, device: torch.device) -> None:
        """Take saved codes, (batch, kv_heads, blocks, code), into an empty table; their own memory is kept."""
        alone = codes.untyped_storage().nbytes() == codes.nbytes
        self._codes, self.blocks = codes.to(device, copy=not alone), codes.shape[2]
