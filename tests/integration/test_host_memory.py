"""A limit on host memory changes nothing but speed: what was not used for longest lies in files alone."""

import gc
import mmap
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import scout_hf
from scout_hf import CACHE, ScoutCache
from scout_hf.errors import HostMemoryError
from scout_hf.sessions.container import HOW
from scout_hf.sizes import bytes_of
from scout_hf.stores.host_memory import HostMemory
from scout_hf.stores.region import WINDOW
from tests.integration.common import left_padded, one_llama, prompt
from tests.integration.test_sessions import INPUTS, SETTINGS, Conversation

LIMIT = {"host_memory": 1 << 16}
"""One window: what a layer reads drives out what the others read."""


def talked(model, handle, inputs, **options):
    """Everything that a conversation gives, and its cache."""
    talk = Conversation(model, handle.new_cache(**options), inputs)
    with torch.no_grad():
        return torch.cat([talk.read(), talk.go_on(40)], dim=1), talk


@pytest.mark.parametrize("inputs", [INPUTS["padded rows"], {"input_ids": prompt(1, 301)}], ids=["padded rows", "long"])
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.thin(6)
def test_the_limit_changes_no_bit(options, inputs):
    model = one_llama()
    with scout_hf.patch(model, **options) as handle:
        free, _ = talked(model, handle, inputs)
        limited, talk = talked(model, handle, inputs, **LIMIT)
    memory = talk.cache.layers[0].memory
    assert torch.equal(free, limited)
    assert memory.held_bytes <= memory.limit + WINDOW  # of what is just being used
    assert memory.evicted_bytes > 0


@pytest.mark.parametrize("name", ["sparse", "two tiers", "exact"])
def test_forks_rows_and_crops_share_one_limit(name):
    model, found = one_llama(), []
    with scout_hf.patch(model, **SETTINGS[name]) as handle, torch.no_grad():
        for options in ({}, LIMIT):
            _, talk = talked(model, handle, left_padded(0, 13, 40, tokens=90), **options)
            fork = talk.with_cache(talk.cache.fork())
            fork.cache.crop(-21)
            fork.mask = fork.mask[:, :-21]
            found.append((talk.go_on(3), fork.go_on(20), talk.go_on(20)))
    assert all(torch.equal(*pair) for pair in zip(*found))
    assert fork.cache.layers[1].memory is talk.cache.layers[0].memory


@pytest.mark.parametrize("name", ["sparse", "two tiers", "int8"])
def test_a_loaded_session_keeps_within_it_too(name, tmp_path):
    model = one_llama()
    with scout_hf.patch(model, **SETTINGS[name]) as handle:
        _, talk = talked(model, handle, {"input_ids": prompt(2, 301)})
        talk.cache.save(tmp_path / "kv")
        loaded = talk.with_cache(ScoutCache.load(tmp_path / "kv", model, **LIMIT))
        assert torch.equal(talk.go_on(40), loaded.go_on(40))
    memory = loaded.cache.layers[0].memory
    assert 0 < memory.held_bytes <= memory.limit + 2 * WINDOW and memory.wanted_bytes > 0


def test_what_leaves_is_what_was_not_used_for_longest():
    memory = HostMemory(8 * WINDOW)
    slab, region = memory.slab((16, 1, WINDOW), torch.uint8)
    for page in range(16):
        slab[page] = page
        memory.touch(region, torch.tensor([page]), read=False)
        memory.touch(region, torch.tensor([0]), read=True)
    assert region.used[0] > 0 and region.used[15] > 0 and not region.used[1:8].any()
    assert memory.held_bytes == int((region.used > 0).sum()) * WINDOW <= memory.limit
    assert torch.equal(slab[:, 0, 0], torch.arange(16, dtype=torch.uint8))  # the file has all of it


def test_what_is_in_use_stays_even_beyond_the_limit():
    memory = HostMemory(2 * WINDOW)
    _, region = memory.slab((8, 1, WINDOW), torch.uint8)
    memory.touch(region, torch.arange(8), read=False)
    assert (region.used > 0).all() and memory.held_bytes == 8 * WINDOW


