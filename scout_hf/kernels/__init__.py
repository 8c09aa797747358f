"""Attention kernels and the seams that pick one. Nothing above this room is imported here."""
