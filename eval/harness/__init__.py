"""lm-eval with scout_hf: the model class ``scout``, LongBench from local files, stock and Scout side by side.

>>> import lm_eval
>>> import scout_hf.eval.harness
>>> lm_eval.simple_evaluate(model="scout", model_args="pretrained=...,budget=2048", tasks=["longbench_hotpotqa"])

Importing this package registers the model class where lm-eval is installed, and imports nothing heavy.
"""

from __future__ import annotations

import importlib.util
from typing import Any

INSTALL = "lm-eval is not installed: pip install 'scout_hf[eval]' brings it, with what the metrics of LongBench need"

if importlib.util.find_spec("lm_eval") is not None:
    # A registry with anything in it is not filled with lm-eval's own models later.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.registry import model_registry

    if "scout" not in model_registry:
        model_registry.register("scout", target=f"{__name__}.model:ScoutLM")


class HarnessError(ValueError):
    """What was asked of the harness cannot be done; the message says why and what to try."""


def __getattr__(name: str) -> Any:
    if name != "ScoutLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError(INSTALL)
    from scout_hf.eval.harness.model import ScoutLM

    return ScoutLM
