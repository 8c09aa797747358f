"""The packaged pocket model, and lm-eval without a hub and without traces outside of the test's folder."""

from __future__ import annotations

import pytest
import torch

from scout_hf.eval.pocket import WEIGHTS, load_pocket


@pytest.fixture(scope="session")
def pocket():
    """Model and tokenizer, float32, unpatched."""
    return load_pocket()


@pytest.fixture(scope="session")
def pocket64():
    """The same in float64, where rounding is far below any tolerance."""
    return load_pocket(dtype=torch.float64)


@pytest.fixture(scope="session")
def pocket_path() -> str:
    """What ``pretrained=`` takes."""
    return str(WEIGHTS / "llama")
