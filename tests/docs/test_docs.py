"""What the README and docs/ show is true: Python blocks run, commands parse, links lead somewhere."""

from __future__ import annotations

import shlex
import sys

import pytest
import transformers
import typer

from scout_hf.eval.bench import weights
from scout_hf.eval.pocket import load_pocket
from scout_hf.kernels import cpu
from scout_hf.methods import base
from scout_hf.patches import registry
from scout_hf.selection import digest
from tests.docs.blocks import PAGES, ROOT, blocks, commands, links, name

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")


@pytest.fixture
def pocket_for_checkpoints(monkeypatch, tmp_path):
    """Checkpoints by name are the pocket model; what a page registers or writes is gone with the test."""
    model, tokenizer = load_pocket()
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    for one in (digest._DIGESTS, base._METHODS, cpu._BACKENDS):
        monkeypatch.setattr(one, "_classes", dict(one._classes))
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name)
def test_python_blocks_run(page, pocket_for_checkpoints):
    """One page after the other, each from its first block to its last."""
    names: dict = {"__name__": "page"}
    for block in blocks(page, "python"):
        # At its line of the page, so that a failure says where.
        exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name)
def test_commands_are_known(page):
    """Options that do not exist, wrong values, missing targets and extras."""
    for line in commands(page):
        command, *arguments = shlex.split(line)
        assert command in KNOWN, f"{line!r}: say here how to check {command!r}"
        KNOWN[command](arguments)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    missing = [link for link in links(page) if not (page.parent / link).exists()]
    assert not missing


def test_a_wrong_option_is_noticed():
    with pytest.raises(Exception, match="no-such-option"):
        check_scout_hf(["plan", "--no-such-option"])
    with pytest.raises(AssertionError):
        check_make(["no-such-target"])


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180


def check_scout_hf(arguments):
    """The command line takes it; nothing is run."""
    from scout_hf.cli import app

    command, context = typer.main.get_command(app), None
    while True:
        context = command.make_context(command.name or "scout-hf", list(arguments), parent=context)
        if not hasattr(command, "resolve_command"):
            return
        _, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])


def check_make(arguments):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(f"\n{target.replace('.venv', '$(VENV)')}:" in makefile for target in arguments)


def check_pip(arguments):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    action, *what = arguments
    assert action == "install"
    wanted = {extra for one in what if "[" in one for extra in one.rstrip("]").split("[")[1].split(",")}
    assert wanted <= set(extras) and {one.split("[")[0] for one in what} <= {".", "scout_hf", "-e"}


def check_pytest(arguments):
    """The files that are named exist."""
    assert arguments[:2] == ["-m", "pytest"]
    assert all((ROOT / one).exists() for one in arguments if "/" in one)


def check_python(arguments):
    """The command line without an install, what builds the native library, an example, a benchmark that is a module."""
    if arguments[:2] == ["-m", "scout_hf"]:
        return check_scout_hf(arguments[2:])
    if arguments == ["setup.py", "build_ext", "--inplace"]:
        return
    if arguments[0].startswith("examples/"):
        assert (ROOT / arguments[0]).is_file()
        return
    assert arguments[:2] == ["-m", weights.__name__]
    app = typer.Typer()
    app.command()(weights.main)
    typer.main.get_command(app).make_context("", arguments[2:])


def check_torchrun(arguments):
    """A script of this checkout, by processes."""
    assert arguments[0] == "--nproc-per-node" and int(arguments[1]) > 1 and (ROOT / arguments[2]).is_file()


KNOWN = {
    "torchrun": check_torchrun,
    "python": check_python,
    "scout-hf": check_scout_hf,
    "make": check_make,
    "pip": check_pip,
}
KNOWN |= {".venv/bin/python": check_pytest, ".venv/bin/scout-hf": check_scout_hf}
