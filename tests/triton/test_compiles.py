"""All kernels become machine code: what the interpreter cannot show, and no GPU is needed for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, the tests that run the kernels compile them")
@pytest.mark.parametrize("once", [True, pytest.param(False, marks=pytest.mark.full)], ids=["once", "every launch"])
def test_every_kernel_compiles_for_a_gpu(tmp_path, once):
    """In a separate process: Triton chooses its interpreter when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    program = [sys.executable, "-m", "tests.triton.compile_kernels", *(["--once"] if once else [])]
    ran = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stderr[-3000:]
    made = {line.split(";")[0] for line in ran.stdout.splitlines()}
    files = (ROOT / "scout_hf" / "kernels" / "triton").glob("*.py")
    launched = {
        word.split(".launch(")[0]
        for file in files
        for word in file.read_text().split()
        if word.startswith("_") and ".launch(" in word
    }
    assert launched and launched <= made, f"not compiled: {sorted(launched - made)}"
