"""A pytest plugin for transformers' own tests: the same tests, with every model that generates patched first.

``SCOUT_ARM`` is the path of a JSON object: ``split`` ("off", "cpu", or null for stock), ``pressed`` (longer prompts
and answers, which fill blocks, weights that make what is attended matter, layers that attend to everything, and no
attention weights asked for, which stock attention alone can give), ``source`` (the checkout),
``only`` (test ids, or null for all) and ``results`` (where a line per test goes: its outcome and what was decoded; the
tokens and logits of its calls go beside it, one file a test).
All that is changed here is changed in the process that runs the tests, and nowhere else.
"""

import ast
import functools
import json
import os
import random
import sys
import types
from pathlib import Path

import numpy
import pytest
import torch
from scout_upstream_calls import Calls, tokens_of
from transformers import GenerationMixin, testing_utils

ARM = json.loads(Path(os.environ["SCOUT_ARM"]).read_text(encoding="utf-8"))
# The smallest blocks that there are, and one of them resident: a prompt of some tens of tokens has KV on both tiers.
SETTINGS = {"budget": None, "block_size": 8, "window": 0, "sinks": 0, "cpu_query": "real"}
LONGER, NEW_TOKENS = 24, 12
# With the tests' own 0.02 a model is so tame that its logits hardly depend on what it attends to.
WEIGHTS = dict.fromkeys(("initializer_range", "init_std"), 0.2)
MARKERS = ("generate", "slow", "not_device_test", "accelerate_tests", "torch_compile_test", "torch_export_test")
MARKERS += ("is_pipeline_test", "is_training_test", "is_tensor_parallel_test", "is_fsdp_test", "bitsandbytes")
MARKERS += ("flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "all_flash_attn_test")


class Arm:
    """What one test did so far, and the patches it is under."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.handles, self.calls, self.steps, self.refused = [], Calls(), 0, []

    def patch(self, model: torch.nn.Module) -> None:
        import scout_hf

        if "_scout_handle" in model.__dict__:
            return
        tiers = {"split": ARM["split"]} | ({"resident": 8} if ARM["split"] == "cpu" else {})
        try:
            self.handles.append(scout_hf.patch(model, **SETTINGS, **tiers))
        except scout_hf.errors.UnsupportedModelError as error:
            self.refused.append(f"{type(model).__name__}: {error}")

    def end(self) -> None:
        for handle in self.handles:
            stats = handle.stats()
            # Without a layer that attends to everything scout_hf leaves all to stock, which proves nothing pressed.
            self.steps += stats.steps if stats.layers or not ARM["pressed"] else 0
            with handle:
                pass
        self.handles = []

    def write_calls(self) -> str:
        """Returns the file's name; none where nothing was called."""
        if not self.calls.made:
            return ""
        folder = Path(ARM["results"]).with_suffix("")
        folder.mkdir(exist_ok=True)
        path = folder / f"{len(os.listdir(folder))}.pt"
        torch.save(self.calls.made, path)
        return str(path)


arm = Arm()
stock_generate = GenerationMixin.generate


@functools.wraps(stock_generate)
def generate(self, *args, **kwargs):
    if ARM["split"]:
        arm.patch(self)
    with arm.calls.record(self) as call:
        returned = stock_generate(self, *args, **kwargs)
        call["tokens"] = tokens_of(returned)
    return returned


GenerationMixin.generate = generate


def _from_checkout(name: str):
    """What the tests import and the installed release lacks, from the helpers of the release that the tests are of."""
    path = Path(ARM["source"], "src", "transformers", "testing_utils.py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body if path.exists() else ():
        names = [target.id for target in getattr(node, "targets", ()) if isinstance(target, ast.Name)]
        if name in (*names, getattr(node, "name", None)):
            exec(compile(ast.Module([node], []), str(path), "exec"), testing_utils.__dict__)
            return testing_utils.__dict__[name]
    raise AttributeError(f"transformers.testing_utils has no {name}")


testing_utils.__getattr__ = _from_checkout


def is_flaky(*given, **named):
    """In place of the decorator that tries again: seeded, a test fails or it does not."""
    return given[0] if given and callable(given[0]) else lambda test: test


testing_utils.is_flaky = is_flaky
# Of no concern here, and the part of the tests that depends most on one release.
for name in ("fsdp", "tensor_parallel", "expert_parallel", "training"):
    module = types.ModuleType(f"tests.test_{name}_mixin")
    module.__getattr__ = lambda name: type(name, (), {}) if name.endswith("Mixin") else None
    sys.modules[module.__name__] = module


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)


def pytest_collection_modifyitems(config, items):
    if ARM["only"] is not None:
        wanted = set(ARM["only"])
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in wanted])
        items[:] = [item for item in items if item.nodeid in wanted]
    if ARM["pressed"]:
        for test in {item.cls for item in items if hasattr(getattr(item, "cls", None), "has_attentions")}:
            test.has_attentions = False
            test.max_new_tokens = NEW_TOKENS
            test.setUp = _pressed(test.setUp)


def _pressed(set_up):
    @functools.wraps(set_up)
    def pressed(self):
        set_up(self)
        tester = getattr(self, "model_tester", None)
        if isinstance(getattr(tester, "seq_length", None), int):
            tester.seq_length += LONGER
        if hasattr(tester, "get_config"):
            tester.get_config = _pressing(tester.get_config)

    return pressed


def _pressing(get_config):
    """Larger weights, and no sliding window that all layers have."""

    @functools.wraps(get_config)
    def pressing(*args, **kwargs):
        config = get_config(*args, **kwargs)
        for part in {id(part): part for part in (config, config.get_text_config())}.values():
            for name in WEIGHTS.keys() & part.to_dict().keys():
                setattr(part, name, WEIGHTS[name])
            if getattr(part, "sliding_window", None) and not getattr(part, "layer_types", None):
                part.sliding_window = None
        return config

    return pressing


def pytest_runtest_setup(item):
    # Both arms test the same models with the same inputs.
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    common = sys.modules.get("tests.test_modeling_common")
    if common is not None:
        common.global_rng.seed(0)
    arm.forget()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "call":
        arm.end()
    if call.when == "call" or not report.passed:
        outcome = "xfailed" if hasattr(report, "wasxfail") and report.skipped else report.outcome
        line = {
            "test": item.nodeid,
            "outcome": outcome if call.when == "call" or report.skipped else "error",
            "calls": len(arm.calls.made),
            "record": arm.write_calls(),
            "steps": arm.steps,
            "refused": arm.refused,
            "seconds": round(call.duration, 2),
            "message": "" if report.passed else str(report.longreprtext)[-1500:],
        }
        with open(ARM["results"], "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    return report