def in_memory(slab):
    """Bytes of a mapped slab that the system has in the memory of this process."""
    held = 0
    for one in Path("/proc/self/smaps").read_text().split("VmFlags")[:-1]:
        begin, end = (int(place, 16) for place in re.search(r"^([0-9a-f]+)-([0-9a-f]+) ", one, re.M).groups())
        if begin <= slab.data_ptr() < end:
            held += 1024 * int(re.search(r"^Rss: +(\d+) kB", one, re.M)[1])
    return held


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say what is in memory")
@pytest.mark.parametrize("private", [False, True], ids=["running", "session"])
def test_the_system_holds_what_is_counted_and_no_more(private, tmp_path):
    """Linux maps pages of up to 2 MiB around a place of a file that is touched, unless it is told not to."""
    memory, shape = HostMemory(2 << 20), (1024, 8, 8192)
    content = torch.arange(1024).to(torch.uint8)[:, None, None].expand(shape)
    if private:
        (tmp_path / "pages").write_bytes(content.contiguous().numpy().tobytes())
        with (tmp_path / "pages").open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, **HOW)
        slab = torch.from_numpy(np.frombuffer(mapped, dtype=np.uint8)).view(shape)
        region = memory.watch(mapped, 0, slab, private=True)
    else:
        slab, region = memory.slab(shape, torch.uint8)
        slab.copy_(content)
        memory.touch(region, torch.arange(8192), read=False)
    memory.touch(region, torch.tensor([0]), read=True)  # the rest leaves now
    for first in range(0, 8192, 256):
        wanted = torch.arange(first % 499, 8192, 499)
        memory.touch(region, wanted, read=True)
        assert torch.equal(slab.flatten(0, 1)[wanted, 77].long(), wanted // 8 % 256)
        assert in_memory(slab) <= memory.held_bytes + 4096 <= memory.limit + 4096
    assert memory.evicted_bytes > 0 and memory.wanted_bytes > memory.limit


def test_nothing_is_left_on_disk(tmp_path):
    model = one_llama()
    with scout_hf.patch(model, **SETTINGS["sparse"], **LIMIT, spill_dir=str(tmp_path)) as handle:
        _, talk = talked(model, handle, {"input_ids": prompt(1, 301)})
        assert os.listdir(tmp_path) == []  # without a name from the start
        numbers = len(os.listdir("/proc/self/fd"))
        del talk
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) <= numbers


def test_a_disk_that_is_full_is_an_error_and_not_the_end():
    """A limit on the size of files stands for it; a write into a hole would end the process instead."""
    model = one_llama()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with scout_hf.patch(model, **SETTINGS["sparse"], **LIMIT) as handle, torch.no_grad():
        cache = handle.new_cache()
        model(prompt(1, 9), **{CACHE: cache})
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, limits[1]))
        try:
            with pytest.raises(HostMemoryError, match="spill_dir"):
                model(prompt(1, 2000), **{CACHE: cache})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, before)
        assert cache.get_seq_length() == 9
        assert torch.isfinite(model(prompt(1, 300), **{CACHE: cache}).logits).all()


def test_a_folder_that_is_not_there(tmp_path):
    model = one_llama()
    with (
        scout_hf.patch(model, **LIMIT, spill_dir=str(tmp_path / "none")) as handle,
        pytest.raises(HostMemoryError, match="none"),
        torch.no_grad(),
    ):
        model(prompt(1, 9), **{CACHE: handle.new_cache()})


def test_sizes_as_people_write_them():
    assert [bytes_of(size) for size in ("8GiB", "500 MB", "1.5 kib", "64KiB", 77)] == [
        8 << 30,
        500_000_000,
        1536,
        1 << 16,
        77,
    ]


MEASURES = """
import sys, torch, psutil
import scout_hf
from scout_hf import CACHE
from tests.integration.common import llama, prompt
model = llama(num_key_value_heads=8, head_dim=64, num_hidden_layers=2, max_position_embeddings=1 << 16)
process = psutil.Process()
limit = None if sys.argv[1] == "None" else sys.argv[1]
with scout_hf.patch(model, budget=256, host_memory=limit) as handle, torch.no_grad():
    for step in range(3):  # what is loaded with the first steps is no part of the cache
        model(prompt(1, 40, seed=step))
    cache = handle.new_cache()
    model(prompt(1, 600), **{CACHE: cache})
    model(prompt(1, 1), **{CACHE: cache})
    cache = handle.new_cache()
    keys = torch.randn(1, 8, 1024, 64)
    before = process.memory_info().rss
    for _ in range(16):
        for layer in (0, 1):
            method = cache.layers[layer].method
            cache.layers[layer].lazy_initialization(keys, keys) if method is None else None
            cache.layers[layer].method.append(keys, keys)
            cache.layers[layer].method.flush()
    for step in range(30):
        model(prompt(1, 1, seed=step), **{CACHE: cache})
    print(process.memory_info().rss - before, sum(cache.tier_bytes().values()))
"""

# Memory that malloc keeps for later is not in use: it goes back to the system at once.
LEAN = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
}


@pytest.mark.full
def test_the_system_agrees_about_the_memory():
    """Resident memory of a process with 128 MiB of keys and values, with and without a limit of 32."""
    sizes = {}
    for limit in ("None", "32MiB"):
        ran = subprocess.run(
            [sys.executable, "-c", MEASURES, limit], stdout=subprocess.PIPE, env=os.environ | LEAN, check=True
        )
        sizes[limit], held = map(int, ran.stdout.split())
    assert held > 128 << 20 and sizes["None"] > 120 << 20
    assert sizes["None"] - sizes["32MiB"] > (128 - 1.2 * 32) * (1 << 20)
