"""All types of the installed transformers, checked in several processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

from tqdm import tqdm
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from scout_hf.diagnostics import usable_cpus
from scout_hf.errors import ConfigError
from scout_hf.eval.families.kinds import Found
from scout_hf.eval.families.record import nearest


def all_types() -> list[str]:
    """The types that ``AutoModelForCausalLM`` knows, sorted."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def checked(wanted: Sequence[str], jobs: int | None) -> dict[str, Found]:
    """Check these types, or all; ConfigError for one that the installed transformers does not have."""
    every = all_types()
    if strange := [name for name in wanted if name not in every]:
        raise ConfigError(
            f"{strange[0]!r} is no type of a causal language model in the installed transformers"
            f"{nearest(strange[0], every) or '; scout-hf families --check tries them all'}"
        )
    names = list(wanted) or every
    # Models are made of configs alone, and kernels of the hub would be others than a user's.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    count = min(jobs or len(usable_cpus()), len(names))
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=fresh, initializer=_begin) as pool:
        done = tqdm(pool.map(_check, names), total=len(names), disable=None, leave=False)
        return dict(zip(names, done, strict=True))


def _begin() -> None:
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()


def _check(model_type: str) -> Found:
    from scout_hf.eval.families.check import check

    return check(model_type)
