"""The stock LongBench tasks of lm-eval over local files: same names, prompts, metrics and lengths, no hub.

A folder holds LongBench's own files, ``<dataset>.jsonl`` and ``<dataset>_e.jsonl``, one JSON object per line with
``input``, ``context``, ``answers`` and, for classification, ``all_classes``. Every stock task file is included by one
that only replaces where its rows come from, in a folder for lm-eval's ``--include_path``.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from scout_hf.eval.harness import HarnessError
from scout_hf.files import parse_json

READ = "scout_hf.eval.harness.longbench.read_local"
COLUMNS = ("input", "context", "answers", "length", "dataset", "language", "all_classes", "_id")
# What a metric reads out of a row, by the name of its function; it fails without a word where that is missing.
PARAGRAPHS = {"retrieval_with": r"Paragraph (\d+)", "retrieval_zh_with": r"段落(\d+)"}


@dataclass(frozen=True)
class LocalTasks:
    """A folder for ``--include_path``, and names of the files that are not there, by task, group and tag."""

    folder: Path
    missing: dict[str, list[str]]


@contextmanager
def local_tasks(directory: Path) -> Iterator[LocalTasks]:
    """Task files for a folder of LongBench data, for the time of the block.

    Groups and tags hold the tasks whose files exist; a task without a file says so when it is asked for. HarnessError
    if the folder does not exist or holds no file of LongBench.
    """
    tasks, groups = _stock()
    data = {name: directory / f"{stock['dataset_name']}.jsonl" for name, (_, stock) in tasks.items()}
    found = {name for name, path in data.items() if path.is_file()}
    if not found:
        what = "has none of LongBench's files" if directory.is_dir() else "is no folder"
        raise HarnessError(
            f"--longbench-dir {directory} {what}: it should hold <dataset>.jsonl or <dataset>_e.jsonl, such as "
            "hotpotqa.jsonl; `scout-hf lm-eval make-data DIR` makes small ones to try"
        )

    def members(name: str) -> list[str]:
        return [task for child in groups[name][1]["task"] for task in members(child)] if name in groups else [name]

    tags: dict[str, list[str]] = {}
    for name, (_, stock) in tasks.items():
        for tag in stock.get("tag") or ():
            tags.setdefault(tag, []).append(name)
    sets = {name: members(name) for name in (*tasks, *groups)} | tags
    missing = {name: [data[task].name for task in sorted(inside) if task not in found] for name, inside in sets.items()}
    with tempfile.TemporaryDirectory(prefix="scout-hf-longbench-") as place, _quiet(place):
        folder = Path(place)
        for name, (path, stock) in tasks.items():
            # Without a tag, so that tags hold what exists.
            lines = [] if name in found else ["tag: null"]
            kwargs = {"longbench_file": str(data[name].absolute()), "metric": Path(stock["process_results"]).name}
            lines += ["dataset_path: json", "dataset_name: null", f"dataset_kwargs: {json.dumps(kwargs)}"]
            _write(folder / path.name, path, [*lines, f"custom_dataset: !function {READ}"])
        for path, stock in groups.values():
            children = [child for child in stock["task"] if found.intersection(members(child))]
            if children:
                _write(folder / path.name, path, [f"task: {json.dumps(children)}"])
        yield LocalTasks(folder, {name: absent for name, absent in missing.items() if absent})


def read_local(longbench_file: str, metric: str, **_: Any) -> dict[str, Any]:
    """Rows of a file as lm-eval's tasks expect them (``question`` instead of ``input``), by split.

    HarnessError if the file is missing, empty or malformed; it names the line.
    """
    import datasets

    path = Path(longbench_file)
    if not path.is_file():
        there = ", ".join(sorted(one.name for one in path.parent.glob("*.jsonl")))
        raise HarnessError(f"there is no file {path} for this task; the folder has {there or 'no *.jsonl'}")
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if line.strip():
            try:
                rows.append(_row(line, metric))
            except ValueError as error:
                raise HarnessError(f"{path}, line {number}: {error}") from error
    if not rows:
        raise HarnessError(f"{path} has no rows")
    return {"test": datasets.Dataset.from_list(rows)}


def _row(line: bytes, metric: str) -> dict[str, Any]:
    row = parse_json(line, infinite=True)
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object with {', '.join(COLUMNS)} is expected, this is of type {type(row).__name__}")
    # As some copies of the data have it already.
    row.setdefault("input", row.get("question"))
    for name in ("input", "context"):
        if not isinstance(row.get(name), str):
            raise ValueError(f"{name!r} must be a string, it is {row.get(name)!r:.40}")
    if not row.get("answers") or not _is_texts(row["answers"]):
        raise ValueError(f"'answers' must be a list of strings, at least one, it is {row.get('answers')!r:.40}")
    if "classification" in metric and not _is_texts(row.get("all_classes")):
        raise ValueError(f"'all_classes' must be a list of strings, it is {row.get('all_classes')!r:.40}")
    for name, pattern in PARAGRAPHS.items():
        if name in metric and not all(re.search(pattern, answer) for answer in row["answers"]):
            raise ValueError(f"'answers' must look like {pattern!r}, they are {row['answers']!r:.60}")
    return {"question" if name == "input" else name: row.get(name) for name in COLUMNS}


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _stock() -> tuple[dict, dict]:
    """Path and config of lm-eval's own task and group files, by name."""
    from lm_eval.tasks._yaml_loader import load_yaml

    tasks, groups = {}, {}
    for path in sorted(Path(str(files("lm_eval") / "tasks" / "longbench")).glob("*.yaml")):
        config = load_yaml(path, resolve_func=False)
        if "group" in config:
            groups[config["group"]] = path, config
        else:
            tasks[config["task"]] = path, config
    return tasks, groups


def _write(path: Path, stock: Path, lines: list[str]) -> None:
    path.write_text("\n".join([f"include: {json.dumps(str(stock))}", *lines]) + "\n", encoding="utf-8")


@contextmanager
def _quiet(folder: str) -> Iterator[None]:
    """Without lm-eval's warnings, one per task, that a task is replaced and that it has a reader of its own."""

    def wanted(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        replaced = "overrides existing" in text and (folder in text or "from None overrides" in text)
        return not replaced and not (text.startswith("longbench_") and "Custom kwargs can be passed" in text)

    loggers = [logging.getLogger(name) for name in ("lm_eval.tasks._index", "lm_eval.api.task")]
    for logger in loggers:
        logger.addFilter(wanted)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(wanted)
