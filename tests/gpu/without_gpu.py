"""A plugin of pytest: the GPU tests where there is no GPU, for what they launch. Needs ``TRITON_INTERPRET=0``.

What they compute comes from the kernels' references on the CPU, and graphs are those of ``tests/integration``. What
only a device can say (which memory it holds, whether a call waits for it) is not asked. ``--launches FILE``: write
down what is launched.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

ASK_THE_DEVICE = {"test_the_gpu_holds_a_small_part", "test_write_back_and_recall_over_registered_memory"}
"""How much it holds and what is pinned: at the end, when all is launched."""


def pytest_addoption(parser):
    parser.addoption("--launches", help="file for what is launched")


def pytest_collection_modifyitems(items):
    for item in items:
        for node in item.listchain():  # they skip themselves where there is no GPU
            node.own_markers = [mark for mark in node.own_markers if mark.name != "skipif"]
        if item.originalname in ASK_THE_DEVICE:
            item.add_marker(pytest.mark.xfail(raises=AssertionError, strict=True))


@pytest.fixture(scope="session")
def launched(pytestconfig):
    from triton.runtime.jit import JITFunction

    from tests.triton.launches import Launch, dumped

    found, run = set(), JITFunction.run

    def written_down(kernel, *args, grid, warmup, **options):
        found.add(Launch.of(kernel, args, options))

    JITFunction.run = written_down
    yield found
    JITFunction.run = run
    if path := pytestconfig.getoption("--launches"):
        Path(path).write_text(dumped(found))


@pytest.fixture(autouse=True)
def a_cpu_instead(monkeypatch, launched, request):
    from transformers import PreTrainedModel

    import scout_hf
    from tests.integration import fake_graph
    from tests.triton import reference

    reference.install(monkeypatch)
    patch = scout_hf.patch
    monkeypatch.setattr(scout_hf, "patch", lambda model, **options: patch(model, **{"split": "cpu"} | options))
    for name in ("synchronize", "empty_cache", "_sleep", "set_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    for kind in (torch.nn.Module, PreTrainedModel):
        monkeypatch.setattr(kind, "cuda", lambda self: self)
    monkeypatch.setattr("tests.gpu.test_decode.STEPS", 30)
    monkeypatch.setattr("tests.gpu.test_decode.TOKENS", 8192)
    monkeypatch.setattr("tests.gpu.test_decode.TURNS", (4300, 4500, 4520))
    both(monkeypatch, reference.KERNELS)
    fake_graph.install(monkeypatch)


def both(monkeypatch, references):
    """Each reference, and beside it the launch of the kernel."""
    from scout_hf.kernels import triton as kernels
    from scout_hf.kernels.triton import support, tuning

    monkeypatch.setattr(tuning, "_best", lambda device, dtype, dim, *_: tuning.default_tile(227 << 10, dim, dtype))
    monkeypatch.setattr(support, "INTERPRETED", True)  # tensors on the CPU are refused else

    def beside(name, reference):
        kernel = getattr(kernels, name)

        def call(*args, **options):
            kernel(*args, **options)
            return reference(*args, **options)

        return call

    for name in vars(references):
        if name not in ("Choice", "INTERPRETED", "kv_splits_for", "run_of_blocks"):
            monkeypatch.setattr(references, name, beside(name, getattr(references, name)))
