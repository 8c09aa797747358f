"""One type of model: built, patched, decoded and compared with stock."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch

import scout_hf
from scout_hf.errors import ScoutError, UnsupportedModelError
from scout_hf.eval.families.building import tiny_model
from scout_hf.eval.families.kinds import NAMED, PROBE, REFUSED, STOCK, UNBUILT, WRONG, Found
from scout_hf.eval.families.oracle import prediction
from scout_hf.eval.families.tiny import VOCABULARY
from scout_hf.patches import ProbeFamily, family_of

TOLERANCE, MOST = 3e-6, 2e-5
"""Of float32 logits, by the largest one where it is above 1; and where stock itself is as far from float64."""
MATTERS = 1e-3
"""By how much of the largest logit the answers differ, at least, when the beginning of the context does."""
TOKENS, PADDING, NEW = 43, (0, 9), 7

BLOCKS = {"budget": None, "layer_ahead": False, "block_size": 8}
TIERS = {"one tier": BLOCKS | {"split": "off"}, "two tiers": BLOCKS | {"split": "cpu", "window": 8, "resident": 16}}


class Fallback(Exception):
    """Why a patched model runs as stock."""


def check(model_type: str) -> Found:
    """Build a tiny model of this type, patch it, decode, and compare with stock; it never raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = tiny_model(model_type)
        except Exception as error:  # of transformers: whatever its code raises is the answer
            return Found(UNBUILT, _in_brief(error))
        known = {"model": type(model).__name__}
        try:
            family = family_of(model)
        except UnsupportedModelError as error:
            return Found(REFUSED, _in_brief(error, named=False), **known)
        try:
            stock, inputs = _stock(model)
        except Exception as error:
            return Found(UNBUILT, f"stock generate() fails: {_in_brief(error)}", **known)
        return _checked(model, family, stock, inputs, known | {"padded": "attention_mask" in inputs})


def _checked(model: Any, family: Any, stock: Any, inputs: dict[str, torch.Tensor], known: dict[str, Any]) -> Found:
    try:
        answers, layers = [], ""
        for settings in TIERS.values():
            got, layers = _patched(model, inputs, settings)
            answers.append(got)
        error = max(_difference(got, stock) for got in answers)
    except UnsupportedModelError as error:
        return Found(REFUSED, _in_brief(error, named=False), **known)
    except Fallback as error:
        return Found(STOCK, str(error), **known)
    except Exception as error:  # a patched model that fails where stock does not
        return Found(WRONG, _in_brief(error), **known)
    if not (error <= TOLERANCE or (error <= MOST and _is_rounding(model, inputs, stock, answers))):
        return Found(WRONG, f"logits differ from stock by {error:.1e}", **known)
    if not _matters(model, stock, inputs):
        return Found(UNBUILT, "its logits do not depend on the beginning of the context", **known)
    kind = PROBE if isinstance(family, ProbeFamily) else NAMED
    return Found(kind, "", error=error, layers=layers, prediction=prediction(model, family, inputs), **known)


# -- what is decoded ------------------------------------------------------------------------------------------------


def _stock(model: Any) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """What the unpatched model gives, and for which inputs: padded where it takes that."""
    try:
        return _decode(model, inputs := _inputs(padded=True)), inputs
    except Exception:
        return _decode(model, inputs := _inputs(padded=False)), inputs


def _inputs(padded: bool) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (len(PADDING), TOKENS), generator=torch.Generator().manual_seed(1))
    if not padded:
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    for row, count in enumerate(PADDING):
        ids[row, :count], mask[row, :count] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def _decode(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Tokens, and logits of every step."""
    output = model.generate(
        **inputs,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits = torch.stack(output.logits)
    if not bool(logits.isfinite().all()):
        raise ArithmeticError("its logits are not finite")
    return [output.sequences, logits]


def _patched(model: Any, inputs: dict[str, torch.Tensor], settings: dict[str, Any]) -> tuple[Any, str]:
    with scout_hf.patch(model, **settings) as handle:
        got = _decode(model, inputs)
        stats = handle.stats()
        cache = handle.new_cache()
        if not cache.scout_layers:
            kinds = sorted({type(layer).__name__ for layer in cache.layers})
            raise Fallback(f"there is nothing to keep: its cache has {' and '.join(kinds)} alone")
        if stats.stock_passes:
            raise Fallback("; ".join(stats.stock_passes))
        if stats.steps != NEW - 1:
            raise ScoutError(f"{stats.steps} decode steps went through scout_hf, not {NEW - 1}")
        return got, f"{len(cache.scout_layers)} of {cache.depth}"


def _difference(got: list[torch.Tensor], stock: list[torch.Tensor]) -> float:
    size = max(1.0, stock[1].abs().max().item())
    error = (got[1].double() - stock[1].double()).abs().max().item() / size
    return error if torch.equal(got[0], stock[0]) or error > TOLERANCE else float("inf")


def _is_rounding(
    model: Any, inputs: dict[str, torch.Tensor], stock: list[torch.Tensor], answers: list[list[torch.Tensor]]
) -> bool:
    """Whether the answers have stock's tokens, and are at most twice as far from float64 as stock is."""
    try:
        exact = _decode(copy.deepcopy(model).double(), inputs)
    except Exception:  # of transformers: not every model runs in float64
        return False
    distances = [(got[1].double() - exact[1]).abs().max().item() for got in (stock, *answers)]
    same = all(torch.equal(got[0], stock[0]) for got in (exact, *answers))
    return same and max(distances[1:]) <= 2 * distances[0]


def _matters(model: Any, stock: list[torch.Tensor], inputs: dict[str, torch.Tensor]) -> bool:
    """Whether stock answers otherwise if the first tokens of the context are others."""
    ids = inputs["input_ids"].clone()
    ids[:, : max(PADDING) + 8] = ids[:, : max(PADDING) + 8].flip(0)
    other = _decode(model, inputs | {"input_ids": ids})[1]
    return (other[0] - stock[1][0]).abs().max().item() > MATTERS * stock[1].abs().max().item()


def _in_brief(error: BaseException, named: bool = True) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:400] if named else text[:400]
