"""Prefills a document again with other settings without computing its attention again."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional


class AttentionMemo:
    """Keeps torch's attention outputs of whole prompts, and returns them for bitwise equal queries, keys and values.

    Prefill is exact with all settings, so its attention outputs are equal. Everything else of a pass (projections,
    stores, digests, residents) runs as usual. At most ``room`` bytes are kept; the oldest are dropped first.
    """

    def __init__(self, room: int = 1 << 30):
        self.room, self.used = room, 0
        self.hits = self.misses = 0
        self._held: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    @contextmanager
    def active(self) -> Iterator[AttentionMemo]:
        """Within this, models with ``sdpa`` attention, patched or not, read through the memo.

        It is below that implementation, in torch's function: transformers' own table stays as it is, which ``patch``
        holds to be plain by what is in it.
        """
        stock = functional.scaled_dot_product_attention

        def attention(query, key, value, attn_mask=None, dropout_p=0.0, *rest, **kwargs):
            # Steps are never the same twice, and a masked or trained pass is not what this is for.
            if query.dim() != 4 or query.shape[2] < 2 or attn_mask is not None or dropout_p or query.requires_grad:
                return stock(query, key, value, attn_mask, dropout_p, *rest, **kwargs)
            name = _name((query, key, value), (rest, sorted(kwargs.items())))
            out = self._held.get(name)
            if out is None:
                out = stock(query, key, value, attn_mask, dropout_p, *rest, **kwargs)
                self._keep(name, out)
                self.misses += 1
            else:
                self._held.move_to_end(name)
                self.hits += 1
            return out.clone()

        functional.scaled_dot_product_attention = attention
        try:
            yield self
        finally:
            functional.scaled_dot_product_attention = stock

    def _keep(self, name: bytes, out: torch.Tensor) -> None:
        self._held[name] = out.clone()
        self.used += out.nbytes
        while self.used > self.room:
            self.used -= self._held.popitem(last=False)[1].nbytes


def _name(tensors: tuple[torch.Tensor, ...], settings: object) -> bytes:
    mark = hashlib.sha1(repr((settings, [(part.shape, part.dtype) for part in tensors])).encode())
    for part in tensors:
        mark.update(part.contiguous().view(torch.uint8).numpy())
    return mark.digest()
