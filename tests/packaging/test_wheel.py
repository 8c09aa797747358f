"""The wheel installs into an empty environment outside the checkout and brings everything it needs along."""

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    target = tmp_path_factory.mktemp("wheel")
    build = ["wheel", str(ROOT), "--no-deps", "--no-build-isolation", "-q", "-w", str(target)]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True, cwd=target)
    (found,) = target.glob("scout_hf-*.whl")
    return found


def test_nothing_but_scout_hf_at_the_top_level(wheel):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert tops - {"scout_hf"} == {name for name in tops if name.endswith(".dist-info")}


def test_the_pocket_model_is_inside(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "scout_hf/eval/pocket/weights/model.safetensors" in names
    assert "scout_hf/eval/pocket/weights/tokenizer.json" in names


def test_imports_from_an_empty_environment(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "empty")], check=True)
    python = tmp_path / "empty" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", str(wheel)], check=True, cwd=tmp_path)
    # The dependencies come from this environment, behind the new one's own packages on the path.
    libraries = sysconfig.get_paths()["purelib"]
    code = (
        f"import sys; sys.path.append({libraries!r})\n"
        "import scout_hf, scout_hf.patches, scout_hf.eval\n"
        "from scout_hf.eval.pocket import load_pocket\n"
        "model, tokenizer = load_pocket()\n"
        "scout_hf.patch(model, budget=64).remove()\n"
        "print(scout_hf.__file__)"
    )
    ran = subprocess.run([python, "-c", code], check=True, cwd=tmp_path, capture_output=True, text=True)
    assert str(tmp_path) in ran.stdout
