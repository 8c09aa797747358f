"""Records that are read back, of any benchmark or study: checked before anything is made of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scout_hf.errors import ConfigError
from scout_hf.eval.bench import rules as bench
from scout_hf.files import read_json

REMEDY = "give a JSON file that `scout-hf bench` or `scout-hf fidelity` wrote, or leave it out"


def kind_of(record: dict[str, Any]) -> str:
    """Which benchmark a record is of; the study of fidelity does not say."""
    kind = record.get("benchmark") or ("fidelity" if "study" in record else "")
    return kind if isinstance(kind, str) else ""


def read_record(path: Path, *kinds: str) -> dict[str, Any]:
    """The record in a file, one of these kinds, or any.

    Raises
    ------
    ConfigError
        If the file is missing, too large or deep, none of these records, or lacks what its tables are made of.
    """

    def rule(found: Any) -> None:
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, not an object")
        known, kind = _rules(), kind_of(found)
        if kind not in known:
            raise ValueError("it is no result of `scout-hf bench` or `scout-hf fidelity`")
        if kinds and kind not in kinds:
            raise ValueError(f"it is a record of {kind}, and {' or '.join(kinds)} is wanted")
        known[kind](found)

    return read_json(path, rule, REMEDY)


@contextmanager
def shown(path: Path) -> Iterator[None]:
    """Within this a record is made into tables; where it does not hang together, ConfigError says of which file."""
    try:
        yield
    except (LookupError, TypeError, ArithmeticError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be shown: {type(error).__name__}: {error}; was it changed by hand, or made by another "
            "version? Make it anew"
        ) from error


def _rules() -> dict[str, Any]:
    # What a study may be of is known to those who measure it, who import torch.
    from scout_hf.eval.fidelity.report import RULE as fidelity
    from scout_hf.eval.methods.record import RULE as methods

    known = {"cpu_kernel": bench.CPU_KERNEL, "cpu_decode": bench.CPU_DECODE}
    known |= {"gpu_kernel": bench.GPU_KERNEL, "gpu_decode": bench.GPU_DECODE}
    return known | {"fidelity": fidelity, "methods": methods}
