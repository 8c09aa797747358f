"""L2 prefetch of the blocks that a decode kernel reads next (arXiv 2504.06319, section 3).

The addresses come from the kernel's own list, so nothing is predicted. The interpreter does not support PTX; there the
kernels do not prefetch.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Values of ``PREFETCH``: none; one instruction per L2 line, on every GPU; one bulk instruction per row, from compute
# capability 9.0.
OFF, LINES, BULK = 0, 1, 2
LINE_BYTES = 128


@triton.jit
def row_ahead(first, pages, token, listed, stride_n, stride_t, BLOCK: tl.constexpr, HAS_PAGES: tl.constexpr):
    """Addresses of tokens of a list; indices behind its end are clamped to the last token."""
    token = tl.minimum(token, listed * BLOCK - 1)
    entry, offset = token // BLOCK, token % BLOCK
    if HAS_PAGES:
        # An empty entry may hold an invalid page.
        page = tl.maximum(tl.load(pages + entry), 0).to(tl.int64)
    else:
        page = entry.to(tl.int64)
    return first + page * stride_n + offset * stride_t


@triton.jit
def ask_for(rows, ROW_BYTES: tl.constexpr, ROW_LINES: tl.constexpr, PREFETCH: tl.constexpr):
    """Prefetch rows into L2; ``ROW_LINES`` is a power of two that covers the lines of a row."""
    places = rows.to(tl.int64)
    if PREFETCH == 2:
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
            "=r,l,r",
            [places, tl.full(places.shape, ROW_BYTES, tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        steps = tl.minimum(tl.arange(0, ROW_LINES) * 128, ROW_BYTES - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [places[:, None] + steps[None, :]],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
