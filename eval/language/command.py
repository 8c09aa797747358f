"""``scout-hf fidelity``: what is asked for, measured or read, shown, and put into a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from scout_hf import ConfigError, ScoutConfig
from scout_hf.diagnostics import usable_cpus
from scout_hf.errors import MissingFileError
from scout_hf.eval import baselines, tables  # noqa: F401 (registers the digests "oracle", "random" and "recent")
from scout_hf.eval.language import report
from scout_hf.eval.language.load import ask_at_terminal, load
from scout_hf.eval.language.plots import save_plots
from scout_hf.eval.language.reference import reference_text
from scout_hf.eval.language.study import JOURNAL, WATCHED, Plan, study
from scout_hf.eval.markdown import to_markdown, update
from scout_hf.eval.options import Fidelity
from scout_hf.eval.records import read_record
from scout_hf.eval.settings import value_of, values_of
from scout_hf.eval.text import load_text_model
from scout_hf.selection import check_digest

AUTO = "auto"
USUAL, POCKET = "smollm2-135m", "pocket text model"
MOST_CASES = 16
QUICK, WHOLE = (1, 4), (4, 8)
"""Documents of each length, and cases of each task in each."""


def run(options: Fidelity, tell: Callable[[str], Any]) -> None:
    """Measure or read, and show."""
    record = read_record(options.report, "fidelity") if options.report else _measured(options, tell)
    tables.show(report.tables(record, options.layers))
    if page := options.readme:
        made = to_markdown(report.parts(record))
        tell(f"{page} {'changed' if update(page, report.COMMAND, made) else 'is up to date'}")


def _measured(options: Fidelity, tell: Callable[[str], Any]) -> dict[str, Any]:
    plan = plan_of(options)
    text = read_text(options.text)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads or len(usable_cpus()))
    try:
        name, model, tokenizer = model_of(options, tell)
        record = study(model, tokenizer, name, text, plan, options.out, options.fresh, tell)
    except KeyboardInterrupt:
        tell(f"stopped; what was measured is in {options.out / JOURNAL}, and the same command goes on from there")
        raise
    finally:
        torch.set_num_threads(before)
    for line in save_plots(record, options.out):
        tell(line)
    return record


def model_of(options: Fidelity, tell: Callable[[str], Any]) -> tuple[str, Any, Any]:
    """Name, model and tokenizer: what was named, else the usual one, else one of the package."""
    ask = (lambda question: True) if options.yes else ask_at_terminal
    if options.model:
        return options.model, *load(options.model, ask, tell)
    try:
        return USUAL, *load(USUAL, ask, tell)
    except ConfigError as error:
        tell(f"{error}; a pocket model is studied in its place, which promises nothing for a large one")
        return POCKET, *load_text_model()


def plan_of(options: Fidelity) -> Plan:
    """What the options ask for; ConfigError before anything is loaded."""
    documents, each = QUICK if options.quick else WHOLE
    lengths = tuple(_whole(one, "--tokens") for one in _listed(options.tokens))
    if (options.questions or each) > MOST_CASES:
        raise ConfigError(f"--questions {options.questions} is not allowed: at most {MOST_CASES}; try more --documents")
    return Plan(
        lengths, options.documents or documents, options.questions or each, options.seed, tuple(settings_of(options))
    )


def settings_of(options: Fidelity) -> list[ScoutConfig]:
    """Every combination of what the options list, each once."""
    axes: dict[str, Sequence[Any]] = {
        "split": _listed(options.split),
        "cpu_query": _listed(options.cpu_query),
        "digest": _listed(options.digest),
        "budget": [_budget(one) for one in _listed(options.budget)],
    }
    axes |= values_of(options.set)
    found: list[ScoutConfig] = []
    for values in product(*axes.values()):
        config = ScoutConfig.from_options(**({"monitor": WATCHED} | dict(zip(axes, values))))
        if config.split == "off":
            config = ScoutConfig.from_options(config, cpu_query=AUTO)  # which one tier does not have
        check_digest(config.digest, None, config.mass)
        if config not in found:
            found.append(config)
    return found


def read_text(files: Sequence[Path]) -> str:
    """Of all files, one after the other; without any, the reference of Python."""
    if not files:
        return reference_text()
    for path in files:
        if not path.is_file():
            raise MissingFileError(f"--text {path} is not there, or no file")
    return "\n\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files)


def _listed(text: str) -> list[str]:
    return [one.strip() for one in text.split(",") if one.strip()]


def _budget(text: str) -> int | float | str | None:
    value = value_of(text)
    if isinstance(value, str) and value != AUTO:
        raise ConfigError(f"--budget {text} is not allowed: tokens (512), a share (0.06) or none")
    return value


def _whole(text: str, option: str) -> int:
    if not text.isdecimal() or not int(text):
        raise ConfigError(f"{option} {text} is not allowed: whole numbers of tokens, such as 4096,8192")
    return int(text)
