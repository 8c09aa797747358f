"""Will it fit, will it pay: memory and step time of every method, for any machine."""

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
