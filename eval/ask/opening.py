"""From the options of ``read`` and ``ask`` to a store, settings and a model; all that can be wrong is told first."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from scout_hf import Handle, ScoutConfig
from scout_hf.errors import ConfigError, MissingFileError
from scout_hf.eval.ask.options import Ask, Read
from scout_hf.eval.ask.pace import Pace, in_words
from scout_hf.eval.ask.texts import Text, model_word, note
from scout_hf.eval.bench.device import find
from scout_hf.eval.language.load import ask_at_terminal, load
from scout_hf.eval.settings import single_values_of
from scout_hf.selection import check_digest
from scout_hf.sessions import fingerprint

BAR = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} tokens{postfix}"


def config_of(given: Sequence[str]) -> ScoutConfig:
    """Settings by ``--set``; ConfigError before anything is loaded."""
    config = ScoutConfig.from_options(**single_values_of(given))
    check_digest(config.digest, None, config.mass)
    return config


def device_of(name: str) -> str:
    """A device of torch; ValueError if it has none of that name."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(find(name))


def dtype_of(name: str | None) -> torch.dtype | None:
    """A floating dtype of torch by its name."""
    if name is None:
        return None
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"--dtype {name} is not allowed: a dtype of torch, such as float32 or bfloat16")
    return found


def load_model(options: Read | Ask, dtype: str | None, tell: Callable[[str], Any]) -> tuple[Any, Any]:
    """Model and tokenizer."""
    say_yes = (lambda question: True) if options.yes else ask_at_terminal
    return load(options.model, say_yes, tell, dtype_of(dtype), device_of(options.device))


def must_fit(model: Any, name: str, tokens: int, more: int = 0) -> None:
    """ConfigError if a prompt is longer than what the model was made for."""
    window = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if window and tokens + more > window:
        rest = f" and {more} for question and answer" if more else ""
        raise ConfigError(
            f"{name} has {tokens} tokens{rest}, and this model was made for {window}: try --tokens "
            f"{max(1, (window - more) // 256 * 256 - 256)}, which takes its beginning, or another model"
        )


def text_of(path: Path) -> str:
    """A file in UTF-8, without a byte order mark."""
    if not path.is_file():
        raise MissingFileError(f"{path} is not there, or no file")
    return decoded(path.read_bytes(), str(path))


def decoded(data: bytes, name: str) -> str:
    """Bytes of a text in UTF-8; ConfigError if they are something else, or nothing."""
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{name} is no text in UTF-8 (byte {error.start}); convert it first, as with iconv -t UTF-8"
        ) from error
    if not content.strip():
        raise ConfigError(f"{name} is empty; give a file with a text")
    return content


@contextlib.contextmanager
def progress(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar at the terminal, with the time that is left; yields what takes the tokens that are there."""
    pace = Pace()
    known = {"tokens": -1, "at": 0.0}
    with tqdm(total=total, desc=name, leave=False, disable=None, bar_format=BAR, unit_scale=False) as bar:

        def tick(tokens: int) -> None:
            now = time.perf_counter()
            if known["tokens"] >= 0:
                pace.add(known["tokens"], tokens, now - known["at"])
                left = pace.seconds(tokens, total)
                bar.set_postfix_str("" if left is None else f"about {in_words(left)} left", refresh=False)
            known["tokens"], known["at"] = tokens, now
            bar.update(tokens - bar.n)

        yield tick


def listed(
    handle: Handle, model: str, name: str, digest: str, ids: list[int], settings: list[str], plain: bool
) -> Text:
    """Write down in the store that this text is read with these options, so that it can be asked for by its name."""
    one = Text(
        name=name,
        model=model_word(model),
        weights=fingerprint(handle.model).key,
        root=handle.read(torch.tensor(ids[:1], dtype=torch.int64)).root,
        block_size=handle.config.block_size,
        dtype=str(handle.model.dtype).removeprefix("torch."),
        settings=settings,
        plain=plain,
        digest=digest,
        ids=ids,
    )
    return note(handle.store, one)
