"""From the options of ``scout-hf batch`` to a run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from scout_hf.batch import Done, RayWorkers, Settings, must_have_ray, run
from scout_hf.eval.ask.opening import config_of, device_of, dtype_of
from scout_hf.eval.batch.options import Batch
from scout_hf.eval.language.load import ask_at_terminal, load, load_tokenizer
from scout_hf.eval.settings import single_values_of
from scout_hf.eval.stores import open_store


def answer(options: Batch, tell: Callable[[str], Any]) -> Done:
    """Answer all rows; what came of it is told.

    ConfigError and its kin before a model is loaded, for all that can be known then; KeyboardInterrupt passes.
    """
    pool = None if options.ray is None else RayWorkers(options.ray, options.cpus, options.gpus)
    if pool is not None:
        must_have_ray()
    config_of(options.set)
    dtype_of(options.dtype)
    store = None if options.no_store else open_store(options.store, options.store_limit)
    say_yes = (lambda question: True) if options.yes else ask_at_terminal
    tokenizer = load_tokenizer(options.model, say_yes, tell)
    settings = Settings(
        options.new_tokens,
        chat=not options.plain and bool(getattr(tokenizer, "chat_template", None)),
        seed=options.seed,
        patch=single_values_of(options.set),
        generate={**({"do_sample": True} if options.sample else {}), **single_values_of(options.generate)},
        model=f"{options.model} {options.dtype}" if options.dtype else options.model,
    )
    try:
        done = run(
            options.source,
            options.out,
            tokenizer,
            functools.partial(model_of, options.model, options.dtype, options.device),
            settings,
            store=store,
            keep_all=options.keep_all,
            ray=pool,
            retry_failed=options.retry_failed,
        )
    except KeyboardInterrupt:
        tell(f"stopped; what was finished is in {options.out}.part, and the same command goes on from there")
        raise
    tell(
        f"{options.out}: {done.rows} rows, {done.failed} of them failed; of {done.prompt_tokens} tokens in "
        f"{done.answered} prompts read {done.read_tokens}, found {done.found_tokens} in the store"
        + (f", and shared the rest in {done.groups} groups" if done.groups else "")
    )
    return done


def model_of(name: str, dtype: str | None, device: str) -> Any:
    """A worker's model; packaged ones are fetched where they are missing, as the run was begun with them."""
    return load(name, lambda question: True, lambda line: None, dtype_of(dtype), device_of(device))[0]
