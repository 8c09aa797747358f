"""Attention kernels, and the choice of an implementation. Imports no package that is built on kernels."""

from scout_hf.kernels.attend import attend
from scout_hf.kernels.device import find_kernels

__all__ = ["attend", "find_kernels"]
