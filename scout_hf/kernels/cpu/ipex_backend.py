"""Attention over host blocks with Intel's extension for PyTorch (IPEX) 2.8, which exists for torch 2.8 only.

Slower than a kernel of our own and retired upstream; here for those who run that stack. Nothing of it is imported
before somebody asks for the backend, since importing it re-registers operators of torch and prints about it.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from scout_hf.errors import ConfigError
from scout_hf.fusion import Partial, empty_like, fuse
from scout_hf.kernels.attend import fold_group, unfold_group
from scout_hf.kernels.cpu.backend import Attended, BlockLists, CpuBackend
from scout_hf.kernels.cpu.protocols import PagedStore
from scout_hf.kernels.cpu.torch_backend import TorchBackend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PARTITION = 128  # tokens that the kernel attends at a time; a block must not straddle two of them


class IpexBackend(CpuBackend):
    """IPEX's paged attention, reading the blocks where they lie; torch where that kernel cannot serve.

    That is under padding, in float64 or mixed dtypes, for blocks of a size that does not divide 128, and under a soft
    cap for four rows or more of one KV head. Output in the dtype of the query, or float32 where the pages are spread
    over several slabs.
    """

    name = "ipex"

    def __init__(self, threads: int | None = None):
        super().__init__(threads)
        self._op = load_op()
        self._cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
        self._torch = TorchBackend(threads)

    def attend_blocks(
        self,
        query: torch.Tensor,
        store: PagedStore,
        lists: BlockLists | None,
        scale: float,
        softcap: float | None = None,
        padding_mask: torch.Tensor | None = None,
    ) -> Attended:
        if not _serves(query, store, softcap, padding_mask):
            return self._torch.attend_blocks(query, store, lists, scale, softcap, padding_mask)
        pages, filled = _entries(store, lists)
        parts, pool = [], store.table.pool
        for slab, start in zip(pool.slabs, pool.starts):
            here = filled * ((pages >= start) & (pages < start + len(slab)))
            if here.any():
                parts.append(self._attend_slab(query, slab, pages - start, here, scale, softcap))
        return Attended(fuse(parts) if parts else empty_like(query), int(filled.sum()))

    def close(self) -> None:
        super().close()
        self._torch.close()

    def _attend_slab(
        self,
        query: torch.Tensor,
        slab: torch.Tensor,
        pages: torch.Tensor,
        filled: torch.Tensor,
        scale: float,
        softcap: float | None,
    ) -> Partial:
        # Every KV head is a sequence of its own, with one KV head: heads may have different blocks.
        heads, size = slab.shape[1], slab.shape[3]
        keys, values = slab.flatten(0, 1).unsqueeze(2).unbind(1)
        table = pages * heads + torch.arange(heads, dtype=torch.int64, device="cpu")[:, None]
        if (filled[..., 1:] > filled[..., :-1]).any():
            # Full blocks, then the partly filled one, then those of other slabs: the kernel stops after the last token.
            filled, order = filled.sort(dim=-1, descending=True, stable=True)
            table = table.gather(-1, order)
        tokens = filled.sum(-1).flatten()
        longest = int(tokens.max())
        grouped = fold_group(query, heads).flatten(0, 1).contiguous()
        out, unused = torch.empty_like(grouped), torch.empty(0, dtype=torch.int32, device="cpu")
        table, lengths = table.flatten(0, 1).int().contiguous(), tokens.int()
        # A window of all tokens changes nothing but keeps the kernel for beams away, which takes four sequences that
        # begin with one block for beams of one length. A soft cap forbids a window; no cap is -1 (0 is a wrong answer).
        window, cap = (longest, -1.0) if softcap is None else (-1, float(softcap))
        how = (unused, scale, table, lengths, size, longest, None, window, 1.0, 1.0, cap)
        with _Allocations() as scratch:
            self._op.redispatch(self._cpu, out, grouped, keys, values, *how)
        lse = _lse(scratch.made, tokens, (*out.shape[:2], -(-longest // PARTITION)))
        out = out.masked_fill_((tokens == 0)[:, None, None], 0)
        return unfold_group(Partial(out, lse), query)


class _Allocations(TorchDispatchMode):
    """Keeps the tensors that a kernel allocates, in order. The op returns no LSE, but its scratch has all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[torch.Tensor] = []

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # or a compilation in another thread would think that it is in this mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.made.append(made)
        return made


