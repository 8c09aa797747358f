"""What is built from a clean checkout: a source archive, from that a wheel with the native library, one without.

Each is built once. A wheel takes its time: all sources are compiled for all instruction sets.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from scout_hf.kernels.cpu.library import Library

ROOT = Path(__file__).parents[2]
NATIVE = "scout_hf/kernels/cpu/native"
COMPILER = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
# Not what was built here before: a wheel takes whatever lies in build/.
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv*", "build", "dist", "*.egg-info", "*.so", "*.dylib", "__pycache__", ".*_cache", ".hypothesis"
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("checkout") / "scout_hf", ignore=LEFT_OUT))


def build_wheel(source, target, **environment):
    """The wheel that pip makes of a checkout or an archive, and what it said."""
    alone = ["--no-deps", "--no-build-isolation", "--no-index", "--no-cache-dir"]
    command = [sys.executable, "-m", "pip", "wheel", "-v", *alone, "-w", str(target), str(source)]
    ran = subprocess.run(command, cwd=target, env=os.environ | environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (found,) = target.glob("scout_hf-*.whl")
    return found, ran.stdout + ran.stderr


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory):
    target = tmp_path_factory.mktemp("sdist")
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(target)], check=True, cwd=checkout, capture_output=True)
    (found,) = target.glob("scout_hf-*.tar.gz")
    return found


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    # The flags for other architectures come last: nothing is optimised, which takes a third of the time.
    return build_wheel(sdist, tmp_path_factory.mktemp("wheel"), ARCHFLAGS=f"{os.environ.get('ARCHFLAGS', '')} -O0")[0]


@pytest.fixture(scope="module")
def without_compiler(checkout, tmp_path_factory):
    """A wheel from a machine that has no compiler, and what was said."""
    target, empty = tmp_path_factory.mktemp("any"), tmp_path_factory.mktemp("path")
    return build_wheel(checkout, target, CXX="/nonexistent", PATH=str(empty))


def names_in(wheel):
    return zipfile.ZipFile(wheel).namelist()


def metadata(wheel, file):
    (name,) = (name for name in names_in(wheel) if name.endswith(f".dist-info/{file}"))
    return zipfile.ZipFile(wheel).read(name).decode()


def test_the_archive_holds_the_native_sources(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / NATIVE).iterdir() if path.is_file()}
    assert len(sources) > 10 and sources <= names
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "scout_hf/kernels/cpu/library.py"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


@pytest.mark.parametrize("which", [pytest.param("wheel", marks=needs_compiler), "without_compiler"])
class TestBothWheels:
    @pytest.fixture
    def built(self, request, which):
        found = request.getfixturevalue(which)
        return found[0] if isinstance(found, tuple) else found

    def test_nothing_but_scout_hf_at_the_top_level(self, built):
        tops = {name.split("/")[0] for name in names_in(built)}
        assert tops - {"scout_hf"} == {name for name in tops if name.endswith(".dist-info")}

    @pytest.mark.parametrize("folder", ["pocket/weights/llama", "pocket/weights/qwen3", "text/weights"])
    def test_the_trained_models_are_inside(self, built, folder):
        files = ("model.safetensors", "config.json", "tokenizer.json", "training.json")
        assert {f"scout_hf/eval/{folder}/{file}" for file in files} <= {*names_in(built)}

    def test_words_and_pages_are_inside(self, built):
        assert {"scout_hf/eval/pocket/vocabulary.json", "scout_hf/eval/report/page.html.jinja"} <= {*names_in(built)}

    def test_every_module_of_the_checkout_is_inside(self, built):
        homes = {"scout_hf": "scout_hf", "eval": "scout_hf/eval", "patches": "scout_hf/patches"}
        expected = {
            f"{home}/{path.relative_to(ROOT / folder)}"
            for folder, home in homes.items()
            for path in (ROOT / folder).rglob("*.py")
        }
        assert expected == {name for name in names_in(built) if name.endswith(".py")}

    def test_no_sources_of_the_library(self, built):
        assert not [name for name in names_in(built) if name.endswith((".cpp", ".h", ".inl", ".o", ".c", ".hpp"))]
        assert not [name for name in names_in(built) if "/native/" in name]


@needs_compiler
def test_the_wheel_is_for_this_platform_and_any_python(wheel):
    tag = re.sub(r"[^a-z0-9_]", "_", sysconfig.get_platform())
    assert wheel.name.endswith(f"-py3-none-{tag}.whl")
    assert f"Tag: py3-none-{tag}\n" in metadata(wheel, "WHEEL") and "Root-Is-Purelib: false" in metadata(wheel, "WHEEL")
    libraries = [name for name in names_in(wheel) if name.endswith((".so", ".dylib", ".pyd"))]
    assert [Path(name).stem for name in libraries] == ["_scout_cpu"]
    assert libraries[0].startswith("scout_hf/kernels/cpu/")


def test_without_a_compiler_the_wheel_is_for_every_platform(without_compiler):
    wheel, said = without_compiler
    assert wheel.name.endswith("-py3-none-any.whl") and "Tag: py3-none-any\n" in metadata(wheel, "WHEEL")
    assert "Root-Is-Purelib: true" in metadata(wheel, "WHEEL")
    assert not [name for name in names_in(wheel) if name.endswith((".so", ".dylib", ".pyd"))]
    assert "the native library was not built" in said and "/nonexistent" in said


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": ""}, "no C.. compiler found"),
        ({"CXX": "python -c 'exit(1)'"}, "native library was not built: python -c"),
    ],
    ids=["none", "broken"],
)
def test_a_failed_build_is_a_warning(checkout, tmp_path, environment, reason):
    """Also with no compiler on the path, and with one that fails; the library of an earlier build does not remain."""
    old = tmp_path / "lib" / "scout_hf" / "kernels" / "cpu" / "_scout_cpu.so"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"old")
    (tmp_path / "python").symlink_to(sys.executable)
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        str(tmp_path / "lib"),
        "-t",
        str(tmp_path / "temp"),
    ]
    variables = os.environ | environment | {"PATH": str(tmp_path)}
    ran = subprocess.run(command, cwd=checkout, env=variables, capture_output=True, text=True)
    assert ran.returncode == 0 and re.search(f"warning: .*{reason}", ran.stdout + ran.stderr, re.DOTALL)
    assert not list((tmp_path / "lib").rglob("_scout_cpu*"))


@pytest.fixture(scope="module")
def library(wheel, tmp_path_factory):
    """The shared object out of the wheel."""
    (name,) = (name for name in names_in(wheel) if "_scout_cpu" in name)
    return zipfile.ZipFile(wheel).extract(name, tmp_path_factory.mktemp("library"))


def told_by(*command):
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]}")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="asks tools of Linux")
class TestTheLibrary:
    def test_nothing_but_its_interface_is_visible(self, library):
        symbols = [line.split()[-1] for line in told_by("nm", "-D", "--defined-only", library).splitlines()]
        assert "scout_attend" in symbols and "scout_pool_create" in symbols
        assert [symbol for symbol in symbols if not symbol.startswith("scout_")] == []

    def test_it_needs_no_cxx_library_of_the_machine_and_no_openmp(self, library):
        needed = re.findall(r"\(NEEDED\).*\[(.*?)\]", told_by("readelf", "-d", library))
        assert needed and all(re.match(r"(libc|libm|libpthread|ld-linux[\w-]*)\.so", name) for name in needed), needed

    def test_its_stack_is_not_executable(self, library):
        (line,) = re.findall(r"GNU_STACK.*\n.*", told_by("readelf", "-lW", library)) or [""]
        assert " RWE" not in line

    def test_it_has_the_instruction_sets_of_this_machine(self, library):
        """Which are chosen when it is loaded, so that it runs on any machine of the platform."""
        names, flags = Library(Path(library)).isas(), Path("/proc/cpuinfo").read_text().split()
        assert names[0] == "base"
        if platform.machine() == "x86_64":
            assert ("avx2" in names) == ("avx2" in flags and "fma" in flags)
            assert ("avx512bf16" in names) == ("avx512_bf16" in flags and "avx512_vnni" in flags)


RUN = """
import sys, warnings
sys.path.extend({libraries!r})
import torch, transformers
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import scout_hf, scout_hf.patches, scout_hf.eval
    from scout_hf.eval.pocket import load_pocket
    from scout_hf.kernels.cpu.library import load_library
    model, tokenizer = load_pocket()
    for split in ("off", "cpu"):
        with scout_hf.patch(model, budget=64, split=split):
            model.generate(torch.arange(1, 200)[None], max_new_tokens=3, do_sample=False)
