"""Sessions that were cut, flipped, swapped, killed while they were written, or made where there is no room."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import scout_hf
from scout_hf import CACHE, ScoutCache, SessionError
from scout_hf.sessions.folder import ABOUT, PAGES, TENSORS
from tests.integration.common import llama, one_llama, prompt

OPTIONS = {"budget": 32, "block_size": 8, "window": 8}
FILES = (ABOUT, PAGES, TENSORS)


def filled(model, handle, tokens: int = 203):
    cache = handle.new_cache()
    with torch.no_grad():
        model(prompt(1, tokens), **{CACHE: cache})
    return cache


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model and a session that no test changes."""
    path = tmp_path_factory.mktemp("sessions") / "kv"
    model = one_llama()
    with scout_hf.patch(model, **OPTIONS) as handle:
        filled(model, handle).save(path)
    return model, path


@pytest.fixture
def copied(made, tmp_path):
    """The same, to be damaged."""
    model, path = made
    return model, shutil.copytree(path, tmp_path / "kv")


def everything(model, path):
    """Open it and read all tokens, as exact decoding would."""
    cache = ScoutCache.load(path, model)
    return [(layer.keys, layer.values) for layer in cache.layers]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99, 1.2])
@pytest.mark.parametrize("name", FILES)
def test_files_that_are_too_short_or_too_long(copied, name, share):
    model, path = copied
    size = (path / name).stat().st_size
    os.truncate(path / name, int(size * share))
    with pytest.raises(SessionError):
        everything(model, path)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(copied, name):
    model, path = copied
    (path / name).unlink()
    with pytest.raises(SessionError, match=name):
        everything(model, path)


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_an_error_or_changes_nothing(copied, made, name):
    """Places all over the file: header, table, checksums, data."""
    model, path = copied
    expected = everything(*made)
    whole = (path / name).read_bytes()
    chosen = random.Random(name)
    for place in [0, 7, 8, 9, len(whole) - 1, *(chosen.randrange(len(whole)) for _ in range(60))]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << chosen.randrange(8)
        (path / name).write_bytes(flipped)
        try:
            found = everything(model, path)
        except SessionError:
            continue
        assert name == ABOUT, f"byte {place} of {name} was flipped and nobody noticed"  # blanks between its words
        assert all(torch.equal(*pair) for one, other in zip(found, expected) for pair in zip(one, other))


@pytest.mark.parametrize("limit", [None, 1 << 16, "1GiB"])
def test_a_damaged_block_is_an_error_when_it_is_first_wanted(copied, limit):
    """Not before, and the model goes on."""
    model, path = copied
    size = (path / PAGES).stat().st_size
    with (path / PAGES).open("r+b") as file:
        file.seek(size - 1)
        byte = file.read(1)
        file.seek(size - 1)
        file.write(bytes([byte[0] ^ 1]))
    with scout_hf.patch(model, **OPTIONS) as handle, torch.no_grad():
        cache = ScoutCache.load(path, model, host_memory=limit)
        with pytest.raises(SessionError, match="damaged: block"):
            model(prompt(1, 5, seed=3), **{CACHE: cache})
        assert torch.isfinite(model(prompt(1, 9), **{CACHE: handle.new_cache()}).logits).all()


@pytest.mark.parametrize("limit", [None, 1 << 16])
@pytest.mark.parametrize("how", ["cut", "written to"])
def test_a_file_that_is_changed_while_it_is_open(copied, how, limit):
    model, path = copied
    with scout_hf.patch(model, **OPTIONS), torch.no_grad():
        cache = ScoutCache.load(path, model, host_memory=limit)
        model(prompt(1, 1), **{CACHE: cache})
        if how == "cut":
            os.truncate(path / PAGES, 4096)
        else:
            with (path / PAGES).open("r+b") as file:
                file.seek(-100, os.SEEK_END)
                file.write(bytes(100))
        fork = cache.fork() if how == "written to" else cache
        for one in (cache, fork):
            with pytest.raises(SessionError, match="changed while it was open"):
                model(prompt(1, 1), **{CACHE: one})


def test_a_session_that_is_removed_or_replaced_stays_open(copied, made):
    model, path = copied
    with scout_hf.patch(model, **OPTIONS) as handle, torch.no_grad():
        first, second = ScoutCache.load(path, model), ScoutCache.load(made[1], model)
        filled(model, handle, tokens=50).save(path)
        third = ScoutCache.load(path, model)
        shutil.rmtree(path)
        assert third.get_seq_length() == 50
        a, b = (model(prompt(1, 1), **{CACHE: cache}).logits for cache in (first, second))
    assert torch.equal(a, b)


def test_a_disk_that_is_full_leaves_what_was_there(copied):
    """A limit on the size of files stands for it: the same error at the same call."""
    model, path = copied
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with scout_hf.patch(model, **OPTIONS) as handle:
        cache = filled(model, handle)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))
        try:
            for target in (path, path.with_name("new")):
                with pytest.raises(OSError):
                    cache.save(target)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, before)
        assert os.listdir(path.parent) == ["kv"]
        everything(model, path)
        cache.save(path.with_name("new"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_to(copied):
    model, path = copied
    path.parent.chmod(0o500)
    try:
        with scout_hf.patch(model, **OPTIONS) as handle, pytest.raises(PermissionError):
            filled(model, handle).save(path.with_name("new"))
    finally:
        path.parent.chmod(0o700)


SAVES_FOR_EVER = """
import sys, itertools, torch
import scout_hf
from tests.integration.common import llama, prompt
model = llama()
with scout_hf.patch(model, budget=32, block_size=8, window=8) as handle, torch.no_grad():
    caches = []
    for tokens in (203, 91):
        caches.append(handle.new_cache())
        model(prompt(1, tokens), **{scout_hf.CACHE: caches[-1]})
    print("ready", flush=True)
    for number in itertools.count():
        caches[number % 2].save(sys.argv[1])
"""


def killed_while_saving(path, times: int):
    """Kill a process that saves again and again; yields after each."""
    chosen = random.Random(0)
    for _ in range(times):
        child = subprocess.Popen(
            [sys.executable, "-c", SAVES_FOR_EVER, str(path)],
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert child.stdout.readline() == b"ready\n"
        time.sleep(chosen.random() * 0.05)
        child.kill()
        child.wait()
        child.stdout.close()
        yield


def check_after_kills(path, times: int):
    model, loaded = llama(), 0
    for _ in killed_while_saving(path, times):
        if path.exists():
            loaded += 1
            assert ScoutCache.load(path, model).get_seq_length() in (203, 91)
            assert everything(model, path)
        assert all(name == path.name or name.startswith(f".{path.name}.") for name in os.listdir(path.parent))
    assert loaded > times // 2
    for left in path.parent.glob(".*"):
        os.utime(left, (0, 0))
    ScoutCache.load(path, model)
    with scout_hf.patch(model, **OPTIONS) as handle:
        filled(model, handle).save(path)
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.full
def test_a_process_killed_while_it_saves_leaves_a_whole_session(tmp_path):
    check_after_kills(tmp_path / "kv", 3)


@pytest.mark.slow
def test_two_hundred_killed_processes(tmp_path):
    check_after_kills(tmp_path / "kv", 200)
