"""The arrows of the house: which room may import what, no circles, short files, no hidden state, private stays private.

Read from the sources alone, by their syntax trees. A new rule for a room is one line of ``MAY_IMPORT``.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOMES = {"scout_hf": "scout_hf", "patches": "scout_hf.patches", "eval": "scout_hf.eval"}
"""Folders, and the packages that they are installed as."""

MOST_LINES = 450

API = (
    "scout_hf",
    "scout_hf.batch",
    "scout_hf.diagnostics",
    "scout_hf.errors",
    "scout_hf.files",
    "scout_hf.kernels",
    "scout_hf.kernels.cpu",
    "scout_hf.kernels.triton",
    "scout_hf.methods",
    "scout_hf.patches",
    "scout_hf.planner",
    "scout_hf.prefix",
    "scout_hf.rules",
    "scout_hf.selection",
    "scout_hf.session_file",
    "scout_hf.sessions",
    "scout_hf.stores",
)
"""The public and the extension API: modules whose ``__all__`` others may import; without one, all but private names."""

BASIS = ("scout_hf.errors", "scout_hf.files", "scout_hf.registry", "scout_hf.rules", "scout_hf.sizes")
"""What any room may import."""

MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "scout_hf.config": ("scout_hf.auto_budget", "scout_hf.recall_intervals"),
    "scout_hf.fusion": (),
    "scout_hf.cache": (
        "scout_hf.auto_budget",
        "scout_hf.auto_draft",
        "scout_hf.awaited",
        "scout_hf.cache_layer",
        "scout_hf.cache_reading",
        "scout_hf.cache_saving",
        "scout_hf.change_guard",
        "scout_hf.compat.*",
        "scout_hf.config",
        "scout_hf.fitting",
        "scout_hf.hybrid_layer",
        "scout_hf.indexed_layer",
        "scout_hf.kernels.*",
        "scout_hf.layouts",
        "scout_hf.methods.*",
        "scout_hf.padding",
        "scout_hf.rows",
        "scout_hf.sessions.*",
        "scout_hf.step",
        "scout_hf.stores.*",
        "scout_hf.token_log",
    ),
    "scout_hf.fitting": (
        "scout_hf.compat.*",
        "scout_hf.config",
        "scout_hf.kernels.*",
        "scout_hf.layouts",
        "scout_hf.methods.*",
        "scout_hf.ranks",
        "scout_hf.recall_intervals",
        "scout_hf.selection.*",
    ),
    "scout_hf.compat": ("scout_hf.compat.*",),
    "scout_hf.kernels": ("scout_hf.fusion", "scout_hf.kernels.*"),
    "scout_hf.stores": ("scout_hf.kernels.*", "scout_hf.stores.*"),
    "scout_hf.selection": ("scout_hf.config", "scout_hf.kernels.*", "scout_hf.selection.*", "scout_hf.stores.*"),
    "scout_hf.fused": (
        "scout_hf.changes",
        "scout_hf.config",
        "scout_hf.fused.*",
        "scout_hf.kernels.*",
        "scout_hf.patches.*",
        "scout_hf.step",
    ),
    "scout_hf.methods": (
        "scout_hf.config",
        "scout_hf.fusion",
        "scout_hf.kernels.*",
        "scout_hf.methods.*",
        "scout_hf.recall_intervals",
        "scout_hf.selection.*",
        "scout_hf.split",
        "scout_hf.step",
        "scout_hf.stores.*",
    ),
    "scout_hf.session_file": (),
    "scout_hf.sessions": ("scout_hf.ranks", "scout_hf.session_file", "scout_hf.sessions.*", "scout_hf.stores.*"),
    "scout_hf.drafting": (
        "scout_hf.cache",
        "scout_hf.compat.*",
        "scout_hf.config",
        "scout_hf.counters",
        "scout_hf.drafting.*",
        "scout_hf.methods.*",
        "scout_hf.ranks",
        "scout_hf.running",
        "scout_hf.step",
    ),
    "scout_hf.prefix": (
        "scout_hf.cache",
        "scout_hf.cache_layer",
        "scout_hf.cache_reading",
        "scout_hf.cache_saving",
        "scout_hf.compat.*",
        "scout_hf.config",
        "scout_hf.counters",
        "scout_hf.methods.*",
        "scout_hf.prefix.*",
        "scout_hf.ranks",
        "scout_hf.session_file",
        "scout_hf.sessions.*",
        "scout_hf.stores.*",
        "scout_hf.token_log",
    ),
    "scout_hf.batch": ("scout_hf", "scout_hf.batch.*", "scout_hf.prefix", "scout_hf.sessions"),
    "scout_hf.patches": ("scout_hf.compat.*", "scout_hf.patches.*", "scout_hf.ranks"),
    "scout_hf.planner": ("scout_hf.planner.*", "scout_hf.split"),
    "scout_hf.eval": (*API, "scout_hf.eval.*"),
}
"""By room, or by module: modules it may import from beside the basis; ``room.*`` with everything below."""

FOREIGN_PRIVATE = {
    "_asdict": "of named tuples, where it is public",
    "_replace": "of named tuples, where it is public",
    "_attn_implementation": "transformers has no other name for the attention that a config says",
    "_attn_implementation_internal": "the same, where a composed config must not pass it on",
    "_can_set_attn_implementation": "whether a model looks its attention up at all",
    "_global_mapping": "transformers' table of attention functions can be asked for an entry in no other way",
    "_supports_default_dynamic_cache": "which caches generate() makes for a model",
    "_buffers": "torch: what a module holds itself, without its __getattr__",
    "_parameters": "the same",
    "_modules": "the same",
    "_non_persistent_buffers_set": "torch: what is part of a checkpoint; state_dict() may change weights",
    "_save_to_state_dict": "torch: the same of one module, which may hold weights where no parameter is",
    "_forward_pre_hooks": "torch: the order of hooks that are there",
    "_forward_hooks": "the same",
    "_version": "torch: whether a weight was written to",
    "_device_mesh": "transformers has no other name for the ranks that a model is spread over",
    "_hf_hook": "accelerate: where a weight lies that is not on a device",
    "_has_any_global_hook": "torch: hooks that see every module",
    "_norm": "transformers: a part of Gemma's norm",
    "_orig_mod": "torch.compile: the module inside",
    "_C": "torch: names that are only there",
    "_cuda_endAllocateToPool": "torch: ends a capture that failed",
    "_scaled_dot_product_flash_attention": "torch: the public function gives no log-sum-exp",
    "_scaled_dot_product_flash_attention_for_cpu": "the same",
    "_name": "ctypes: the library's own path",
    "_handle": "ctypes: the library's own handle",
    "_current_frames": "sys: what another thread is doing",
    "_getframe": "sys: who called",
    "_packed_params": "torch: where a dynamically quantised layer keeps its weights",
    "_exit": "os: the end of a worker whose parent is gone",
}
"""Private attributes of other libraries that are used, and why."""

PRIVATE_ACROSS: dict[str, str] = {}
"""Private names of another room that are still used, as ``room: name``, and why."""


def _modules() -> dict[str, Path]:
    found = {}
    for folder, package in HOMES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


MODULES = _modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def room_of(module: str) -> str:
    """``scout_hf.stores`` of ``scout_hf.stores.host``; ``scout_hf`` of the modules beside the rooms."""
    if not module.startswith("scout_hf"):
        return module.split(".")[0]
    first = ".".join(module.split(".")[:2])
    return first if MODULES.get(first, Path()).name == "__init__.py" else "scout_hf"


def imports_of(module: str, everywhere: bool = True) -> Iterator[tuple[str, str]]:
    """What a module imports of the house, as (module, name); the name is empty where the module itself is imported.

    ``everywhere``: also within functions. What is imported for types alone never counts.
    """
    for node in _statements(TREES[module].body, everywhere):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                home = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
                above = home.split(".")[: len(home.split(".")) - node.level + 1]
                source = ".".join([*above, *([source] if source else [])])
            for alias in node.names:
                if f"{source}.{alias.name}" in MODULES:
                    yield f"{source}.{alias.name}", ""
                elif source in MODULES:
                    yield source, alias.name


def _statements(body: list[ast.stmt], everywhere: bool) -> Iterator[ast.AST]:
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not everywhere:
            continue
        yield node
        for name in ("body", "orelse", "finalbody", "handlers"):
            yield from _statements(getattr(node, name, []), everywhere)


def public_names(module: str) -> set[str] | None:
    """What ``__all__`` says; None without one."""
    for node in TREES[module].body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets):
            return set(ast.literal_eval(node.value))
    return None


def is_allowed(source: str, name: str, allowed: tuple[str, ...]) -> bool:
    """Whether an import of ``name`` from ``source`` (or of that module) goes along one of the arrows."""
    if any(entry.endswith(".*") and f"{source}.".startswith(entry[:-1]) for entry in allowed):
        return True
    if not name:
        # A module that its package names as public, or one of the API itself.
        home, _, last = source.rpartition(".")
        return source in allowed or (home in allowed and last in (public_names(home) or ()))
    known = public_names(source)
    return source in allowed and (not name.startswith("_") if known is None else name in known)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_along_its_arrows_only(room):
    wrong = [
        f"{module} imports {source}{':' * bool(name)}{name}"
        for module in MODULES
        if room in (module, room_of(module))
        for source, name in imports_of(module)
        if not is_allowed(source, name, BASIS + MAY_IMPORT[room])
    ]
    assert not wrong


def test_the_declared_api_is_there():
    assert set(API) <= set(MODULES)
    for package in API:
        if package != "scout_hf" and MODULES[package].name == "__init__.py":
            assert public_names(package), f"{package} declares no __all__"


def test_no_module_imports_itself_by_a_detour():
    graph = {module: {source for source, _ in imports_of(module, everywhere=False)} for module in MODULES}
    # A package's own __init__ is a part of it, and is there before its modules are.
    graph = {module: {one for one in sources if one != module} for module, sources in graph.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(" -> ".join(reversed(error.args[1]))) from None


@pytest.mark.parametrize("module", MODULES)
def test_what_is_imported_is_there(module):
    """Also within functions, whose imports nobody sees before they are called."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "scout_hf":
            assert node.module in MODULES, f"there is no {node.module}"
            there = {name for one in ast.walk(TREES[node.module]) for name in _names(one)}
            for alias in node.names:
                known = f"{node.module}.{alias.name}" in MODULES or alias.name in there or "__getattr__" in there
                assert known, f"{node.module} has no {alias.name}"


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name for alias in node.names]
    if isinstance(node, ast.Name):
        return [node.id] if isinstance(node.ctx, ast.Store) else []
    return [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []


@pytest.mark.parametrize("module", MODULES)
def test_a_file_is_short_and_holds_no_state(module):
    assert MODULES[module].read_text(encoding="utf-8").count("\n") <= MOST_LINES
    assert not [node.lineno for node in ast.walk(TREES[module]) if isinstance(node, ast.Global)]


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _defined(room: str) -> set[str]:
    """Private names that a room gives to its own classes, objects and modules."""
    found = set()
    for module, tree in TREES.items():
        for node in ast.walk(tree) if room_of(module) == room else ():
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "made", "fork"):
                    found.add(node.attr)
    return {name for name in found if _is_private(name)}


