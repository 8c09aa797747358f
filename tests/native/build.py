"""Builds a test program together with the sources of the native CPU library.

``python tests/native/build.py FOLDER [flags ...]`` builds ``grid.cpp`` by hand; ``$CXX`` names another compiler.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "scout_hf" / "kernels" / "cpu" / "native"
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
# Each instruction set is a file with flags of its own, so that nothing else in the program needs such a machine.
ISA_FLAGS = {
    "isa_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "isa_avx512": _AVX512,
    "isa_avx512bf16": [*_AVX512, "-mavx512vnni", "-mavx512bf16", "-mavx512vbmi"],
}


def find_compiler() -> list[str]:
    """The compiler to call: ``$CXX``, or what the system has; [] if it has none."""
    given = shlex.split(os.environ.get("CXX", ""))
    return given or next(([found] for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), [])


def build(
    folder: Path,
    *flags: str,
    program: Path = HERE / "grid.cpp",
    compiler: list[str] | None = None,
    sources: Path = SOURCES,
    only: tuple[str, ...] = (),
    libraries: tuple[Path, ...] = (),
) -> Path:
    """Compile ``program`` and the ``sources`` (``only`` those) into ``folder``; the path of the executable.

    ``libraries`` are linked to it, and found where they are.

    RuntimeError with the compiler's messages if it fails.
    """
    compiler = compiler or find_compiler()
    machine = subprocess.run([*compiler, "-dumpmachine"], capture_output=True, text=True, check=True).stdout
    common = ["-std=c++17", "-pthread", "-fno-math-errno", "-I", str(sources), *flags]

    def compile_one(source: Path) -> tuple[Path, str]:
        own = ISA_FLAGS.get(source.stem, []) if machine.startswith("x86_64") else []
        target = folder / f"{source.stem}.o"
        return target, _run([*compiler, *common, *own, "-c", str(source), "-o", str(target)])

    # The longest first.
    wanted = [path for path in sources.glob("*.cpp") if not only or path.stem in only]
    files = [program, *sorted(wanted, key=lambda path: (not path.stem.startswith("isa_"), path.stem))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, files))
    executable = folder / program.stem
    found = [word for path in libraries for word in (str(path), f"-Wl,-rpath,{path.parent}")]
    link = [*compiler, *common, *(str(target) for target, _ in objects), *found, "-o", str(executable), "-ldl"]
    messages = "".join(text for _, text in objects) + _run(link)
    if messages:
        print(messages, file=sys.stderr)
    return executable


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stderr


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    print(build(Path(sys.argv[1]), *(sys.argv[2:] or ["-O2"])))
