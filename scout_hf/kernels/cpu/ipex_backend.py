"""The IPEX CPU backend (Intel Extension for PyTorch 2.8, for torch 2.8 only).

Slower than the native backend and retired upstream; kept for users of that stack. IPEX is imported only on request,
because the import re-registers torch operators and prints warnings.
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
PARTITION = 128  # tokens per partition of the kernel; a block must not span two partitions


class IpexBackend(CpuBackend):
    """IPEX's paged attention, directly on the pages; torch where that kernel does not apply.

    Torch is used with padding, for float64 or mixed dtypes, for block sizes that do not divide 128, and with a soft cap
    for four or more rows with one KV head. The output has the dtype of the query, or float32 if the pages lie in
    several slabs.
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
        store.touch(*(lists or (None, None)))
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
        # Pass every KV head as a sequence with one KV head, since heads may attend different blocks.
        heads, size = slab.shape[1], slab.shape[3]
        keys, values = slab.flatten(0, 1).unsqueeze(2).unbind(1)
        table = pages * heads + torch.arange(heads, dtype=torch.int64, device="cpu")[:, None]
        if (filled[..., 1:] > filled[..., :-1]).any():
            # The kernel reads the first `lengths` tokens: full blocks first, then the partly filled one, then blocks of
            # other slabs.
            filled, order = filled.sort(dim=-1, descending=True, stable=True)
            table = table.gather(-1, order)
        tokens = filled.sum(-1).flatten()
        longest = int(tokens.max())
        grouped = fold_group(query, heads).flatten(0, 1).contiguous()
        out, unused = torch.empty_like(grouped), torch.empty(0, dtype=torch.int32, device="cpu")
        table, lengths = table.flatten(0, 1).int().contiguous(), tokens.int()
        # A window over all tokens avoids the kernel for beam search, which mistakes four sequences with the same first
        # block for beams of one length. A soft cap excludes a window; -1 means no cap (0 gives wrong results).
        window, cap = (longest, -1.0) if softcap is None else (-1, float(softcap))
        how = (unused, scale, table, lengths, size, longest, None, window, 1.0, 1.0, cap)
        with _Allocations() as scratch:
            self._op.redispatch(self._cpu, out, grouped, keys, values, *how)
        lse = _lse(scratch.made, tokens, (*out.shape[:2], -(-longest // PARTITION)))
        out = out.masked_fill_((tokens == 0)[:, None, None], 0)
        return unfold_group(Partial(out, lse), query)


class _Allocations(TorchDispatchMode):
    """Records the tensors that a kernel allocates, in order. The op returns no LSE, but its scratch tensors hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[torch.Tensor] = []

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # else a compilation in another thread would see this mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.made.append(made)
        return made


def _lse(made: list[torch.Tensor], tokens: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """LSE from the e_max and e_sum of every partition, the first two tensors that the kernel allocates."""
    expected = (*shape[:2], shape[2] + 1)
    if [tuple(part.shape) for part in made[:2]] != [expected] * 2:
        raise ConfigError(
            "cpu_backend='ipex' found another kernel of intel-extension-for-pytorch than the one that it supports: its "
            f"scratch tensors are {[tuple(part.shape) for part in made[:2]]} instead of two {expected}. "
            "Try cpu_backend='auto'"
        )
    top, total = (part[..., :-1] for part in made[:2])
    used = torch.arange(shape[2], dtype=torch.int64, device="cpu") * PARTITION < tokens[:, None, None]
    return torch.where(used, top + total.log(), -torch.inf).logsumexp(-1)


def _entries(store: PagedStore, lists: BlockLists | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Page id and number of tokens of every list entry, (batch, kv_heads, n) each; 0 for unused entries."""
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
    """IPEX's paged attention; ConfigError if it is not installed in the supported version."""
    needed = "cpu_backend='ipex' needs torch 2.8 and intel-extension-for-pytorch 2.8.0"
    try:
        found = metadata.version("intel_extension_for_pytorch")
    except metadata.PackageNotFoundError:
        found = None
    extension = "no intel-extension-for-pytorch" if found is None else f"intel-extension-for-pytorch {found}"
    if found is None or found.split("+")[0] != "2.8.0" or not torch.__version__.startswith("2.8."):
        raise ConfigError(
            f"{needed}; found torch {torch.__version__} and {extension}. "
            "Try cpu_backend='auto', which takes the fastest that is installed"
        )
    try:
        # The version fits, but on an unsupported machine the extension exits the interpreter.
        importlib.import_module("intel_extension_for_pytorch")
        return torch.ops.torch_ipex.single_query_cached_kv_attention.default
    except (Exception, SystemExit) as error:
        message = f"{needed}, which are installed but do not load ({error!r}). Try cpu_backend='auto'"
        raise ConfigError(message) from error