def _lse(made: list[torch.Tensor], tokens: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """LSE from the largest score and the sum of exponentials of every partition, the kernel's first two tensors."""
    expected = (*shape[:2], shape[2] + 1)
    if [tuple(part.shape) for part in made[:2]] != [expected] * 2:
        raise ConfigError(
            "cpu_backend='ipex' finds another kernel of intel-extension-for-pytorch at work than the one it takes the "
            f"log-sum-exp from: it made {[tuple(part.shape) for part in made[:2]]} instead of two {expected}. "
            "Try cpu_backend='auto'"
        )
    top, total = (part[..., :-1] for part in made[:2])
    used = torch.arange(shape[2], dtype=torch.int64, device="cpu") * PARTITION < tokens[:, None, None]
    return torch.where(used, top + total.log(), -torch.inf).logsumexp(-1)


def _entries(store: PagedStore, lists: BlockLists | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Page of every list entry and how many of its tokens count, (batch, kv_heads, n) each; 0 for unused entries."""
    heads, blocks, size = store.heads, store.blocks, store.block_size
    if lists is None:
        ids = torch.arange(blocks, dtype=torch.int64, device="cpu").expand(store.batch, heads, -1)
    else:
        ids = lists.ids.long()
    filled = torch.full(ids.shape, size, dtype=torch.int64, device="cpu")
    if lists is not None and lists.counts is not None:
        unused = torch.arange(ids.shape[2], dtype=torch.int64, device="cpu") >= lists.counts[..., None]
        ids, filled = ids.masked_fill(unused, 0), filled.masked_fill_(unused, 0)
    unfilled = blocks * size - store.length
    if unfilled:
        filled.sub_(unfilled * (ids == blocks - 1)).clamp_(min=0)
    return store.table.ids.gather(1, ids.flatten(1)).view(ids.shape), filled


def _serves(query: torch.Tensor, store: PagedStore, softcap: float | None, padding_mask: torch.Tensor | None) -> bool:
    pool = store.table.pool
    if query.dtype != pool.dtype or pool.dtype not in DTYPES or PARTITION % store.block_size:
        return False
    beams = softcap is not None and store.heads == 1 and store.batch >= 4
    on_cpu = pool.device.type == query.device.type == "cpu"
    return on_cpu and not beams and (padding_mask is None or bool(padding_mask[:, : store.length].all()))


def load_op() -> Any:
    """IPEX's paged attention, or ConfigError if this environment has none that fits."""
    needed = "cpu_backend='ipex' needs torch 2.8 and intel-extension-for-pytorch 2.8.0"
    try:
        found = metadata.version("intel_extension_for_pytorch")
    except metadata.PackageNotFoundError:
        found = None
    extension = "no intel-extension-for-pytorch" if found is None else f"intel-extension-for-pytorch {found}"
    if found is None or found.split("+")[0] != "2.8.0" or not torch.__version__.startswith("2.8."):
        raise ConfigError(
            f"{needed}; found torch {torch.__version__} and {extension}. "
            "Try cpu_backend='auto', which takes the fastest there is here"
        )
    try:
        # By version it should load; the extension itself exits the interpreter where it does not like the machine.
        importlib.import_module("intel_extension_for_pytorch")
        return torch.ops.torch_ipex.single_query_cached_kv_attention.default
    except (Exception, SystemExit) as error:
        told = f"{needed}, which are installed but do not load ({error!r}). Try cpu_backend='auto'"
        raise ConfigError(told) from error
