"""The package without its native library, with a broken one, and with an instruction set that is asked for."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import scout_hf
from scout_hf.kernels.cpu import library
from scout_hf.kernels.cpu.library import ISA_VARIABLE, PATH_VARIABLE, Library, load_library
from tests.integration.common import LOSSY, left_padded, llama, logits, run
from tests.integration.library_process import RUNS, UNKNOWN_ISA, everything
from tests.libraries import ISAS, LIBRARY, environment, using_isa, without_library

ROOT = Path(__file__).parents[2]
ALLOWED = {name: 5e-3 if "int8" in name else 3e-6 for name in RUNS}
"""int8 differs more, by how weights are rounded."""


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """One after the other in one process, most of whose time goes into imports."""
    path = tmp_path_factory.mktemp("processes") / "found"
    variables = {**os.environ, PATH_VARIABLE: ""}
    variables.pop(ISA_VARIABLE, None)
    command = [sys.executable, "-m", "tests.integration.library_process", str(path), *["then"][: bool(ISAS)]]
    done = subprocess.run(command, cwd=ROOT, env=variables, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return dict(zip(("none", "nowhere", "refused", "isa"), torch.load(path)))


@pytest.fixture(scope="module")
def here():
    """The results of this process, with the library if there is one."""
    return everything()


@pytest.mark.parametrize("way", ["none", "nowhere", *(["isa"] if ISAS else [])])
def test_results_agree(processes, here, way):
    for name, expected in here.items():
        error = (processes[way]["logits"][name] - expected).abs().max()
        assert error <= ALLOWED[name], (name, error)
        # Torch does not round like the native code: a process that had the library all the same would show.
        assert way == "isa" or not ISAS or "int8" not in name or error > 0


def test_to_do_without_is_nothing_to_warn_of(processes):
    assert processes["none"]["told"] == [] and processes["none"]["isa"] is None


def test_a_missing_library_is_told_once(processes):
    assert processes["nowhere"]["isa"] is None
    (told,) = processes["nowhere"]["told"]
    assert told.startswith(
        "RuntimeWarning: scout_hf runs without its native CPU library: it cannot be loaded: /nowhere"
    )
    assert "several times slower" in told and "reinstall with g++ or clang" in told


@pytest.mark.skipif(not ISAS, reason="no native library")
def test_an_instruction_set_by_name(processes):
    assert processes["isa"]["isa"] == "base" and processes["isa"]["told"] == []
    told = processes["refused"]
    assert told.startswith(
        f"{ISA_VARIABLE}='{UNKNOWN_ISA}' is not allowed: this machine runs {', '.join(ISAS)}; unset it"
    )


LOAD_ALL = """
import sys, warnings
from pathlib import Path
from scout_hf.kernels.cpu import library
for path in sorted(Path(sys.argv[1]).iterdir()):
    library.find_library = lambda: path
    library.load_library.cache_clear()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        print(path.name, library.load_library() is None, len(told), told and told[0].message)
