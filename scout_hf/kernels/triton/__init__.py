"""GPU kernels in Triton. Importing this package imports triton; use ``kernels.device.find_kernels``."""

from scout_hf.kernels.triton import prefetch, tuning
from scout_hf.kernels.triton.append import append_token
from scout_hf.kernels.triton.attend import attend_blocks, kv_splits_for
from scout_hf.kernels.triton.choose import Choice, choose
from scout_hf.kernels.triton.encode import encode
from scout_hf.kernels.triton.flags import post, wait
from scout_hf.kernels.triton.gate import silu_product
from scout_hf.kernels.triton.mean_share import mean_share
from scout_hf.kernels.triton.merge import merge
from scout_hf.kernels.triton.move_block import move_block
from scout_hf.kernels.triton.norm import rms_norm
from scout_hf.kernels.triton.recall import adopt_block, copy_blocks, plan_recall, run_of_blocks
from scout_hf.kernels.triton.rotate import rotate
from scout_hf.kernels.triton.score import score
from scout_hf.kernels.triton.support import INTERPRETED

__all__ = [
    "INTERPRETED", "Choice", "adopt_block", "append_token", "attend_blocks", "choose", "copy_blocks", "encode",
    "kv_splits_for", "mean_share", "merge", "move_block", "plan_recall", "post", "prefetch", "rms_norm", "rotate",
    "run_of_blocks", "score", "silu_product", "tuning", "wait",
]  # fmt: skip
