"""Memory that a cache takes beside the bytes of its keys and values: measured in a process that does nothing else.

``python -m scout_hf.eval.bench.memory`` is that process; it prints one line of JSON.
"""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil

# Sizes of the model that do not change what its cache holds: kept small, so that nothing else takes memory.
SMALL = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 256}
KINDS = ("stock", "scout", "scout int8")
STEPS = 2
WATCH_SECONDS = 0.01


def in_fresh_process(kind: str, tokens: int, budget: int, block_size: int, shape: dict[str, int]) -> dict[str, Any]:
    """What a cache of one of ``KINDS`` takes for so many tokens, and at most took on the way.

    ``kv_bytes`` of keys and values in bf16, by how much the process grew (``held_bytes``, ``peak_bytes``), and both as
    shares of the former; the shape of the model is as LlamaConfig takes it.
    """
    request = json.dumps({"kind": kind, "tokens": tokens, "budget": budget, "block_size": block_size, "shape": shape})
    call = [sys.executable, "-m", "scout_hf.eval.bench.memory", request]
    done = subprocess.run(call, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring memory failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(kind: str, tokens: int, budget: int, block_size: int, shape: dict[str, int]) -> dict[str, Any]:
    """The same in this process."""
    import torch

    from scout_hf import CACHE
    from scout_hf.eval.arms import CPU_DECODE
    from scout_hf.eval.bench.models import make_llama
    from scout_hf.eval.caches import fill, kv_bytes_per_token, random_kv

    model = make_llama(**shape | SMALL)
    # Once with a few tokens, so that whatever is set up at the first use is there.
    ids = torch.zeros((1, 1), dtype=torch.long)
    with torch.no_grad(), CPU_DECODE[kind].caches(model, budget=budget, block_size=block_size) as caches:
        model(ids, **{CACHE: fill(caches.new(), model.config, 2 * block_size)})
        cache, parts = caches.new(), random_kv(model.config, tokens)
        gc.collect()
        with Peak() as peak:
            for layer in range(model.config.num_hidden_layers):
                cache.update(*parts, layer)
            for _ in range(STEPS):
                model(ids, **{CACHE: cache})
            held = peak.grown()
    kv = kv_bytes_per_token(model.config) * tokens
    shares = {"held_share": held / kv, "peak_share": peak.bytes / kv}
    return {"kind": kind, "tokens": tokens, "kv_bytes": kv, "held_bytes": held, "peak_bytes": peak.bytes, **shares}


class Peak:
    """By how much this process grows at most while the context lasts, in ``bytes``."""

    def __enter__(self) -> Peak:
        self._process = psutil.Process()
        self._over = threading.Event()
        # Where the system keeps the peak itself, it is forgotten first; elsewhere a thread looks often.
        self._exact = _forget_peak()
        self._before = self._process.memory_info().rss
        self._most = self._before
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        self._look()
        if self._exact:
            self._most = max(self._most, _peak())
        self.bytes = self._most - self._before

    def grown(self) -> int:
        """By how much it has grown now."""
        return self._process.memory_info().rss - self._before

    def _watch(self) -> None:
        while not self._over.wait(WATCH_SECONDS):
            self._look()

    def _look(self) -> None:
        self._most = max(self._most, self._process.memory_info().rss)


def _forget_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _peak() > 0
    except OSError:
        return False


def _peak() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{os.getpid()}/status").read_text())
    return int(found.group(1)) * 1024 if found else 0


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
