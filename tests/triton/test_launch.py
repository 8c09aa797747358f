"""Prepared launches: the kernel and the arguments are those of Triton's own launch, with fewer calls on the host."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


def test_a_prepared_launch_is_the_same_with_less_work(tmp_path):
    """In a separate process: Triton chooses its interpreter when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    program = [sys.executable, "-m", "tests.triton.launch_calls"]
    ran = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stderr[-3000:]
    calls, c_calls, theirs, _ = map(int, re.findall(r"\d+", ran.stdout))
    assert calls <= 12 < theirs and c_calls <= 10
