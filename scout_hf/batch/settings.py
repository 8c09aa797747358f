"""What decides an answer beside its prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import GenerationConfig

from scout_hf import CACHE, ConfigError, ScoutConfig

OURS = frozenset(
    {CACHE, "max_new_tokens", "num_return_sequences", "pad_token_id", "return_dict_in_generate", "use_cache"}
)


@dataclass(frozen=True)
class Settings:
    """Settings of all rows of a run; a run is resumed with the same ones alone.

    Attributes
    ----------
    max_new_tokens : int
        Most tokens of an answer.
    chat : bool
        Whether a ``prompt`` is what a user says, and goes through the chat template of the tokenizer. A row with
        ``messages`` always does.
    seed : int
        Of sampling. Each row has its own random numbers, whichever worker takes it.
    patch : dict
        Settings of :func:`scout_hf.patch`, such as ``budget``.
    generate : dict
        Arguments of ``generate()``, such as ``do_sample`` and ``temperature``. Without ``do_sample`` the likeliest
        token is taken, whatever the model's own generation config says.
    model : str
        What the model is called. By default what the tokenizer was loaded from.

    Raises
    ------
    ConfigError
        If a value is not allowed.

    Examples
    --------
    >>> from scout_hf.batch import Settings
    >>> Settings(max_new_tokens=64, patch={"budget": 512}).config.budget
    512
    """

    max_new_tokens: int = 256
    chat: bool = False
    seed: int = 0
    patch: Mapping[str, Any] = field(default_factory=dict)
    generate: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name}={value!r} is not allowed: {name} takes a whole number from {least} up")
        known = GenerationConfig()
        for name, value in self.generate.items():
            if name in OURS or not hasattr(known, name):
                raise ConfigError(
                    f"generate={{{name!r}: {value!r}}} is not allowed: an argument of generate() that is not one of "
                    f"{', '.join(sorted(OURS))}; try {{'do_sample': True, 'temperature': 0.7}}"
                )
            try:
                json.dumps(value)
            except TypeError as error:
                raise ConfigError(
                    f"generate={{{name!r}: {value!r}}} is not allowed: only numbers, words and lists of them are"
                ) from error
        self.config  # noqa: B018 - ConfigError now, not in a worker

    @cached_property
    def config(self) -> ScoutConfig:
        """The settings of the patch."""
        return ScoutConfig.from_options(**self.patch)

    def as_json(self) -> dict[str, Any]:
        """All of them by one name each, as plain data."""
        own = {name: getattr(self, name) for name in ("max_new_tokens", "chat", "seed", "model")}
        config = {f"patch.{name}": value for name, value in vars(self.config).items()}
        generate = {f"generate.{name}": value for name, value in self.generate.items()}
        return json.loads(json.dumps({**own, **config, **generate}, default=repr))