def private_reaches() -> set[str]:
    """Private names of other rooms that a room uses, as ``room: name``: attributes, imports and names in strings."""
    found = set()
    rooms = {room_of(module) for module in MODULES}
    own = {room: _defined(room) for room in rooms}
    for module, tree in TREES.items():
        room = room_of(module)
        known = own[room] | set(FOREIGN_PRIVATE)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and _is_private(node.attr) and node.attr not in known:
                # Of ``self``: what a base class of another room keeps private.
                found.add(f"{room}: {node.attr}")
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
                word = getattr(node.args[1], "value", None)
                if isinstance(word, str) and _is_private(word) and word not in known:
                    found.add(f"{room}: {word}")
        for source, name in imports_of(module):
            if _is_private(name) and room_of(source) != room:
                found.add(f"{room}: {name}")
    return found


def test_what_is_private_is_used_in_its_own_room_only():
    assert private_reaches() == set(PRIVATE_ACROSS)
    # What nobody uses any more leaves the list.
    words = " ".join(path.read_text(encoding="utf-8") for path in MODULES.values())
    assert not [name for name in FOREIGN_PRIVATE if name not in words]


# -- the check itself -----------------------------------------------------------------------------------------------


def test_an_arrow_against_the_rules_is_seen():
    allowed = MAY_IMPORT["scout_hf.eval"]
    assert is_allowed("scout_hf.eval.scoring", "score_pairs", allowed) and is_allowed("scout_hf", "patch", allowed)
    assert is_allowed("scout_hf.methods", "Method", allowed) and is_allowed("scout_hf.stores", "", allowed)
    assert not is_allowed("scout_hf.methods", "_METHODS", allowed)
    assert not is_allowed("scout_hf.stores.host", "PagedKV", allowed)
    assert not is_allowed("scout_hf.cache", "ScoutLayer", allowed) and not is_allowed("scout_hf.cache", "", allowed)


def test_imports_are_read_wherever_they_stand(monkeypatch):
    source = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from scout_hf.cache import ScoutCache
try:
    from scout_hf.stores import host
except ImportError:
    from scout_hf.stores.host import PagedKV
def late():
    from . import demo
"""
    monkeypatch.setitem(TREES, "scout_hf.eval.timeline", ast.parse(source))
    monkeypatch.setitem(MODULES, "scout_hf.eval.timeline", ROOT / "eval" / "timeline.py")
    monkeypatch.setitem(MODULES, "scout_hf.eval.demo", ROOT / "eval" / "demo" / "__init__.py")
    first = [("scout_hf.stores.host", ""), ("scout_hf.stores.host", "PagedKV")]
    assert list(imports_of("scout_hf.eval.timeline", everywhere=False)) == first
    assert list(imports_of("scout_hf.eval.timeline")) == [*first, ("scout_hf.eval.demo", "")]
