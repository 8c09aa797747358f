"""Reading a text ahead of its questions: in chunks, from where the store knows it, and kept on the way."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from scout_hf.cache import ScoutCache
from scout_hf.compat.cache_names import CACHE
from scout_hf.compat.modes import keeps_tensors
from scout_hf.errors import ConfigError, SavingError, SessionError
from scout_hf.prefix.hashing import block_hashes
from scout_hf.prefix.keeping import Context, keep, stock_states
from scout_hf.prefix.reuse import Reuse
from scout_hf.prefix.store import Piece, warn

KEEP_TOKENS = 4096
"""Digests are fitted once and for all to so many tokens: segments of this length share their constants."""

CHUNK, CHUNK_ON_GPU = 512, 4096


@dataclass(frozen=True)
class Reading:
    """What :meth:`Handle.read` did.

    Attributes
    ----------
    cache : ScoutCache
        Holds the whole blocks of the text; ``generate()`` reads what is behind them.
    tokens : int
        Tokens in the cache.
    found : int
        How many of them the store had.
    root : str
        What the hashes of the text's blocks begin with.
    pieces : tuple of Piece
        Where the store has the text now.
    """

    cache: ScoutCache
    tokens: int
    found: int
    root: str
    pieces: tuple[Piece, ...]

    @property
    def kept(self) -> int:
        """Tokens that the store has now."""
        return self.pieces[-1].end * self.cache.scout_config.block_size if self.pieces else 0

    @property
    def size(self) -> int:
        """Bytes of the segments that hold them."""
        return sum(piece.segment.size for piece in self.pieces)


@keeps_tensors
@torch.no_grad()
def read_ahead(
    reuse: Reuse,
    model: Any,
    cache: ScoutCache,
    ids: Any,
    tick: Callable[[int], Any] = lambda tokens: None,
    must_keep: bool = True,
    chunk: int | None = None,
    every: int = KEEP_TOKENS,
) -> Reading:
    """Fill an empty cache with the whole blocks of a text; see :meth:`Handle.read`.

    ``chunk``: tokens per pass; ``every``: tokens per segment of the store. Both are rounded up to whole blocks.
    """
    size, given = (
        cache.scout_config.block_size,
        checked(ids, getattr(model.get_input_embeddings(), "num_embeddings", 1 << 62)),
    )
    tokens = given.shape[1] // size * size
    ids = given[:, :tokens].to(model.device)
    chunk = chunk or (CHUNK if model.device.type == "cpu" else CHUNK_ON_GPU)
    chunk, every = (-(-each // size) * size for each in (chunk, every))
    reuse.refuse_state()
    context, stock = reuse.context(cache.scout_config), cache.has_stock_layers
    options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    found = reuse.fill(context, cache, ids, None, tokens) if tokens else None
    kept = begun = cache.get_seq_length()
    tick(begun)
    try:
        while (here := cache.get_seq_length()) < tokens:
            stop = min(here + chunk, kept + every, tokens)
            model(input_ids=ids[:, here:stop], **{CACHE: cache}, **options, return_dict=True)
            if stop in (kept + every, tokens):
                _keep(reuse, cache, context, must_keep)
                kept = stop
            tick(stop)
    except SessionError:
        reuse.drop_damaged(found)
        raise
    except KeyboardInterrupt:
        cache.guard.end_interrupted_pass()
        if cache.guard.torn is None and cache.get_seq_length() > kept:
            _keep(reuse, cache, context, must_keep)
        raise
    hashes = block_hashes(ids[0].cpu().numpy(), size, context.root)
    pieces = reuse.store.find(context.root, hashes, context.chain, stock) if tokens else []
    return Reading(cache, tokens, begun, context.root, tuple(pieces))


def _keep(reuse: Reuse, cache: ScoutCache, context: Context, must_keep: bool) -> None:
    stock = cache.has_stock_layers
    stops = [(cache.get_seq_length(), stock_states(cache))] if stock else []
    if reuse.context(cache.scout_config) != context:
        raise ConfigError("the model's weights or adapters changed while a text was being read; read it again")
    reuse.refuse_state()
    try:
        reuse.add(keep(reuse.store, cache, context, stops))
    except (OSError, SavingError) as error:
        if must_keep:
            raise
        warn("did not keep what was read", error)


def checked(ids: Any, tokens: int) -> torch.Tensor:
    """Ids of one text as (1, tokens), for a model that knows so many tokens; ConfigError for anything else."""
    fits = isinstance(ids, torch.Tensor) and (ids.dim() == 1 or (ids.dim() == 2 and len(ids) == 1))
    if not fits or ids.dtype not in (torch.int64, torch.int32):
        given = f"shape {tuple(ids.shape)} of {ids.dtype}" if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise ConfigError(
            f"read() got {given}; it takes the token ids of one text, (tokens,) or (1, tokens), without padding: try "
            "tokenizer(text, return_tensors='pt').input_ids"
        )
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < tokens:
        raise ConfigError(
            f"read() got ids from {int(ids.min())} to {int(ids.max())}; the model knows 0 to {tokens - 1}"
        )
    return ids.view(1, -1).to(torch.int64)
