"""Estimates of memory and step time per method, model and machine: does it fit, and is it faster than stock?"""

from scout_hf.planner.cost import (
    GIB,
    Load,
    Plan,
    break_even,
    largest_batch,
    longest_context,
    methods,
    plan,
)
from scout_hf.planner.machine import MACHINES, Machine
from scout_hf.planner.shape import SHAPES, ModelShape

__all__ = [
    "GIB",
    "MACHINES",
    "SHAPES",
    "Load",
    "Machine",
    "ModelShape",
    "Plan",
    "break_even",
    "largest_batch",
    "longest_context",
    "methods",
    "plan",
]
