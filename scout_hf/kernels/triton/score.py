"""Score digests on a GPU: the choice of the kernel."""

from __future__ import annotations

import torch

from scout_hf.kernels.triton.score_dots import score_dots
from scout_hf.kernels.triton.score_minmax import score_minmax
from scout_hf.kernels.triton.score_sign import score_sign
from scout_hf.kernels.triton.support import next_power_of_2, runs_on

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# Limits of a program: channels of a head, tokens of a block, elements of a block's code.
MAX_HEAD_DIM, MAX_BLOCK, MAX_ELEMENTS = 256, 256, 16384


def score(
    scorer: str,
    query: torch.Tensor,
    codes: torch.Tensor,
    block_size: int = 1,
    *,
    out: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Score digests against a query; larger is better.

    Parameters
    ----------
    scorer : str
        ``"minmax"``, ``"dots"``, ``"dots4"`` or ``"sign"``, as in :meth:`scout_hf.kernels.cpu.CpuBackend.select`.
    query : Tensor (batch, query_heads, 1, head_dim), for dots (batch, kv_heads, 1, n)
        As returned by ``Digest.prepare``; bfloat16, float16 or float32.
    codes : Tensor (batch, kv_heads, blocks, code)
        The last stride must be 1; may be a view of a larger buffer.
    block_size : int
        Tokens per block; used by ``"sign"``.
    out : Tensor (batch, kv_heads, for sign query_heads, at least blocks) of float32, or None
        Output; None for a new tensor. Unchanged behind the blocks.
    count : Tensor of one int32 on the device of the codes, or None
        Number of valid blocks, if fewer than the capacity of ``codes``. The others get -inf and are not read. So a
        captured CUDA graph that works on whole buffers serves a growing context.

    Returns
    -------
    Tensor (batch, kv_heads, blocks) of float32, or None
        None if no kernel supports the codes.

    Examples
    --------
    >>> query = torch.randn(1, 8, 1, 64, device="cuda")  # doctest: +SKIP
    >>> codes = torch.randn(1, 2, 100, 128, device="cuda")  # doctest: +SKIP
    >>> score("minmax", query, codes).shape  # doctest: +SKIP
    torch.Size([1, 2, 100])
    """
    if not _fits(scorer, query, codes, block_size):
        return None
    shape = torch.Size((codes.shape[0], query.shape[1] if scorer == "sign" else codes.shape[1], codes.shape[2]))
    if out is None:
        out = torch.empty(shape, dtype=torch.float32, device=codes.device)
    elif out.dtype != torch.float32 or out.shape[:2] != shape[:2] or out.shape[2] < shape[2] or out.stride(2) != 1:
        raise ValueError(f"got out of {out.dtype} {tuple(out.shape)}; pass float32 of at least {tuple(shape)}, or None")
    scores = out[:, :, : shape[2]]
    if not scores.numel():
        return scores
    query = query if query.stride(3) == 1 else query.contiguous()
    if scorer == "minmax":
        score_minmax(query, codes, scores, count)
    elif scorer == "sign":
        score_sign(query, codes, scores, count, block_size)
    else:
        score_dots(query, codes, scores, count, scorer == "dots4")
    return scores


def _fits(scorer: str, query: torch.Tensor, codes: torch.Tensor, block_size: int) -> bool:
    if not runs_on(codes) or query.device != codes.device or query.dtype not in FLOATS or codes.stride(3) != 1:
        return False
    heads, dim, code = codes.shape[1], query.shape[3], codes.shape[3]
    if query.shape[0] != codes.shape[0] or query.shape[2] != 1 or query.shape[1] % heads:
        return False
    if scorer == "minmax":
        return codes.dtype in FLOATS and code == 2 * dim and dim <= MAX_HEAD_DIM
    if scorer == "sign":
        powers = 1 < block_size <= MAX_BLOCK and block_size == next_power_of_2(block_size)
        layout = dim % 8 == 0 and dim <= MAX_HEAD_DIM and code == block_size * (dim // 8 + 1)
        return codes.dtype == torch.uint8 and powers and layout
    if scorer not in ("dots", "dots4") or query.shape[1] != heads:
        return False
    half = scorer == "dots4"
    known = codes.dtype in ((torch.uint8, torch.int8) if half else (*FLOATS, torch.int8))
    width = dim // (1 + half)
    if not known or (half and dim % 2) or code < width or code % width:
        return False
    return next_power_of_2(code // width) * next_power_of_2(width) <= MAX_ELEMENTS
