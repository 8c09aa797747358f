"""Builds the native CPU library: a plain shared object, loaded by ctypes, the same for every Python and torch.

Everything else is in pyproject.toml. Without a working C++ compiler the package installs all the same and says so at
first use.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = Path("scout_hf/kernels/cpu/native")
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-g0"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
OWN_FLAGS = {
    "isa_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "isa_avx512.cpp": AVX512,
    "isa_avx512bf16.cpp": [*AVX512, "-mavx512vnni", "-mavx512bf16", "-mavx512vbmi"],
}


def compiler() -> list[str]:
    """The C++ compiler to call, ``$CXX`` first; [] if there is none."""
    given = shlex.split(os.environ.get("CXX", ""))
    return given or next(([found] for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), [])


class BuildNative(build_ext):
    """One call of the compiler per source, since every instruction set has flags of its own."""

    def get_ext_filename(self, name: str) -> str:
        return str(Path(*name.split("."))) + (".dylib" if sys.platform == "darwin" else ".so")

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name))
        sources = [Path(source) for source in extension.sources]
        newest = max(Path(part).stat().st_mtime for part in (__file__, *extension.depends, *sources))
        beside = Path(self.get_ext_filename(extension.name))
        if self.editable_mode and not self.force and beside.exists() and beside.stat().st_mtime > newest:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(beside, target)
            return
        target.unlink(missing_ok=True)  # what an earlier build left must not pass for this one
        call = compiler()
        if not call:
            raise RuntimeError("no C++ compiler found: scout_hf will run without its native library")
        objects = Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        architectures = shlex.split(os.environ.get("ARCHFLAGS", ""))

        def compile_one(source: Path) -> str:
            made = str(objects / f"{source.stem}.o")
            # Arm has no such flags, and the x86 files are empty there.
            own = OWN_FLAGS.get(source.name, []) if platform.machine().lower() in ("x86_64", "amd64") else []
            command = [*call, *FLAGS, *architectures, "-c", str(source), "-o", made]
            try:
                run([*command, *own])
            except RuntimeError:
                if not own:
                    raise
                run(command)  # a compiler that does not know this instruction set: the file becomes empty
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = list(pool.map(compile_one, sources))
        # The library must load on machines with an older libstdc++ than this one's, and keep its own to itself.
        map_file = f"-Wl,--version-script,{NATIVE / 'scout_cpu.map'}"
        static = ["-static-libstdc++", "-static-libgcc", map_file] if sys.platform == "linux" else []
        unfinished = target.with_suffix(f".{os.getpid()}.part")
        run([*call, "-shared", *architectures, *static, *made, "-lpthread", "-lm", "-o", str(unfinished)])
        # A process that has the old file loaded keeps it.
        unfinished.replace(target)


class WheelForPlatform(bdist_wheel):
    """Tagged py3-none-<platform> with the library inside, py3-none-any where it could not be built."""

    def get_tag(self):
        built = any(Path(self.bdist_dir).rglob("_scout_cpu.*")) if Path(self.bdist_dir).exists() else True
        _, _, tag = super().get_tag()
        self.root_is_pure = not built
        return "py3", "none", tag if built else "any"


def run(command: list[str]) -> None:
    """Run a command; RuntimeError with its output if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")


class Optional(BuildNative):
    """A failed build is a warning, not an end."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            print(f"warning: the native library was not built: {error}", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        names = [Path(self.build_lib, self.get_ext_filename(extension.name)) for extension in self.extensions]
        if all(name.exists() for name in names):
            super().copy_extensions_to_source()


setup(
    ext_modules=[
        Extension(
            "scout_hf.kernels.cpu._scout_cpu",
            sources=sorted(str(path) for path in NATIVE.glob("*.cpp")),
            depends=sorted(str(path) for kind in ("*.h", "*.inl", "*.map") for path in NATIVE.glob(kind)),
        )
    ],
    cmdclass={"build_ext": Optional, "bdist_wheel": WheelForPlatform},
)
