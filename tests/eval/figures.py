"""What every number in the record of a benchmark must be."""

import math


def check_numbers(part, positive, where=""):
    """All numbers are finite, none but cosines negative; ratios, and what ends in one of ``positive``, above zero."""
    if isinstance(part, dict):
        for name, value in part.items():
            check_numbers(value, positive, f"{where}.{name}")
    elif isinstance(part, list):
        for index, value in enumerate(part):
            check_numbers(value, positive, f"{where}[{index}]")
    elif isinstance(part, (int, float)):
        assert math.isfinite(part) and (part >= 0 or "cosine" in where), where
        if where.endswith(positive) or ".ratios" in where:
            assert part > 0, where
