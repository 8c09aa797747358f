"""``scout-hf fidelity --model``: what is asked for, measured, shown."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from scout_hf import ConfigError, ScoutConfig
from scout_hf.diagnostics import usable_cpus
from scout_hf.errors import MissingFileError
from scout_hf.eval import tables
from scout_hf.eval.fidelity.options import Fidelity
from scout_hf.eval.language import report
from scout_hf.eval.language.load import load
from scout_hf.eval.language.reference import reference_text
from scout_hf.eval.language.study import WATCHED, Plan, study
from scout_hf.selection import make_digest

AUTO = "auto"
QUICK, WHOLE = (1, 4), (4, 8)
"""Documents of each length, and cases of each task in each."""


def run(options: Fidelity, tell: Callable[[str], Any]) -> bool:
    """True if everything was measured."""
    plan = plan_of(options)
    text = read_text(options.text)
    ask = (lambda question: True) if options.yes else ask_at_terminal
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads or len(usable_cpus()))
    try:
        model, tokenizer = load(str(options.model), ask, tell)
        record = study(model, tokenizer, str(options.model), text, plan, options.out, options.fresh, tell)
    finally:
        torch.set_num_threads(before)
    tables.show(report.tables(record))
    tell(report.save_plot(record, options.out / "language.png"))
    return True


def plan_of(options: Fidelity) -> Plan:
    """What the options ask for; ConfigError before anything is loaded."""
    documents, each = QUICK if options.quick else WHOLE
    for digest in _listed(options.digest):
        if digest != AUTO:
            make_digest(digest)  # ConfigError for a name there is not
    settings = [
        ScoutConfig(budget=budget, digest=digest, split=split, monitor=WATCHED)
        for split, digest, budget in product(_listed(options.split), _listed(options.digest), _budgets(options.budget))
    ]
    lengths = tuple(_whole(one, "--tokens") for one in _listed(options.tokens))
    return Plan(lengths, documents, options.questions or each, options.seed, tuple(settings))


def read_text(files: Sequence[Path]) -> str:
    """Of all files, one after the other; without any, the reference of Python."""
    if not files:
        return reference_text()
    for path in files:
        if not path.is_file():
            raise MissingFileError(f"--text {path} is not there, or no file")
    return "\n\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files)


def ask_at_terminal(question: str) -> bool:
    """Yes or no; ConfigError where nobody can be asked."""
    if not sys.stdin.isatty():
        raise ConfigError(f"{question} There is nobody to ask: say --yes")
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def _listed(text: str) -> list[str]:
    return [one.strip() for one in text.split(",") if one.strip()]


def _budgets(text: str) -> list[int | float | None]:
    found: list[int | float | None] = []
    for one in _listed(text):
        try:
            found.append(None if one == "none" else float(one) if "." in one else int(one))
        except ValueError as error:
            raise ConfigError(f"--budget {one} is not allowed: tokens (512), a share (0.06) or none") from error
    return found


def _whole(text: str, option: str) -> int:
    if not text.isdecimal() or not int(text):
        raise ConfigError(f"{option} {text} is not allowed: whole numbers of tokens, such as 4096,8192")
    return int(text)
