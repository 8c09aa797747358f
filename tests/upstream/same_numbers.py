"""The same generate() calls in two arms: are the logits of every pass, and the tokens, the same?"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch

# The difference that is allowed, in parts of the largest logit of the pass.
ALLOWED = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
TIE, COMPILED, RAISED = "follow a tie", "compiled, tokens alone compared", "raise, in both arms"
EXPERTS = "compared until half precision chose other experts"


@dataclass
class Numbers:
    """Of one arm with stock: what was compared, how far apart by dtype, what differs by test, what was left out."""

    calls: int = 0
    passes: int = 0
    greatest: dict[str, float] = field(default_factory=dict)
    differ: dict[str, str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)

    def add(self, test: str, stock: list[dict], patched: list[dict]) -> None:
        """Hold the calls of one test against each other, until they part."""
        tied = False
        for number, (before, after) in enumerate(zip(stock, patched)):
            if tied:
                self.left_out[TIE] += 1
                continue
            try:
                tied = self._add_call(before, after)
            except _Differs as difference:
                self.differ[test] = f"generate() call {number}, {difference}"
                return
        if len(stock) != len(patched) and not tied:
            self.differ[test] = f"{len(stock)} generate() calls unpatched, {len(patched)} patched"

    def _add_call(self, before: dict, after: dict) -> bool:
        """Returns whether it ends in a tie, after which both arms are right and nothing is the same."""
        if before["raised"] or after["raised"]:
            if before["raised"] != after["raised"]:
                raise _Differs(f"raised unpatched: {before['raised']}, patched: {after['raised']}")
            self.left_out[RAISED] += 1
            return False
        self.calls += 1
        if not before["passes"]:
            self.left_out[COMPILED] += 1
        last = None
        for step, (one, other) in enumerate(zip(before["passes"], after["passes"])):
            if not _equal(one["fed"], other["fed"]):
                return _tie_or_differs(last, one["fed"], other["fed"], f"step {step}: fed with other tokens")
            last, here = one["logits"], other["logits"]
            if _kind(last) != _kind(here):
                raise _Differs(f"step {step}: {_kind(last)} logits unpatched, {_kind(here)} patched")
            size = _apart(last, here)
            if size > ALLOWED[last.dtype] and one["routed"] and last.dtype.itemsize == 2:
                self.left_out[EXPERTS] += 1
                return True
            self._add_pass(f"step {step}", str(last.dtype).removeprefix("torch."), size, ALLOWED[last.dtype])
        if len(before["passes"]) != len(after["passes"]):
            raise _Differs(f"{len(before['passes'])} forward passes unpatched, {len(after['passes'])} patched")
        if not _equal(before["tokens"], after["tokens"]):
            return _tie_or_differs(last, before["tokens"], after["tokens"], "at its end: other tokens returned")
        return False

    def _add_pass(self, step: str, dtype: str, size: float, allowed: float) -> None:
        self.passes += 1
        self.greatest[dtype] = max(self.greatest.get(dtype, 0.0), size)
        if not size <= allowed:
            raise _Differs(f"{step}: {dtype} logits differ by {size:.1e} of the largest, allowed {allowed:.0e}")


class _Differs(Exception):
    """Where a call first is another one, and by how much."""


def read(path: str) -> list[dict]:
    """The calls of one test as an arm wrote them down; none without a file."""
    return torch.load(path, weights_only=True) if path else []


def _tie_or_differs(logits: torch.Tensor | None, one: torch.Tensor, other: torch.Tensor, what: str) -> bool:
    """Tokens that part at the last place are a tie if the pass before gave them as good as equal logits."""
    alike = one is not None and other is not None and _equal(one[:, :-1], other[:, :-1])
    if logits is None or not alike or len(logits) != len(one):
        raise _Differs(what)
    allowed, logits = 2 * ALLOWED[logits.dtype], logits[:, -1].double()
    gaps = logits.gather(1, one[:, -1:]) - logits.gather(1, other[:, -1:])
    gap = float(gaps.abs().max() / logits.abs().max())
    if not gap <= allowed:
        raise _Differs(f"{what}, whose logits are {gap:.1e} of the largest apart")
    return True


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The greatest difference, in parts of the largest."""
    return float((one.double() - other.double()).abs().max() / one.double().abs().max())


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is other is None or (one is not None and other is not None and torch.equal(one, other))


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