"""


@pytest.mark.skipif(not ISAS, reason="no native library")
def test_a_library_that_was_cut_off(tmp_path):
    """The loader maps such a file and the process dies of SIGBUS, so each is tried in another process."""
    whole = LIBRARY.path.read_bytes()
    cuts = [0, 1, 20, 63, 64, 200, 4096, len(whole) // 2, len(whole) - 4096, len(whole) - 1]
    for cut in cuts:
        (tmp_path / f"{cut:08d}").write_bytes(whole[:cut])
    (tmp_path / "garbage").write_bytes(bytes(range(256)) * 64)
    (tmp_path / "headers of something larger").write_bytes(whole[:56] + b"\xff" * 4096)
    (tmp_path / "whole").write_bytes(whole)
    variables = {name: value for name, value in os.environ.items() if name not in (PATH_VARIABLE, ISA_VARIABLE)}
    command = [sys.executable, "-c", LOAD_ALL, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done
    *broken, last = done.stdout.splitlines()
    assert last == "whole False 0 []"
    assert len(broken) == len(cuts) + 2
    for line in broken:
        name = line.split(" True 1 ")[0]
        assert "runs without its native CPU library: it cannot be loaded" in line and str(tmp_path / name) in line, line
        if name.isdigit() and int(name) >= 20:
            assert f"{name} has {int(name)} bytes, but its headers declare" in line and "--force-reinstall" in line


class TestInThisProcess:
    """The same and more, without the price of a new process."""

    def test_not_installed(self, monkeypatch):
        with environment():
            monkeypatch.setattr(library, "find_library", lambda: None)
            with pytest.warns(RuntimeWarning, match="checkout in which it was not built.*pip install -e"):
                assert load_library() is None
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert load_library() is None
                with scout_hf.patch(llama()) as handle:
                    assert handle._hooks.backend.name == "torch"

    @pytest.mark.skipif(not ISAS, reason="no native library")
    @pytest.mark.parametrize("content", [b"", b"not a library", "another version", "another library"])
    def test_a_file_that_is_none_of_ours(self, tmp_path, monkeypatch, content):
        path = tmp_path / "_scout_cpu.so"
        if content == "another version":
            reason = f"has ABI version {library.ABI}, this code needs 1000000"
            monkeypatch.setattr(library, "ABI", 10**6)
            path = LIBRARY.path
        elif content == "another library":
            import _ctypes

            path, reason = Path(getattr(_ctypes, "__file__", None) or pytest.skip("built in")), "undefined symbol"
        else:
            path.write_bytes(content)
            reason = "cannot be loaded"
        with environment(**{PATH_VARIABLE: str(path)}), pytest.warns(RuntimeWarning, match=reason):
            assert load_library() is None

    @pytest.mark.skipif(not ISAS, reason="no native library")
    def test_a_library_elsewhere(self, tmp_path):
        path = tmp_path / "elsewhere.so"
        path.write_bytes(LIBRARY.path.read_bytes())
        with environment(**{PATH_VARIABLE: str(path)}):
            assert load_library().path == path and load_library().isas() == ISAS

    @pytest.mark.parametrize("name", ISAS)
    def test_every_instruction_set(self, here, name):
        with environment(**{ISA_VARIABLE: name}):
            assert load_library().isa == name
            for run_name, found in everything().items():
                assert (found - here[run_name]).abs().max() <= ALLOWED[run_name]

    @pytest.mark.skipif(not ISAS, reason="no native library")
    def test_an_unknown_instruction_set(self):
        for name in ("avx1024", "AVX2", " base"):
            with environment(**{ISA_VARIABLE: name}), pytest.raises(scout_hf.ConfigError, match="machine runs base"):
                load_library()
        with pytest.raises(scout_hf.ConfigError, match=f"allowed: this machine runs {', '.join(ISAS)}"):
            LIBRARY.choose_isa("avx1024")
        with environment(**{ISA_VARIABLE: ""}):
            assert load_library().isa == LIBRARY.isa

    @pytest.mark.skipif(not ISAS, reason="no native library")
    @pytest.mark.parametrize("digest", ["minmax", "minmax-int8", "minmax-sub"])
    def test_sparse_runs_are_the_same_with_every_instruction_set(self, digest):
        """What is selected does not depend on how sums are rounded, unless two blocks are all but equal."""
        model, found = llama(), []
        for name in ISAS:
            with using_isa(name), scout_hf.patch(model, **LOSSY, digest=digest):
                found.append(run(model, left_padded(0, 13)))
        with without_library(), scout_hf.patch(model, **LOSSY, digest=digest):
            found.append(run(model, left_padded(0, 13)))
        for other in found[1:]:
            assert torch.equal(other.sequences, found[0].sequences)
            assert (logits(other) - logits(found[0])).abs().max() <= 1e-5

    @pytest.mark.skipif(not ISAS, reason="no native library")
    def test_loading_twice_gives_one_library(self):
        """Also from another path object: its settings belong to the process."""
        twin = Library(LIBRARY.path)
        with using_isa("base"):
            assert twin.isa == LIBRARY.isa == "base"
