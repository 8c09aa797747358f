"""Attention kernels and the seams that pick one. Nothing above this room is imported here."""

from scout_hf.kernels.attend import attend
from scout_hf.kernels.device import find_kernels

__all__ = ["attend", "find_kernels"]
