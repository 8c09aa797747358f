"""The study from the command line: measured or read, shown, and put into a page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scout_hf.eval.fidelity import report
from scout_hf.eval.fidelity.options import Fidelity
from scout_hf.eval.fidelity.study import study
from scout_hf.eval.fidelity.tables import COMMAND, parts
from scout_hf.eval.markdown import to_markdown, update


def run(options: Fidelity, tell: Callable[[str], Any]) -> bool:
    """True if every cell was measured."""
    if options.model:
        from scout_hf.eval.language.command import run as of_a_model

        return of_a_model(options, tell)
    record = report.load(options.report) if options.report else study(options, tell)
    report.show(record)
    if page := options.readme:
        tell(f"{page} {'changed' if update(page, COMMAND, to_markdown(parts(record))) else 'is up to date'}")
    return not record.get("failed")
