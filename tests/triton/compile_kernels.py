"""Compiles every kernel launch of a round of calls for GPUs that need not be there. A program: run it without a GPU.

Usage: python -m tests.triton.compile_kernels [--once] [capability ...], 80 and 90 by default. Prints a line per kernel
compiled; with ``--once`` only the first launch of each kernel is, and of each way of prefetching.
"""

from __future__ import annotations

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

BULK = 2
TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.bool: "i1", torch.uint8: "u8",
    torch.int8: "i8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages")
ONCE = "--once"
seen: set[tuple] = set()
capabilities: list[int] = []


def type_of(value) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def alignments(given: dict, fixed: dict) -> dict:
    """What a launch tells the compiler of its arguments: which addresses and numbers are multiples of 16."""
    known = {}
    for index, (name, value) in enumerate(given.items()):
        number = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if name not in fixed and isinstance(number, int) and number % 16 == 0:
            known[(index,)] = [["tt.divisibility", 16]]
    return known


def compile_instead(kernel: JITFunction, *args, grid, warmup, **options):
    """What a launch would compile, as machine code of each capability."""
    given = dict(zip([param.name for param in kernel.params], args))
    given |= {name: value for name, value in options.items() if name not in OPTIONS}
    fixed = {
        param.name: given[param.name] for param in kernel.params if param.is_constexpr or given[param.name] is None
    }
    signature = {name: "constexpr" if name in fixed else type_of(value) for name, value in given.items()}
    chosen = {name: value for name, value in options.items() if name in OPTIONS}
    key = (kernel.fn.__name__, tuple(signature.items()), tuple(fixed.items()), tuple(chosen.items()))
    if ONCE in sys.argv:
        key = (kernel.fn.__name__, fixed.get("PREFETCH"))
    if key in seen:
        return
    seen.add(key)
    for capability in capabilities:
        if fixed.get("PREFETCH") == BULK and capability < 90:
            continue
        target = GPUTarget("cuda", capability, 32)
        made = triton.compile(ASTSource(kernel, signature, fixed, alignments(given, fixed)), target, chosen)
        assert made.asm["cubin"]
        print(kernel.fn.__name__, f"sm_{capability}", f"shared {made.metadata.shared}", flush=True)


def calls() -> None:
    """One call of everything, in the shapes of Llama-3-8B, and some awkward ones."""
    from scout_hf.kernels import triton as kernels
    from scout_hf.kernels.triton.tuning import PLAIN, PREFETCHING, Tile

    for dtype, dim, group in ((torch.bfloat16, 128, 4), (torch.float16, 80, 7), (torch.float32, 64, 1)):
        query = torch.zeros(2, 8 * group, 1, dim, dtype=dtype)
        keys = torch.zeros(2, 8, 4, 32, dim, dtype=dtype)
        ids, lengths = torch.zeros(2, 8, 4, dtype=torch.int32), torch.full((1,), 99, dtype=torch.int32)
        marks = {"starts": lengths.expand(2), "padding_mask": torch.ones(2, 128, dtype=torch.bool)}
        tiles = [Tile()] if dtype == torch.float32 else [*PLAIN, *PREFETCHING]
        for tile in tiles:
            kernels.attend_blocks(query, keys, keys, 0.1, ids=ids, tile=tile, num_kv_splits=3)
        out, lse = kernels.attend_blocks(
            query, keys, keys, 0.1, 50.0, lengths=lengths, first=7, num_kv_splits=3, **marks
        )
        kernels.attend_blocks(query, keys[:, :, 0], keys[:, :, 1], 0.1, pages=ids, num_kv_splits=3)
        kernels.append_token(keys[:, :, 0, :1], keys[:, :, 1, :1], keys[:, :, 0], keys[:, :, 1], lengths, lengths, 32)
        kernels.merge(out, lse, dtype=dtype)
        kernels.merge(out, lse, query.float(), lse[:, :, :1].contiguous(), torch.zeros(8 * group))
        kernels.post(query, query.clone(), *torch.zeros(2, 1, dtype=torch.int64))
        slots = torch.full((2, 8, 2048), -1, dtype=torch.int32)
        choice = kernels.choose(torch.zeros(2, 8, 2048), 64, 1, None, slots, 64)
        moves = kernels.plan_recall(ids, slots, choice, 0.12)
        kernels.copy_blocks(torch.zeros(2, 2048, dtype=torch.int64), moves, keys, keys)
        kernels.adopt_block(3, keys[:, :, 0], keys[:, :, 1], ids, slots, keys, keys)
    digests()
    padding_mask, count = torch.ones(2, 9000, dtype=torch.bool), torch.full((2,), 9, dtype=torch.int64)
    slots = torch.full((2, 8, 9000), -1, dtype=torch.int32)
    kernels.choose(torch.zeros(2, 8, 9000), count, 1, padding_mask, slots, 64, torch.full((1,), 9, dtype=torch.int32))
    kernels.wait(*torch.zeros(3, 1, dtype=torch.int64))
    for group in (1, 4):
        masses = torch.zeros(2, 8 * group, 9000)
        kernels.mean_share(masses, 8, None)
        kernels.mean_share(masses, 8, padding_mask, masses[:, :, 0])


def digests() -> None:
    """Building and scoring the codes of every kind."""
    from scout_hf.kernels.triton import encode, score, support

    support.INTERPRETED = True  # else tensors on the CPU are refused
    from scout_hf.selection import make_digest

    for dtype, dim, group in ((torch.bfloat16, 128, 4), (torch.float16, 80, 7)):
        query, keys = torch.ones(2, 2 * group, 1, dim, dtype=dtype), torch.randn(2, 2, 5, 32, dim).to(dtype)
        for name in ("minmax", "minmax-int8", "minmax-sub", "sign", "sign2"):
            digest = make_digest(name)
            digest.fit(keys, None, None, 0.1)
            codes = digest.encode(keys, None)
            for padding_mask in (None, torch.ones(2, 5, 32, dtype=torch.bool)):
                encode(digest, keys, padding_mask)
            score(digest.native, digest.prepare(query), codes, 32)


def main() -> None:
    capabilities.extend([int(given) for given in sys.argv[1:] if given != ONCE] or (80, 90))
    JITFunction.run = compile_instead
    calls()


if __name__ == "__main__":
    main()
