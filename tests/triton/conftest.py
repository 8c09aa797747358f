"""With a GPU the kernels' tests run on it, without one in the interpreter: tensors are made where the kernels are."""

import pytest
import torch

from tests.triton.grid import DEVICE


@pytest.fixture(autouse=True)
def where_the_kernels_are():
    before = torch.get_default_device()
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(before)
