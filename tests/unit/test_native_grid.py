"""The native CPU library against double precision, by a separate program: plain, under sanitizers, and for Arm.

The program is ``tests/native/grid.cpp``; run by hand it does more (``--cases``, ``--full``). By default it calls the
package's library, and is built whole once, under AddressSanitizer and without optimisation, which takes a third of the
time and finds the same.
"""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from tests.native.build import HERE, SOURCES, build, find_compiler

ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
# Without it a sanitizer prints what it found and continues.
STOP = "-fno-sanitize-recover=all"
BOUNDS = ("-fsanitize=address,undefined", STOP)

needs_compiler = pytest.mark.skipif(not find_compiler(), reason="there is no C++ compiler here")


def run(command, seconds=300, **environment):
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=seconds,
        # More threads than cores must not spin.
        env={**os.environ, "OMP_WAIT_POLICY": "passive", **environment},
    )
    print(done.stdout)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def sanitized(folder, *flags, optimised="-O1", **options):
    """Build with sanitizers, or skip where the compiler comes without their libraries."""
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    program = [*find_compiler(), *flags, str(probe), "-o", str(folder / "probe")]
    linked = subprocess.run(program, capture_output=True, text=True)
    if linked.returncode or subprocess.run([folder / "probe"], capture_output=True).returncode:
        pytest.skip(f"{' '.join(flags)} does not work here: {linked.stderr[-300:]}")
    return build(folder, optimised, "-g1", *flags, **options)


@needs_compiler
def test_every_instruction_set_of_the_package_is_right(tmp_path):
    built = next(iter(SOURCES.parent.glob("_scout_cpu*.so")), None)
    if built is None:
        pytest.skip("the package's library was not built")
    run([build(tmp_path, "-O1", only=("none",), libraries=(built,)), "--cases", 400])


@needs_compiler
@pytest.mark.full
def test_every_instruction_set_is_right(tmp_path):
    run([build(tmp_path, "-O2")])


@needs_compiler
def test_nothing_is_read_or_written_out_of_bounds(tmp_path):
    run([sanitized(tmp_path, *BOUNDS, optimised="-O0"), "--cases", 25])


@needs_compiler
@pytest.mark.full
def test_optimised_code_stays_within_bounds(tmp_path):
    run([sanitized(tmp_path, *BOUNDS), "--cases", 150])


@needs_compiler
@pytest.mark.full
def test_threads_do_not_race(tmp_path):
    run([sanitized(tmp_path, "-fsanitize=thread"), "--cases", 60, "--isa", "base"])


@needs_compiler
def test_the_pool_does_not_race(tmp_path):
    stress = HERE / "pool_stress.cpp"
    if not stress.exists():
        pytest.skip("there is no pool_stress.cpp")
    run([sanitized(tmp_path, "-fsanitize=thread", program=stress, only=("pool",)), 4, 1])


@pytest.mark.skipif(
    not (shutil.which(ARM_COMPILER) and shutil.which(ARM_EMULATOR)),
    reason=f"needs {ARM_COMPILER} and {ARM_EMULATOR}",
)
@pytest.mark.full
def test_arm_is_right(tmp_path):
    program = build(tmp_path, "-O2", "-static", "-DGRID_STATIC", compiler=[ARM_COMPILER])
    assert "base neon" in run([ARM_EMULATOR, program, "--cases", 60])