library = load_library()
print(scout_hf.__file__, scout_hf.patches.__file__, library and library.path, sep="\\n")
print(*(one.message for one in caught if "scout_hf" in str(one.message)), sep="\\n")
"""


def run_outside(python, folder, **environment):
    """Generate in another environment: the files that were used, and what scout_hf warned of."""
    # The dependencies come from this environment, behind the new one's own packages on the path.
    code = RUN.format(libraries=[path for path in sys.path if path.endswith("-packages")])
    left = {name: value for name, value in os.environ.items() if not name.startswith("SCOUT_HF_")}
    command = [str(python), "-c", code]
    ran = subprocess.run(command, cwd=folder, env=left | environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    return lines[:3], [line for line in lines[3:] if line]


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The Python of an environment that holds what `pip install .` puts there, and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", str(wheel)]
    subprocess.run(install, check=True, cwd=folder)
    return python


@needs_compiler
def test_runs_in_an_empty_environment(installed, tmp_path):
    files, told = run_outside(installed, tmp_path)
    assert all(file.startswith(str(installed.parents[1])) for file in files) and told == [], (files, told)


@needs_compiler
def test_runs_in_the_checkout_that_it_was_installed_from(installed, checkout):
    """Python started there finds the folder scout_hf before the installed package: its rooms lie elsewhere."""
    files, (told,) = run_outside(installed, checkout)
    assert files == [str(checkout / "scout_hf" / "__init__.py"), str(checkout / "patches" / "__init__.py"), "None"]
    assert f"{checkout} is a checkout in which it was not built" in told and "`pip install -e .`" in told


def test_runs_without_the_library(without_compiler, tmp_path):
    zipfile.ZipFile(without_compiler[0]).extractall(tmp_path)
    files, told = run_outside(sys.executable, tmp_path, PYTHONPATH=str(tmp_path))
    assert all(file.startswith(str(tmp_path)) for file in files[:2]) and files[2] == "None", files
    (one,) = told
    assert "runs without its native CPU library: it was installed without a C++ compiler" in one
