"""What the sources must not say, found by reading them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Of eval, what runs in a user's process; the rest has one of its own.
BESIDE_THE_USER = [ROOT / "eval" / name for name in ("baselines.py", "scoring.py", "decode_path.py")]
SOURCES = sorted(path for room in ("scout_hf", "patches") for path in (ROOT / room).rglob("*.py")) + BESIDE_THE_USER
MAKE = """arange as_tensor asarray empty empty_strided eye full linspace logspace ones rand randint randn randperm
scalar_tensor tensor tril_indices triu_indices zeros""".split()
NUMBERS = (ast.Constant, ast.UnaryOp)


def found_in(source: str, wrong) -> list[int]:
    return [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and wrong(node)]


def torch_function(call: ast.Call) -> str | None:
    """``name`` of a call ``torch.name(...)``."""
    known = isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name)
    return call.func.attr if known and call.func.value.id == "torch" else None


def follows_defaults(call: ast.Call) -> bool:
    """A tensor made with torch's default dtype or on its default device.

    Those are the user's, and another thread's that loads a model; native code gets addresses and believes the rest.
    ``*_like`` and ``new_*`` follow a tensor that is there, ``as_tensor`` takes the dtype of what is there. ``where`` of
    two numbers is of the default dtype too.
    """
    name, given = torch_function(call), {keyword.arg for keyword in call.keywords}
    if name == "where":
        return len(call.args) == 3 and all(isinstance(part, NUMBERS) for part in call.args[1:])
    needed = {"device"} if name == "as_tensor" else {"dtype", "device"}
    return name in MAKE and not (needed <= given or None in given)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_tensors_are_made_with_a_dtype_and_a_device(path):
    assert found_in(path.read_text(), follows_defaults) == []


def test_the_check_finds_what_it_is_for():
    bad = [
        "torch.empty((2, 3))",
        "torch.arange(3, device=x)",
        "torch.tensor(0.5, dtype=y)",
        "torch.where(a, 0.5, -0.5)",
    ]
    good = [
        "torch.zeros(3, dtype=y, device=x)",
        "torch.empty_like(t)",
        "torch.empty(3, **kind)",
        "torch.where(a, b, 0.0)",
    ]
    assert [found_in(source, follows_defaults) for source in bad + good] == [[1]] * 4 + [[]] * 4


@pytest.mark.parametrize("path", sorted((ROOT / "scout_hf/kernels/cpu").glob("*.py")), ids=lambda path: path.name)
def test_addresses_are_given_to_native_code_in_one_place(path):
    """Which looks at the tensor first."""
    calls = found_in(
        path.read_text(), lambda call: isinstance(call.func, ast.Attribute) and call.func.attr == "data_ptr"
    )
    assert len(calls) == (path.name == "addresses.py")
