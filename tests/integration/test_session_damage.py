"""Sessions that were cut, flipped, swapped, killed while they were written, or made where there is no room."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import scout_hf
from scout_hf import CACHE, ScoutCache, SessionError
from scout_hf.sessions.folder import ABOUT, PAGES, TENSORS
from tests.integration.common import one_llama, prompt

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


KILLED = """
import os, random, signal, sys, time, traceback
import torch
import scout_hf
from tests.integration.common import llama, prompt
from tests.integration.test_session_damage import OPTIONS, everything
path, times = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
model, parent, dice, loaded, ready = llama(), os.getpid(), random.Random(0), 0, os.pipe()

def child(spill):
    caches = []
    with scout_hf.patch(model, **OPTIONS | spill) as handle, torch.no_grad():
        for tokens in (203, 91):
            caches.append(handle.new_cache())
            model(prompt(1, tokens), **{scout_hf.CACHE: caches[-1]})
        os.write(ready[1], b".")
        while os.getppid() == parent:
            for cache in caches:
                cache.save(path)

for number in range(times):
    pid = os.fork()
    if not pid:
        try:
            child({"host_memory": "64KiB"} if number % 2 else {})
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.read(ready[0], 1)
    time.sleep(dice.random() * 0.1)
    os.kill(pid, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), "the child ended by itself"
    if os.path.exists(path):
        loaded += 1
        assert scout_hf.ScoutCache.load(path, model).get_seq_length() in (203, 91)
        assert everything(model, path)
    folder, name = os.path.split(path)
    assert all(left == name or left.startswith(f".{name}.") for left in os.listdir(folder))
assert loaded > times // 2, loaded
for left in os.listdir(folder):
    if left.startswith("."):
        os.utime(os.path.join(folder, left), (0, 0))
with scout_hf.patch(model, **OPTIONS) as handle, torch.no_grad():
    cache = handle.new_cache()
    model(prompt(1, 50), **{scout_hf.CACHE: cache})
    cache.save(path)
assert os.listdir(folder) == [name]
print("killed", times, "loaded", loaded)
"""


def killed(path, times: int) -> str:
    """Kill processes that save again and again, every other one with pages in files; open what is there each time."""
    command = [sys.executable, "-c", KILLED, str(path), str(times)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_processes_killed_while_they_save_leave_a_whole_session(tmp_path):
    killed(tmp_path / "kv", 6)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_hundred_killed_processes(tmp_path, capsys):
    said = killed(tmp_path / "kv", 200)
    with capsys.disabled():
        print(said)


def test_a_damaged_session_is_not_saved_again_as_if_it_were_whole(copied):
    model, path = copied
    whole = bytearray((path / PAGES).read_bytes())
    whole[-100] ^= 1
    (path / PAGES).write_bytes(bytes(whole))
    cache = ScoutCache.load(path, model)
    with pytest.raises(SessionError, match="damaged"):
        cache.save(path.with_name("again"))
    assert os.listdir(path.parent) == ["kv"]
