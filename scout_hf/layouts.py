"""How the keys and values of a model lie in a store, where they are not as wide as each other.

A store holds keys and values of one width. Narrower ones are padded with zeros, which change no product of query and
key. Latent attention (MLA) caches a latent per token that its projection ``kv_b_proj`` expands to keys and values of
every head. Here the latent is what is attended: the projection of keys is applied to the query, and that of values to
the output, so that all heads share one KV head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from torch.nn.modules import module as torch_module

from scout_hf.errors import SessionError, UnsupportedModelError
from scout_hf.patches.quiet import is_bare

KV = tuple[torch.Tensor, torch.Tensor]
Call = Callable[[Any, str, torch.Tensor], torch.Tensor]
"""``call(owner, name, x)`` runs the module ``owner.name`` on ``x``."""

WIDEST = 1 << 16


def _run(owner: Any, name: str, x: torch.Tensor) -> torch.Tensor:
    made: torch.Tensor = getattr(owner, name)(x)
    return made


@dataclass(frozen=True)
class Layout:
    """Keys and values of the same width, stored as they are; the base of other layouts.

    Parameters
    ----------
    key_width, value_width : int
        Channels of keys and values as the model gives them to ``cache.update``; 0 for any.
    """

    key_width: int = 0
    value_width: int = 0

    expands = False
    """Whether the model makes other keys and values of what ``cache.update`` returned, and attends to these."""

    def stored(self, keys: torch.Tensor, values: torch.Tensor) -> KV:
        """Keys and values for the store, of what the model gave, (batch, kv_heads, tokens, width) each."""
        return keys, values

    def given(self, keys: torch.Tensor, values: torch.Tensor) -> KV:
        """What the model gave, of keys and values of the store; undoes ``stored``."""
        return keys, values

    def query(self, attn: Any, query: torch.Tensor, run: Call = _run) -> torch.Tensor:
        """The query to the keys of the store, (batch, query_heads, queries, width), of the model's own.

        ``run`` runs the attention module's parts, where these must be run.
        """
        return query

    def output(self, attn: Any, out: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """The model's output, of one over the values of the store; ``query`` is the model's own."""
        return out

    def as_json(self) -> list[Any] | None:
        """What :func:`layout_from` takes."""
        return None


PLAIN = Layout()


@dataclass(frozen=True)
class Padded(Layout):
    """The narrower of keys and values is padded with zeros."""

    def stored(self, keys: torch.Tensor, values: torch.Tensor) -> KV:
        return self._widened(keys), self._widened(values)

    def given(self, keys: torch.Tensor, values: torch.Tensor) -> KV:
        return keys[..., : self.key_width], values[..., : self.value_width]

    def query(self, attn: Any, query: torch.Tensor, run: Call = _run) -> torch.Tensor:
        return self._widened(query)

    def output(self, attn: Any, out: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        return out[..., : self.value_width]

    def as_json(self) -> list[Any]:
        return ["padded", self.key_width, self.value_width]

    def _widened(self, part: torch.Tensor) -> torch.Tensor:
        missing = max(self.key_width, self.value_width) - part.shape[-1]
        return pad(part, (0, missing)) if missing else part


@dataclass(frozen=True)
class Latent(Layout):
    """Latent and rotated part of the keys are the store's keys, the latent its values; all heads share them.

    ``key_width`` is that of the latent (kv_lora_rank), ``value_width`` that of the rotated part (qk_rope_head_dim),
    which models give in place of keys and values.
    """

    expands = True

    def stored(self, keys: torch.Tensor, values: torch.Tensor) -> KV:
        return torch.cat([keys, values.to(keys.dtype)], dim=-1), pad(keys, (0, self.value_width))

    def given(self, keys: torch.Tensor, values: torch.Tensor) -> KV:
        return keys[..., : self.key_width], keys[..., self.key_width :]

    def query(self, attn: Any, query: torch.Tensor, run: Call = _run) -> torch.Tensor:
        plain, rotated = query.split([query.shape[-1] - self.value_width, self.value_width], dim=-1)
        up = self._up(attn, query, run)[:, : plain.shape[-1]]
        return torch.cat([plain @ up, rotated], dim=-1)

    def output(self, attn: Any, out: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        up = self._up(attn, query, _run)[:, query.shape[-1] - self.value_width :]
        return out[..., : self.key_width].to(query.dtype) @ up.transpose(1, 2)

    def as_json(self) -> list[Any]:
        return ["latent", self.key_width, self.value_width]

    def _up(self, attn: Any, query: torch.Tensor, run: Call) -> torch.Tensor:
        """The weights that expand a latent, (query_heads, width of a head's plain key and value, latent)."""
        linear = getattr(attn, "kv_b_proj", None)
        if linear is None or getattr(linear, "bias", None) is not None:
            raise UnsupportedModelError(
                f"{type(attn).__name__} caches a latent, but has no kv_b_proj without bias that expands it, as the "
                "models of DeepSeek have; use the model unpatched, or report the family"
            )
        weight = getattr(linear, "weight", None)
        if not (type(linear) is torch.nn.Linear and type(weight) is torch.nn.Parameter and _runs_alone(linear)):
            # Adapters, quantised and offloaded weights: only the module itself knows its matrix.
            one = torch.eye(self.key_width, dtype=query.dtype, device=query.device)
            weight = run(attn, "kv_b_proj", one).transpose(0, 1)
        made: torch.Tensor = weight.to(query.device, query.dtype).unflatten(0, (query.shape[1], -1))
        return made


def _runs_alone(linear: torch.nn.Module) -> bool:
    return is_bare(linear) and not torch_module._has_any_global_hook()


def latent_widths(text_config: Any) -> tuple[int, int] | None:
    """Widths of latent and rotated part, if a model's config says that it has latent attention."""
    rank, rotated = (getattr(text_config, name, None) for name in ("kv_lora_rank", "qk_rope_head_dim"))
    return (rank, rotated) if rank and rotated else None


def layout_of(keys: torch.Tensor, values: torch.Tensor, latent: tuple[int, int] | None) -> Layout:
    """The layout for what a model gives to ``cache.update``; ``latent`` as of :func:`latent_widths`."""
    widths = keys.shape[-1], values.shape[-1]
    # Before transformers 5.17 these models cached expanded keys and values.
    if widths == latent and keys.shape[1] == 1:
        return Latent(*widths)
    return PLAIN if widths[0] == widths[1] else Padded(*widths)


def layout_from(told: Any, width: int) -> Layout:
    """Undo :meth:`Layout.as_json` for a store of that width; SessionError if it does not fit."""
    if told is None:
        return PLAIN
    kinds: dict[str, type[Layout]] = {"padded": Padded, "latent": Latent}
    if isinstance(told, list) and len(told) == 3 and told[0] in kinds and {type(one) for one in told[1:]} == {int}:
        key_width, value_width = told[1:]
        needed = key_width + value_width if told[0] == "latent" else max(key_width, value_width)
        if 0 < key_width < WIDEST and 0 < value_width < WIDEST and needed == width:
            return kinds[told[0]](key_width, value_width)
    raise SessionError(f"keys and values laid out as {told!r:.60} do not fit {width} channels")
