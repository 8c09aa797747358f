"""The packaged pocket model, and lm-eval without a hub and without traces outside of the test's folder."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from scout_hf.eval.pocket import WEIGHTS


@pytest.fixture(scope="session")
def pocket_path() -> str:
    """What ``pretrained=`` takes."""
    return str(WEIGHTS / "llama")


@pytest.fixture(autouse=True)
def no_traces(monkeypatch, tmp_path):
    """Caches of data sets in the test's own folder, and no hub."""
    for name, value in (("HF_HOME", tmp_path / "hf"), ("HF_DATASETS_CACHE", tmp_path / "hf" / "datasets")):
        monkeypatch.setenv(name, str(value))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    if find_spec("lm_eval") is not None:
        import datasets
        import huggingface_hub.constants

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf" / "datasets")
        for handler in logging.getLogger("lm_eval").handlers:
            if type(handler) is logging.StreamHandler:
                # Made during an earlier test, for what stderr was then.
                handler.stream = sys.stderr


@pytest.fixture(scope="session", autouse=True)
def tasks_are_read_once():
    """lm-eval reads its thousands of task files for every run, which takes seconds."""
    if find_spec("lm_eval") is None:
        yield
        return
    from lm_eval.tasks import manager

    build, default, read = manager.TaskIndex.build, Path(manager.__file__).parent, {}

    def build_once(paths, **options):
        index = {}
        for path in paths:
            if path != default or path not in read:
                read[path] = build([path], **options)
            index.update({name: replace(entry, tags=set(entry.tags)) for name, entry in read[path].items()})
        return index

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager.TaskIndex, "build", staticmethod(build_once))
        yield
