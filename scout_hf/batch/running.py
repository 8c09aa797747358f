"""A whole run: rows in, groups, workers, rows out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scout_hf.batch.groups import Group, grouped, spread
from scout_hf.batch.ledger import Ledger
from scout_hf.batch.prompts import Prompt, prompts_of
from scout_hf.batch.ray_workers import RayWorkers, answers_on_ray, must_have_ray
from scout_hf.batch.rows import Row, check_kind, read_rows
from scout_hf.batch.settings import Settings
from scout_hf.batch.worker import Recipe, Result, Worker
from scout_hf.errors import ConfigError
from scout_hf.prefix import PrefixStore


@dataclass(frozen=True)
class Done:
    """What a run did.

    Attributes
    ----------
    rows : int
        In the output.
    failed : int
        Of these, rows with an error.
    answered : int
        Rows of this run; the others were there.
    groups : int
        Groups that share a beginning, among them.
    prompt_tokens : int
        Of the rows of this run.
    read_tokens, found_tokens : int
        Of these, tokens that were read, and that the store had. The rest is shared within groups.
    """

    rows: int
    failed: int
    answered: int
    groups: int
    prompt_tokens: int
    read_tokens: int
    found_tokens: int


def run(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    tokenizer: Any,
    load: Callable[[], Any],
    settings: Settings | None = None,
    *,
    store: PrefixStore | str | os.PathLike[str] | None = None,
    keep_all: bool = False,
    ray: RayWorkers | None = None,
    retry_failed: bool = False,
) -> Done:
    """Answer the prompts of a file.

    Prompts that begin alike go to one worker, which reads what they share once, and keeps it in the store. A run that
    was interrupted or killed goes on where it was, when it is called again.

    Parameters
    ----------
    source : path-like
        JSON Lines or Parquet; each row has a ``prompt`` (a text) or ``messages`` (of a chat), and may have an ``id``.
    target : path-like
        JSON Lines or Parquet: ``id``, ``answer``, ``error``, ``prompt_tokens``, ``new_tokens``, ``key``, in the order
        of the source. It appears when all rows are done; until then they are in a file beside it, whose name ends in
        ``.part``.
    tokenizer : PreTrainedTokenizer
    load : callable
        Returns the model, in eval mode. Called once in each worker, and on Ray sent to other processes.
    settings : Settings, optional
    store : PrefixStore, path-like or None
        A folder, on Ray one of each machine. None: each prompt is read from its first token on.
    keep_all : bool
        Whether the store keeps whole prompts, not only what several of them begin with.
    ray : RayWorkers or None
        None: in this process.
    retry_failed : bool
        Whether rows that are there with an error are answered again.

    Returns
    -------
    Done

    Raises
    ------
    ConfigError
        If a file or setting is not allowed, or what is there was answered for other prompts or with other settings.
    BatchError
        If the workers end. What was finished is kept.
    OSError
        If the disk is full.

    Examples
    --------
    >>> from scout_hf.batch import Settings, run
    >>> done = run("prompts.jsonl", "answers.jsonl", tokenizer, lambda: model, Settings(max_new_tokens=8), store="kv")
    >>> done.failed
    0
    """
    source, target, settings = Path(source), Path(target), _named(settings or Settings(), tokenizer)
    if ray is not None:
        must_have_ray()
    check_kind(target)
    if source.absolute() == target.absolute():
        raise ConfigError(f"{source} is both input and output; name another output")
    rows = read_rows(source)
    if not rows:
        raise ConfigError(f"{source} holds no rows; give one with a prompt in each row")
    with Ledger.opened(target, settings) as ledger:
        prompts = prompts_of(rows, tokenizer, settings)
        ledger.refuse_others(prompts)
        done = {name for name, row in ledger.rows.items() if row["error"] is None or not retry_failed}
        waiting = {one.index: one for one in prompts if one.id not in done}
        groups = _groups(prompts, waiting, settings, store)
        recipe = Recipe(load, settings, store, keep_all, _pad(tokenizer))
        read = found = 0
        with tqdm(total=len(prompts), initial=len(prompts) - len(waiting), unit="row", disable=None) as bar:
            for result in _results(groups, waiting, recipe, ray):
                ledger.add(_row(waiting[result.index], result, tokenizer), result.weights)
                read, found = read + result.read, found + result.found
                bar.update()
        ledger.finish(prompts)
        return Done(
            rows=len(prompts),
            failed=sum(row["error"] is not None for row in ledger.rows.values()),
            answered=len(waiting),
            groups=sum(group.shared > 0 for group in groups),
            prompt_tokens=sum(len(one.ids) for one in waiting.values()),
            read_tokens=read,
            found_tokens=found,
        )


def _named(settings: Settings, tokenizer: Any) -> Settings:
    return settings if settings.model else replace(settings, model=str(getattr(tokenizer, "name_or_path", "")))


def _groups(prompts: Sequence[Prompt], waiting: dict[int, Prompt], settings: Settings, store: Any) -> list[Group]:
    """Groups of all prompts, so that a run goes on with the same ones, of which those that wait are left."""
    readable = [one for one in prompts if one.error is None]
    if store is None:
        return [Group((one,), 0) for one in readable if one.index in waiting]
    made = []
    for group in grouped(readable, settings.config.block_size):
        left = tuple(one for one in group.prompts if one.index in waiting)
        made += [Group(left, group.shared)] if left else []
    return made


def _results(
    groups: list[Group], waiting: dict[int, Prompt], recipe: Recipe, ray: RayWorkers | None
) -> Iterator[Result]:
    yield from (Result(one.index, error=one.error) for one in waiting.values() if one.error is not None)
    groups = spread(groups, ray.workers if ray else 1, recipe.settings.max_new_tokens)
    if not groups:
        return
    if ray is not None:
        yield from answers_on_ray(groups, recipe, ray)
        return
    worker = Worker(recipe)
    for group in groups:
        yield from worker.answers(group)


def _row(prompt: Prompt, result: Result, tokenizer: Any) -> Row:
    answer = None if result.error is not None else tokenizer.decode(result.tokens, skip_special_tokens=True)
    return {
        "id": prompt.id,
        "answer": answer,
        "error": result.error,
        "prompt_tokens": len(prompt.ids),
        "new_tokens": len(result.tokens),
        "key": prompt.key,
    }


def _pad(tokenizer: Any) -> int | None:
    pad = tokenizer.pad_token_id
    return tokenizer.eos_token_id if pad is None else pad
