"""Paged keys and values of one layer: the host tier, and the only tier without a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from scout_hf.errors import CacheStateError
from scout_hf.kernels.cpu import pages
from scout_hf.kernels.cpu.addresses import address
from scout_hf.kernels.cpu.library import StoreArgs
from scout_hf.stores.counted import counts
from scout_hf.stores.page_table import PageTable
from scout_hf.stores.pages import PagePool
from scout_hf.stores.state import State, count_in, pages_in
from scout_hf.stores.streams import Links, Mark

if TYPE_CHECKING:
    from typing_extensions import Self

# Device memory for pages in an in-flight write-back.
STAGED_BYTES = 64 << 20


class PagedKV:
    """Paged keys and values of a batch; all rows have the same length.

    A page holds one block of one row: ``(kv_heads, 2, block_size, head_dim)``, keys then values, so that one KV head's
    block is one contiguous tile.

    Parameters
    ----------
    batch, heads, head_dim, block_size : int
        Rows, KV heads (not query heads), channels per head, tokens per block.
    dtype : torch.dtype
    device : torch.device or str
        Of the pages, and of the tensors that are appended and read.
    pinned : bool
        Pin the pages, so that a GPU can read and write them directly.

    Examples
    --------
    >>> import torch
    >>> from scout_hf.stores import PagedKV
    >>> store = PagedKV(batch=1, heads=2, head_dim=8, block_size=4, dtype=torch.float32, device="cpu")
    >>> keys, values = torch.randn(2, 1, 2, 6, 8)
    >>> store.append(keys, values)
    >>> store.length, store.blocks
    (6, 2)
    >>> bool((store.read(2, 6)[0] == keys[:, :, 2:6]).all())
    True
    """

    packed = False

    def __init__(
        self,
        batch: int,
        heads: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        pinned: bool = False,
    ):
        self.heads, self.head_dim, self.block_size = heads, head_dim, block_size
        self.dtype, self.device, self.pinned = dtype, torch.device(device), pinned
        self.table = PageTable(self._new_pool(), batch)
        self.length = 0
        self.library = pages.library_for(dtype, head_dim, block_size, self.device)
        self._args: StoreArgs | None = None
        self._described: torch.Tensor | None = None

    def _new_pool(self) -> PagePool:
        return PagePool((self.heads, 2, self.block_size, self.head_dim), self.dtype, self.device, self.pinned)

    @property
    def batch(self) -> int:
        """Rows."""
        return self.table.batch

    @property
    def blocks(self) -> int:
        """Blocks per row, the partly filled last one included."""
        return -(-self.length // self.block_size)

    @property
    def used_bytes(self) -> int:
        """Bytes of the pool's used pages, forks included; 0 after the first call within ``each_pool_once``."""
        pool = self.table.pool
        return pool.used_pages * pool.page_bytes if counts(pool) else 0

    def memory(self) -> tuple[torch.Tensor, ...]:
        """The tensors whose memory ``native()`` points to."""
        return (self.table.places, *self.table.pool.slabs)

    def native(self) -> StoreArgs | None:
        """The store as a struct of the native library, valid until the next change; None if it cannot be served."""
        if self.library is None:
            return None
        if self._args is None:
            self._args = pages.store_args(self.heads, self.head_dim, self.block_size, self.dtype, self.packed)
        places = self.table.places
        if places is not self._described:
            self._args.pages = address(places[1], torch.int64)
            self._args.batch, self._args.pages_stride = places.shape[1:]
            self._described = places
        self._args.length = self.length
        return self._args

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Append new tokens to every row.

        Parameters
        ----------
        keys, values : Tensor (batch, kv_heads, tokens, head_dim)
            Converted to the store's dtype and device if needed.

        Raises
        ------
        CacheStateError
            If a shape does not fit.
        """
        tokens = keys.shape[2]
        expected = (self.batch, self.heads, tokens, self.head_dim)
        if keys.shape != expected or values.shape != expected:
            raise CacheStateError(
                f"got keys {tuple(keys.shape)} and values {tuple(values.shape)}; this store takes {self.batch} rows "
                f"of {self.heads} KV heads with {self.head_dim} channels, as many values as keys. Pass both as "
                "(batch, kv_heads, tokens, head_dim), before heads are repeated for GQA"
            )
        if keys.dtype != self.dtype or values.dtype != self.dtype or not keys.device == values.device == self.device:
            keys, values = (part.to(self.device, self.dtype) for part in (keys, values))
        self._reserve(tokens)
        if self.table.pool.watched:
            first, last = self.length // self.block_size, self.table.blocks
            self.table.pool.touch(self.table.ids[:, first:last].reshape(-1), read=False)
        library, native = self.library, self.native()
        if library is not None and native is not None:
            pages.append(library, native, keys, values)
        else:
            self._write(keys, values)
        self.length += tokens

    def append_beside(self, keys: torch.Tensor, values: torch.Tensor, links: Links) -> Mark:
        """Append whole blocks from a device asynchronously, on the write-back stream.

        Parameters
        ----------
        keys, values : Tensor (batch, kv_heads, n * block_size, head_dim)
            On the device; may be overwritten once this returns. The store must end with a whole block.
        links : Links
            Provides the stream.

        Returns
        -------
        Mark
            The end of the copies; nothing may read these blocks on the host before it.
        """
        first, tokens = self.blocks, keys.shape[2]
        self._reserve(tokens)
        step = max(1, STAGED_BYTES // (self.batch * self.table.pool.page_bytes))
        done = Mark()
        for start in range(0, tokens // self.block_size, step):
            part = slice(start * self.block_size, (start + step) * self.block_size)
            blocks = [given[:, :, part].unflatten(2, (-1, self.block_size)) for given in (keys, values)]
            # In page layout: (batch, n, kv_heads, 2, block_size, head_dim).
            staged = torch.stack(blocks, dim=3).transpose(1, 2).contiguous()
            pages = self.table.ids[:, first + start : first + start + staged.shape[1]]
            with links.beside("write-back", keys.device, staged) as copied:
                for row, row_pages in zip(staged, pages):
                    at = 0
                    for run in self.table.pool.runs(row_pages):
                        run.copy_(row[at : at + len(run)], non_blocking=True)
                        at += len(run)
            done = copied
        self.length += tokens
        return done

    @property
    def reserved(self) -> int:
        """Blocks per row that have pages and are to be written by a device; a change of the batch drops them."""
        return self.table.blocks - self.blocks

    def reserve(self, blocks: int) -> None:
        """Allocate pages for ``blocks`` further blocks per row, behind a whole last block."""
        self._reserve(blocks * self.block_size)

    def filled(self, length: int) -> None:
        """Count tokens, up to ``length`` per row, that a device writes into reserved pages."""
        self.length = length

    def _reserve(self, tokens: int) -> None:
        # Drop pages that a failed append allocated: the last page must be the one that is written to.
        self.table.truncate(self.blocks)
        if self.length % self.block_size:
            self.table.own_last()
        if (fresh := -(-(self.length + tokens) // self.block_size) - self.table.blocks) > 0:
            self.table.extend(fresh)

    def gather(self, blocks: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Copy chosen blocks into contiguous tensors.

        Parameters
        ----------
        blocks : Tensor (batch, kv_heads, n) of int64
            Block numbers per row and KV head, on the CPU.
        keys, values : Tensor (batch, kv_heads, n, block_size, head_dim), contiguous
            Output; undefined where the last block of the store is not filled.
        """
        if self.table.pool.watched:
            self.touch(blocks)
        library, native = self.library, self.native()
        if library is not None and native is not None:
            return pages.gather(library, native, blocks, keys, values)
        batch, heads, count = blocks.shape
        numbers = self.table.ids.gather(1, blocks.reshape(batch, -1)).view(batch, heads, count)
        tiles = (numbers * heads + torch.arange(heads, dtype=torch.int64, device="cpu")[None, :, None]).mul_(2).view(-1)
        pool, size = self.table.pool, self.block_size * self.head_dim
        tiles = tiles.to(pool.device)
        if len(pool.slabs) == 1:
            flat = pool.slabs[0].view(-1, size)
            torch.index_select(flat, 0, tiles, out=keys.view(-1, size))
            torch.index_select(flat, 0, tiles.add_(1), out=values.view(-1, size))
            return
        flat_keys, flat_values = keys.view(-1, size), values.view(-1, size)
        for slab, start in zip(pool.slabs, pool.starts):
            flat, first = slab.view(-1, size), start * 2 * heads
            where = ((tiles >= first) & (tiles < first + len(flat))).nonzero().squeeze(1)
            if len(where) == len(tiles):
                torch.index_select(flat, 0, tiles - first, out=flat_keys)
                torch.index_select(flat, 0, tiles - (first - 1), out=flat_values)
                return
            if len(where):
                local = tiles[where] - first
                flat_keys.index_copy_(0, where, flat.index_select(0, local))
                flat_values.index_copy_(0, where, flat.index_select(0, local + 1))

    def touch(self, blocks: torch.Tensor | None, counts: torch.Tensor | None = None) -> None:
        """Check blocks of a mapped file before they are read through their addresses.

        Parameters
        ----------
        blocks : Tensor (batch, kv_heads, n) of int, or None
            Block numbers on the CPU, None for all.
        counts : Tensor (batch, kv_heads) of int, or None
            Leading entries that count; None for all.

        Raises
        ------
        SessionError
            If one is not what was written to the file.
        """
        pool, ids = self.table.pool, self.table.ids
        if not pool.watched:
            return
        if blocks is None:
            return pool.touch(ids.reshape(-1))
        # A packed store keeps its last block elsewhere.
        here = blocks < ids.shape[1]
        if counts is not None:
            here = here & (torch.arange(blocks.shape[2], dtype=torch.int64, device="cpu") < counts.unsqueeze(-1))
        rows, heads, places = here.nonzero(as_tuple=True)
        pool.touch(ids[rows, blocks[rows, heads, places].long()], heads)

    def read(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy of tokens ``start:stop``: keys and values, (batch, kv_heads, stop - start, head_dim) each."""
        first, last = start // self.block_size, -(-stop // self.block_size)
        shape = (self.batch, self.heads, last - first, self.block_size, self.head_dim)
        keys, values = (torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        if last > first:
            blocks = torch.arange(first, last, dtype=torch.int64, device="cpu")
            self.gather(blocks.expand(self.batch, self.heads, -1), keys, values)
        cut = slice(start - first * self.block_size, stop - first * self.block_size)
        return keys.flatten(2, 3)[:, :, cut], values.flatten(2, 3)[:, :, cut]

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        if length < self.length:
            self.length = length
            self.table.truncate(self.blocks)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Replace row ``i`` by the former row ``rows[i]``, for every ``i``; pages are shared, copy on write."""
        self.table.truncate(self.blocks)  # reserved pages must not be shared
        self.table.select_rows(rows.cpu())

    def fork(self) -> Self:
        """A second store over the same pages, copy on write."""
        self.table.truncate(self.blocks)  # reserved pages must not be shared
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, table=self.table.fork(), _args=None, _described=None)
        return twin

    def state_dict(self) -> State:
        """Length and pages, as views that are valid until the next change."""
        return {"length": self.length, "pages": self.table.content(self._whole_blocks(self.length))}

    def load_state_dict(self, state: State) -> None:
        """Fill an empty store with what :meth:`state_dict` gave; SessionError if it does not fit."""
        length, pages, pool = count_in(state, "length"), pages_in(state, "pages"), self.table.pool
        pages.check(self.batch, pool.page_shape, pool.dtype, self._whole_blocks(length))
        self.table.load(pages)
        self.length = length

    def _whole_blocks(self, length: int) -> int:
        """Pages per row that ``length`` tokens take."""
        return -(-length // self.block_size)

    # -- writing without the native library -----------------------------------------------------------------------

    def _write(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        tokens, at, block = keys.shape[2], 0, self.length // self.block_size
        if offset := self.length % self.block_size:
            at = min(tokens, self.block_size - offset)
            self._write_part(self.table.ids[:, block], offset, keys[:, :, :at], values[:, :, :at])
            block += 1
        if whole := (tokens - at) // self.block_size:
            end = at + whole * self.block_size
            self._write_whole(self.table.ids[:, block : block + whole], keys[:, :, at:end], values[:, :, at:end])
            at, block = end, block + whole
        if at < tokens:
            self._write_part(self.table.ids[:, block], 0, keys[:, :, at:], values[:, :, at:])

    def _write_part(self, pages: torch.Tensor, offset: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        span = slice(offset, offset + keys.shape[2])
        for slab, here, local in self.table.pool.by_slab(pages):
            slab.select(2, 0)[local, :, span] = keys[here]
            slab.select(2, 1)[local, :, span] = values[here]

    def _write_whole(self, pages: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        shape = (*keys.shape[:2], -1, self.block_size, self.head_dim)
        for row in range(len(pages)):
            for slab, here, local in self.table.pool.by_slab(pages[row]):
                slab.select(2, 0)[local] = keys[row].view(shape[1:]).transpose(0, 1)[here]
                slab.select(2, 1)[local] = values[row].view(shape[1:]).transpose(0, 1)[here]
