"""An int8 KV store: half the bytes of bf16, with a small quantisation error. Blocks are packed when they are full."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from scout_hf.errors import UnsupportedModelError
from scout_hf.kernels.cpu.addresses import address
from scout_hf.kernels.cpu.library import StoreArgs
from scout_hf.stores.host import PagedKV
from scout_hf.stores.pages import PagePool
from scout_hf.stores.state import State, count_in, maybe_tensor_in, tensor_in

if TYPE_CHECKING:
    from typing_extensions import Self


class PackedKV(PagedKV):
    """Paged keys and values in int8: one scale per channel and block for keys, one per token for values.

    The partly filled last block stays unpacked in ``tail`` (batch, kv_heads, 2, block_size, head_dim). A packed tile
    holds keys as [head_dim / 2][block][2], values as [block / 4][head_dim][4], then bf16 scales of the keys' channels
    and of the values' tokens, padded to a multiple of 64 bytes: the layout that integer dot products read.

    Parameters
    ----------
    batch, heads, head_dim, block_size : int
        Rows, KV heads, channels per head (even), tokens per block.
    dtype : torch.dtype
    device : torch.device or str
        Of the tensors that are appended and read.

    Raises
    ------
    UnsupportedModelError
        If ``head_dim`` is odd.

    Examples
    --------
    >>> import torch
    >>> from scout_hf.stores import PackedKV
    >>> store = PackedKV(1, 2, 8, 16, torch.float32, "cpu")
    >>> keys = torch.randn(1, 2, 16, 8)
    >>> store.append(keys, keys)
    >>> bool((store.read(0, 16)[0] - keys).abs().max() < 0.05)
    True
    """

    packed = True

    def __init__(
        self, batch: int, heads: int, head_dim: int, block_size: int, dtype: torch.dtype, device: torch.device | str
    ):
        if head_dim % 2:
            raise UnsupportedModelError(
                f"host_dtype='int8' needs an even head_dim, and this model has head_dim={head_dim}; use host_dtype=None"
            )
        super().__init__(batch, heads, head_dim, block_size, dtype, device)
        self.tail = torch.empty((batch, heads, 2, block_size, head_dim), dtype=dtype, device=device)
        # The length before the last append that filled a block, and the tail at that time.
        self._kept: tuple[int, torch.Tensor | None] = (0, None)

    def _new_pool(self) -> PagePool:
        return PagePool((self.heads, tile_bytes(self.block_size, self.head_dim)), torch.uint8, self.device)

    @property
    def used_bytes(self) -> int:
        """Bytes of the pages in use and of the block being filled."""
        return super().used_bytes + self.tail.numel() * self.tail.element_size()

    def memory(self) -> tuple[torch.Tensor, ...]:
        return (*super().memory(), self.tail)

    def native(self) -> StoreArgs | None:
        args = super().native()
        if args is not None:
            args.tail = address(self.tail, self.dtype)
        return args

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if self.length % self.block_size + keys.shape[2] < self.block_size:
            super().append(keys, values)
            return
        # The block fills up and the tail is reused: keep the old tail for an append that fails or is rolled back.
        before, kept = self.length, self.tail
        self._kept = (before, kept)
        try:
            self.tail = kept.clone()
            super().append(keys, values)
        except BaseException:
            if self.length == before:
                self.tail = kept
            raise

    def _reserve(self, tokens: int) -> None:
        self.table.truncate(self.length // self.block_size)
        if (fresh := (self.length + tokens) // self.block_size - self.table.blocks) > 0:
            self.table.extend(fresh)

    def gather(self, blocks: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        if self.library is not None:
            return super().gather(blocks, keys, values)
        self.touch(blocks)
        batch, heads, count = blocks.shape
        whole = self.length // self.block_size
        if whole:
            # Unpacks whole tiles; this path (no native library) need not be fast.
            pages = self.table.ids.gather(1, blocks.clamp(max=whole - 1).reshape(batch, -1)).reshape(-1)
            which = torch.arange(heads, dtype=torch.int64, device="cpu").view(1, heads, 1)
            which = which.expand(batch, heads, count).reshape(-1)
            pool = self.table.pool
            for slab, start in zip(pool.slabs, pool.starts):
                here = ((pages >= start) & (pages < start + len(slab))).nonzero().squeeze(1)
                if not len(here):
                    continue
                got = unpack(slab[pages[here] - start, which[here]], self.block_size, self.head_dim, self.dtype)
                keys.view(-1, self.block_size, self.head_dim)[here] = got[0]
                values.view(-1, self.block_size, self.head_dim)[here] = got[1]
        for row, head, place in (blocks >= whole).nonzero().tolist():
            keys[row, head, place], values[row, head, place] = self.tail[row, head]

    def crop(self, length: int) -> None:
        if length >= self.length:
            return
        block, rest = divmod(length, self.block_size)
        kept_at, kept = self._kept
        tail = self.tail
        if rest and kept is not None and kept_at // self.block_size == block and length <= kept_at:
            tail = kept.clone()
        elif rest and block < self.length // self.block_size:
            ids = torch.full((self.batch, self.heads, 1), block, dtype=torch.int64, device="cpu")
            keys, values = (tail.new_empty((*ids.shape, self.block_size, self.head_dim)) for _ in range(2))
            self.gather(ids, keys, values)
            tail = torch.stack([keys.squeeze(2), values.squeeze(2)], dim=2)
        self.tail, self._kept, self.length = tail, (0, None), length
        self.table.truncate(block)

    def select_rows(self, rows: torch.Tensor) -> None:
        tail = self.tail[rows.to(self.tail.device)]
        super().select_rows(rows)
        self.tail, self._kept = tail, (0, None)

    def fork(self) -> Self:
        tail = self.tail.clone()
        twin = super().fork()
        twin.tail = tail
        return twin

    def state_dict(self) -> State:
        before, kept = self._kept
        return super().state_dict() | {"tail": self.tail, "kept": before, "kept_tail": kept}

    def load_state_dict(self, state: State) -> None:
        shape, dtype = tuple(self.tail.shape), self.tail.dtype
        tail, kept = tensor_in(state, "tail", shape, dtype), maybe_tensor_in(state, "kept_tail", shape, dtype)
        before = count_in(state, "kept", count_in(state, "length"))
        super().load_state_dict(state)
        self.tail = tail.to(self.device, copy=True)
        self._kept = before, None if kept is None else kept.to(self.device, copy=True)

    def _whole_blocks(self, length: int) -> int:
        return length // self.block_size

    def _write(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        at, tokens = 0, keys.shape[2]
        while at < tokens:
            block, offset = divmod(self.length + at, self.block_size)
            count = min(tokens - at, self.block_size - offset)
            self.tail[:, :, 0, offset : offset + count] = keys[:, :, at : at + count]
            self.tail[:, :, 1, offset : offset + count] = values[:, :, at : at + count]
            at += count
            if offset + count == self.block_size:
                self.table.pool.write(self.table.ids[:, block], pack(self.tail[:, :, 0], self.tail[:, :, 1]))


def make_store(
    batch: int,
    heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    host_dtype: str | None = None,
    pinned: bool = False,
) -> PagedKV:
    """Create a paged KV store.

    Parameters
    ----------
    batch, heads, head_dim, block_size : int
        Rows, KV heads, channels per head, tokens per block.
    dtype : torch.dtype
    device : torch.device or str
    host_dtype : "int8" or None
        ``"int8"`` for a :class:`PackedKV`, None for a :class:`PagedKV` in ``dtype``.
    pinned : bool
        Pin the pages, so that a GPU can access them directly. Ignored for int8, which the GPU kernels cannot unpack.

    Returns
    -------
    PagedKV

    Raises
    ------
    UnsupportedModelError
        For int8 with an odd ``head_dim``.

    Examples
    --------
    >>> import torch
    >>> from scout_hf.stores import make_store
    >>> type(make_store(1, 2, 8, 4, torch.bfloat16, "cpu", host_dtype="int8")).__name__
    'PackedKV'
    """
    sizes = (batch, heads, head_dim, block_size, dtype, device)
    return PackedKV(*sizes) if host_dtype == "int8" else PagedKV(*sizes, pinned=pinned)


def tile_bytes(block_size: int, head_dim: int) -> int:
    """Bytes of one KV head's packed block."""
    return -(-(2 * block_size * head_dim + 2 * (block_size + head_dim)) // 64) * 64


def pack(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Tiles (..., tile_bytes) of uint8 from whole blocks (..., block_size, head_dim)."""
    size, dim = keys.shape[-2:]
    key_scales, value_scales = _scales(keys, -2), _scales(values, -1)
    small_keys, small_values = _quantise(keys, key_scales), _quantise(values, value_scales)
    lead = keys.shape[:-2]
    parts = [
        small_keys.view(*lead, size, dim // 2, 2).transpose(-3, -2).reshape(*lead, -1).view(torch.uint8),
        small_values.view(*lead, size // 4, 4, dim).transpose(-2, -1).reshape(*lead, -1).view(torch.uint8),
        key_scales.reshape(*lead, dim).view(torch.uint8),
        value_scales.reshape(*lead, size).view(torch.uint8),
    ]
    tile = torch.zeros((*lead, tile_bytes(size, dim)), dtype=torch.uint8, device=keys.device)
    tile[..., : 2 * size * dim + 2 * (size + dim)] = torch.cat(parts, dim=-1)
    return tile


def unpack(
    tiles: torch.Tensor, block_size: int, head_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (n, block_size, head_dim) of packed tiles (n, tile_bytes)."""
    count, half = len(tiles), block_size * head_dim
    numbers = tiles[:, : 2 * half].view(torch.int8).float()
    scales = tiles[:, 2 * half : 2 * half + 2 * (block_size + head_dim)].contiguous().view(torch.bfloat16).float()
    keys = numbers[:, :half].view(count, head_dim // 2, block_size, 2).transpose(1, 2).reshape(count, block_size, -1)
    values = numbers[:, half:].view(count, block_size // 4, head_dim, 4).transpose(2, 3).reshape(count, block_size, -1)
    return (keys * scales[:, None, :head_dim]).to(dtype), (values * scales[:, head_dim:, None]).to(dtype)


def _scales(numbers: torch.Tensor, along: int) -> torch.Tensor:
    """The smallest bf16 scales for which the quantised numbers fit into -127 to 127."""
    exact = numbers.float().abs().amax(dim=along, keepdim=True) / 127
    nearest = exact.to(torch.bfloat16)
    above = torch.nextafter(nearest, torch.full_like(nearest, torch.inf))
    return torch.where(nearest.float() < exact, above, nearest)


def _quantise(numbers: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    inverse = torch.where(scales > 0, 1 / scales.float(), 0.0)
    scaled = numbers.float() * inverse
    # Halves round away from zero, as in the native code.
    return (scaled + torch.full_like(scaled, 0.5).copysign(scaled)).trunc().to(torch.int8)
