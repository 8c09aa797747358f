"""Examples in the kernels' docstrings, in Triton's interpreter; without a GPU they are skipped where they stand."""

from __future__ import annotations

import doctest
import inspect

import pytest
import torch

from scout_hf.kernels import triton as kernels

SKIP, NEEDS_GPU = "  # doctest: +SKIP", ("kv_splits_for",)
FUNCTIONS = [name for name in kernels.__all__ if inspect.isfunction(getattr(kernels, name)) and name not in NEEDS_GPU]


def example(name: str) -> str:
    text = inspect.getdoc(getattr(kernels, name)) or ""
    on_cpu = text.replace(SKIP, "").replace('"cuda"', '"cpu"').replace(".pin_memory()", "")
    return on_cpu.replace(">>> torch.cuda.synchronize()", "")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_example_gives_what_it_says(name):
    names = {"torch": torch, **{one: getattr(kernels, one) for one in kernels.__all__}}
    test = doctest.DocTestParser().get_doctest(example(name), names, name, None, None)
    assert test.examples, f"{name} has no example"
    said: list[str] = []
    assert doctest.DocTestRunner().run(test, out=said.append).failed == 0, "".join(said)
