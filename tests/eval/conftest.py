"""The packaged pocket model, loaded once."""

import pytest
import torch

from scout_hf.eval.pocket import load_pocket


@pytest.fixture(scope="session")
def pocket():
    """Model and tokenizer, float32, unpatched."""
    return load_pocket()


@pytest.fixture(scope="session")
def pocket64():
    """The same in float64, where rounding is far below any tolerance."""
    return load_pocket(dtype=torch.float64)
