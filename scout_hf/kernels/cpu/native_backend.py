"""The native CPU backend: attention, scoring and selection directly on the pages, limited by memory bandwidth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ctypes import byref, c_int64, c_void_p
from typing import Any

import torch

from scout_hf.errors import CacheStateError, NativeInputError
from scout_hf.fusion import Partial, fuse
from scout_hf.kernels.cpu.addresses import address
from scout_hf.kernels.cpu.backend import Attended, BlockLists, ByMass, Coarse, CpuBackend
from scout_hf.kernels.cpu.library import (
    DTYPES,
    INT8,
    MAX_BLOCK,
    MAX_HEAD_DIM,
    MAX_PARTS,
    SCORERS,
    AttendArgs,
    Library,
    SelectArgs,
    check,
    load_library,
)
from scout_hf.kernels.cpu.pool import CopyArgs, NativePool, PoolTicket, quick
from scout_hf.kernels.cpu.protocols import PagedStore, StepJob, StepJobs, Ticket
from scout_hf.kernels.cpu.step_jobs import NativeStepJob, NativeStepJobs
from scout_hf.kernels.cpu.torch_backend import TorchBackend

# Torch multiplies matrices of more queries faster, unless MANY names the instruction set and the dtype of query and KV.
MOST_QUERIES = 128
MANY = {
    "avx2": {torch.float16},
    "avx512": {torch.float16, torch.float32},
    "avx512bf16": {torch.float16, torch.float32, torch.bfloat16},
}
# As much as is copied at a time without this backend.
PIECE_TOKENS = 4096


class NativeBackend(CpuBackend):
    """Synchronous calls run on torch's OpenMP team, background jobs on a native thread pool.

    Sizes, dtypes and devices that the library does not support are passed to :class:`TorchBackend`.
    """

    name = "native"

    def __init__(self, threads: int | None = None):
        super().__init__(threads)
        self._library = load_library()
        self._torch = TorchBackend(threads)
        if self._library is not None:
            self._pool = NativePool(self._library.handle, threads or torch.get_num_threads())
            self._submit = quick(self._library.handle, "scout_submit_attend")
            self._copy = quick(self._library.handle, "scout_submit_copy")
            self._submit_step = quick(self._library.handle, "scout_submit_step", c_void_p, c_void_p, c_int64)

    @property
    def spin_us(self) -> int:
        """As of ``CpuBackend``."""
        return CpuBackend.spin_us if self._library is None else self._pool.spin_us

    @spin_us.setter
    def spin_us(self, value: int) -> None:
        if self._library is not None:
            self._pool.spin_us = value

    def attend_blocks(
        self,
        query: torch.Tensor,
        store: PagedStore,
        lists: BlockLists | None,
        scale: float,
        softcap: float | None = None,
        padding_mask: torch.Tensor | None = None,
    ) -> Attended:
        described = self._describe(query, store, lists, scale, softcap, padding_mask)
        if described is None:
            return self._torch.attend_blocks(query, store, lists, scale, softcap, padding_mask)
        library, args, partial, _ = described
        check(library.attend(byref(args), torch.get_num_threads()), "blocks to attend")
        return Attended(partial, args.attended)

    def attend_past(
        self,
        query: torch.Tensor,
        store: PagedStore,
        tokens: int,
        scale: float,
        softcap: float | None = None,
        padding_mask: torch.Tensor | None = None,
        first: int = 0,
    ) -> Partial | None:
        if not first < tokens <= store.length:
            return None
        if query.shape[2] > MOST_QUERIES and not self.gains_by_many(query, store):
            return None
        parts: list[Partial] = []
        for lists in _pieces(store, first, tokens):
            described = self._describe(query, store, lists, scale, softcap, padding_mask, several=True)
            if described is None:
                return None
            library, args, partial, _ = described
            args.end = tokens
            check(library.attend(byref(args), torch.get_num_threads()), "the past to attend")
            parts.append(partial)
        return fuse(parts)

    def gains_by_many(self, query: torch.Tensor, store: PagedStore) -> bool:
        if self._library is None or query.dtype != store.dtype or store.packed:
            return False
        return query.dtype in MANY.get(self._library.isa, ()) and _served(query) and store.native() is not None

    def start(
        self,
        query: torch.Tensor,
        store: PagedStore,
        lists: BlockLists | None,
        scale: float,
        softcap: float | None = None,
        padding_mask: torch.Tensor | None = None,
    ) -> Ticket[Attended]:
        described = self._describe(query, store, lists, scale, softcap, padding_mask)
        if described is None:
            return self._torch.start(query, store, lists, scale, softcap, padding_mask)
        _, args, partial, keep = described
        return self._post(args, partial, (keep, store.memory()))

    def watches(self, query: torch.Tensor, store: PagedStore) -> bool:
        # A pool without threads runs jobs on the thread that waits for them; here none waits.
        known = self._library is not None and _served(query) and store.native() is not None
        return known and self._pool.has_threads()

    def prepare(
        self,
        words: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        into: Partial,
        query: torch.Tensor,
        lists: BlockLists,
        chosen: torch.Tensor,
        layer: int,
    ) -> NativeStepJob:
        return NativeStepJob(self, words, into, query, lists, chosen, layer)

    def together(self, jobs: Sequence[StepJob]) -> NativeStepJobs:
        own = [job for job in jobs if isinstance(job, NativeStepJob)]
        if self._library is None or len(own) != len(jobs):
            raise NotImplementedError("together() takes jobs that this backend has prepared")
        return NativeStepJobs(self._submit_step, own)

    def start_step(self, jobs: StepJobs) -> PoolTicket:
        if not isinstance(jobs, NativeStepJobs):
            raise NotImplementedError("start_step() takes jobs that this backend has put together")
        return jobs.start(self._pool)

    def described(
        self,
        query: torch.Tensor,
        store: PagedStore,
        lists: BlockLists,
        scale: float,
        softcap: float | None,
        padding_mask: torch.Tensor | None,
        into: Partial,
    ) -> tuple[AttendArgs, Any] | None:
        """Arguments of the library for such a job, and what owns their memory; None if it does not support it."""
        found = self._describe(query, store, lists, scale, softcap, padding_mask, into)
        return None if found is None else (found[1], found[2:])

    def _post(self, args: AttendArgs, partial: Partial, keep: Any) -> PoolTicket:
        def result() -> Attended:
            check(args.status, "blocks to attend")
            return Attended(partial, args.attended)

        # Kept alive: after an interrupt, ticket and store may be deleted while the job still runs.
        return self._pool.submit(self._submit, args, keep=(keep, partial), result=result)

    def select(
        self,
        scorer: str,
        query: torch.Tensor,
        codes: torch.Tensor,
        count: int | torch.Tensor,
        sinks: int,
        newest: int,
        block_size: int,
        padding_mask: torch.Tensor | None,
        by_mass: ByMass | None = None,
        coarse: Coarse | None = None,
    ) -> BlockLists | None:
        batch, heads, candidates = codes.shape[:3]
        library, known = self._library, self._knows(scorer, query, codes, block_size, padding_mask)
        if library is None or known is None:
            return None
        if padding_mask is not None and (
            padding_mask.shape[0] != batch or padding_mask.shape[1] < candidates * block_size
        ):
            return None
        count_of_rows = count.to("cpu", torch.int32).contiguous() if isinstance(count, torch.Tensor) else None
        most = min(int(count.max()) if isinstance(count, torch.Tensor) else count, candidates)
        ids = torch.empty((batch, heads, most + newest), dtype=torch.int32, device="cpu")
        counts = torch.empty((batch, heads), dtype=torch.int32, device="cpu")
        choice: dict[str, int | float] = {"blocks": address(ids, torch.int32), "counts": address(counts, torch.int32)}
        choice["blocks_stride"] = most + newest
        choice |= {"count": most, "sinks": sinks, "newest": newest}
        if count_of_rows is not None:
            choice["want"] = address(count_of_rows, torch.int32)
        if padding_mask is not None:
            choice |= {
                "padding_mask": address(padding_mask, torch.bool, strided=True),
                "padding_mask_stride": padding_mask.stride(0),
            }
        if by_mass is not None:
            choice |= {"mass": by_mass.mass, "least": by_mass.least}
            if by_mass.recent is not None:
                choice["recent"] = address(by_mass.recent, torch.float32)
        if coarse is not None and by_mass is None:
            choice |= {"fine": min(coarse.fine, candidates), "coarse_dim": coarse.dim}
        self._select(library, query, codes, **known, **choice)
        return BlockLists(ids, counts)

    def score(self, scorer: str, query: torch.Tensor, codes: torch.Tensor, block_size: int = 1) -> torch.Tensor | None:
        library, known = self._library, self._knows(scorer, query, codes, block_size, None)
        if library is None or known is None:
            return None
        counts = torch.empty(codes.shape[:2], dtype=torch.int32, device="cpu")
        lists = query.shape[1] if scorer == "sign" else codes.shape[1]
        scores = torch.empty((len(codes), lists, codes.shape[2]), dtype=torch.float32, device="cpu")
        found = {"counts": address(counts, torch.int32), "scores": address(scores, torch.float32)}
        self._select(library, query, codes, **known, **found)
        return scores

    def _knows(
        self,
        scorer: str,
        query: torch.Tensor,
        codes: torch.Tensor,
        block_size: int,
        padding_mask: torch.Tensor | None,
    ) -> dict[str, int] | None:
        """The scoring arguments for the library, or None if it cannot score this."""
        if self._library is None or scorer not in SCORERS or not _served(query, codes, padding_mask):
            return None
        heads, dim, code = codes.shape[1], query.shape[3], codes.shape[3]
        if query.shape[0] != codes.shape[0] or query.shape[1] % heads:
            return None
        # Of sign codes something else may lie between two blocks.
        if codes.stride(2) < code or (scorer != "sign" and codes.stride(2) != code):
            return None
        known = {"scorer": SCORERS[scorer], "block_size": block_size, "code_dtype": DTYPES.get(codes.dtype, INT8)}
        if scorer == "minmax":
            fits = codes.dtype in DTYPES and code == 2 * dim and dim % 8 == 0
        elif scorer == "sign":
            fits = codes.dtype == torch.uint8 and dim % 8 == 0 and code == block_size * (dim // 8 + 1)
            fits = fits and block_size <= MAX_BLOCK and dim <= MAX_HEAD_DIM
        else:
            packed = scorer == "dots4"
            fits = codes.dtype in ((torch.uint8, torch.int8) if packed else (*DTYPES, torch.int8))
            fits = fits and query.shape[1] == heads and dim % 8 == 0 and code * (1 + packed) % dim == 0
            fits = fits and dim <= code * (1 + packed) <= MAX_PARTS * dim and dim <= 2 * MAX_HEAD_DIM
        return known if fits else None

    def _select(self, library: Library, query: torch.Tensor, codes: torch.Tensor, **choice: int | float) -> None:
        batch, heads, candidates, code = codes.shape
        query = query if query.stride(3) == 1 else query.contiguous()
        args = SelectArgs(
            query=address(query, *DTYPES, strided=True),
            query_row=query.stride(0),
            query_head=query.stride(1),
            codes=address(codes, *DTYPES, torch.int8, torch.uint8, strided=True),
            codes_row=codes.stride(0),
            codes_head=codes.stride(1),
            codes_block=codes.stride(2),
            batch=batch,
            kv_heads=heads,
            query_heads=query.shape[1],
            head_dim=query.shape[3],
            query_dtype=DTYPES[query.dtype],
            code=code,
            candidates=candidates,
            **choice,
        )
        check(library.select(byref(args), torch.get_num_threads()), "digests to score")

    def copy(self, sources: torch.Tensor, targets: torch.Tensor, copy_bytes: int, keep: Any) -> Ticket[Any] | None:
        if self._library is None:
            return None
        if sources.shape != targets.shape:
            raise NativeInputError(
                f"got {len(sources)} source and {len(targets)} target addresses; pass as many of each"
            )
        places = (address(part, torch.int64) for part in (sources, targets))
        args = CopyArgs(*places, len(sources), copy_bytes)
        return self._pool.submit(self._copy, args, keep=(sources, targets, keep))

    def busy(self) -> bool:
        return self._torch.busy()

    def close(self) -> None:
        super().close()
        self._torch.close()
        if self._library is not None:
            self._pool.close()

    def _describe(
        self,
        query: torch.Tensor,
        store: PagedStore,
        lists: BlockLists | None,
        scale: float,
        softcap: float | None,
        padding_mask: torch.Tensor | None,
        into: Partial | None = None,
        several: bool = False,
    ) -> tuple[Library, AttendArgs, Partial, Any] | None:
        """The library, its arguments, the outputs, and objects to keep alive until the call has ended.

        None if the library does not support the inputs.
        """
        library, served = self._library, _served(query, padding_mask) and (lists is None or lists.ids.is_cpu)
        native = store.native() if served and library is not None else None
        if native is None or library is None:
            return None
        batch, _, queries, dim = query.shape
        fits = (batch, dim) == (store.batch, store.head_dim) and (queries == 1 or several)
        if not fits or query.shape[1] % store.heads:
            raise CacheStateError(
                f"got queries {tuple(query.shape)} for a store of {store.batch} rows and {store.heads} KV heads with "
                f"head_dim={store.head_dim}; pass (batch, query_heads, 1, head_dim), with query heads a multiple of KV "
                "heads"
            )
        store.touch(*(lists or (None, None)))
        if padding_mask is not None and (padding_mask.shape[0] != batch or padding_mask.shape[1] < store.length):
            raise CacheStateError(
                f"got a padding mask of {tuple(padding_mask.shape)} for {batch} rows of {store.length} tokens; "
                "pass (batch, tokens) that covers all of them"
            )
        query = query if query.stride(3) == 1 else query.contiguous()
        out, lse = into or (
            torch.empty(query.shape, dtype=torch.float32, device="cpu"),
            torch.empty(query.shape[:3], dtype=torch.float32, device="cpu"),
        )
        args = AttendArgs(
            store=native,
            query=address(query, *DTYPES, strided=True),
            query_row=query.stride(0),
            query_head=query.stride(1),
            query_token=query.stride(2),
            queries=queries,
            out=address(out, torch.float32),
            lse=address(lse, torch.float32),
            query_heads=query.shape[1],
            query_dtype=DTYPES[query.dtype],
            scale=scale,
            softcap=softcap or 0.0,
        )
        if padding_mask is not None:
            args.padding_mask, args.padding_mask_stride = (
                address(padding_mask, torch.bool, strided=True),
                padding_mask.stride(0),
            )
        if lists is not None:
            ids, counts = lists.ids.to(torch.int32).contiguous(), lists.counts
            if ids.shape[:2] != (batch, store.heads) or (counts is not None and counts.shape != ids.shape[:2]):
                raise CacheStateError(
                    f"got lists {tuple(ids.shape)} for {batch} rows of {store.heads} KV heads; "
                    "pass ids (batch, kv_heads, n) and counts (batch, kv_heads)"
                )
            args.blocks_stride = args.count = ids.shape[2]
            if counts is not None:
                counts = counts.to("cpu", torch.int32).contiguous()
                args.counts = address(counts, torch.int32)
            if not ids.numel():
                # The address of an empty tensor is 0, which would mean all blocks.
                ids = ids.new_zeros(1)
            lists = BlockLists(ids, counts)
            args.blocks = address(ids, torch.int32)
        return library, args, Partial(out, lse), (query, lists, padding_mask)


def _pieces(store: PagedStore, begin: int, tokens: int) -> Iterator[BlockLists | None]:
    """Lists of the blocks that hold tokens ``begin:tokens``; None for all from the first one on at once.

    Pages that are in files come piece by piece, so that no more than one is brought into memory at a time; all others
    too, so that a cache of a file computes the same bits.
    """
    size = store.block_size
    blocks, most = -(-tokens // size), max(1, PIECE_TOKENS // size)
    if not begin and blocks <= most:
        yield None
        return
    for first in range(begin // size, blocks, most):
        ids = torch.arange(first, min(first + most, blocks), dtype=torch.int32, device="cpu")
        yield BlockLists(ids.expand(store.batch, store.heads, -1), None)


def _served(query: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether the library supports the query, and can read the other tensors in host memory."""
    known = query.is_cpu and query.dtype in DTYPES
    return known and all(other is None or other.is_cpu and other.stride(-1) == 1 for other in others)
