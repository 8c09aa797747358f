"""With a GPU the kernels' tests run on it, without one in the interpreter: tensors are made where the kernels are."""

import pytest
import torch

from tests.triton.grid import DEVICE, ON_GPU


@pytest.fixture(autouse=ON_GPU)
def where_the_kernels_are():
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)  # not "cpu", which would leave a mode on for all tests behind
