"""Blocks of the host on their way to the device, for methods that compute there alone."""

from __future__ import annotations

from typing import Any

import torch

from scout_hf.stores import PagedKV
from scout_hf.stores.link import Mark


class Coming:
    """Keys and values that are under way; ``wait`` once, then ``give_back``.

    Attributes
    ----------
    first, last : int
        Blocks, from and before.
    heads : slice
        KV heads.
    nbytes : int
        What crosses the link.
    """

    def __init__(self, first: int, last: int, heads: slice, buffer: torch.Tensor, ticket: Any, staging):
        self.first, self.last, self.heads, self.nbytes = first, last, heads, buffer.nbytes
        self._buffer, self._ticket, self._staging = buffer, ticket, staging

    def wait(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, (batch, heads, tokens, head_dim) each, valid until ``give_back``."""
        mark = self._ticket.wait()
        if isinstance(mark, Mark):
            mark.before(self._buffer.device)
        return self._buffer[0].flatten(2, 3), self._buffer[1].flatten(2, 3)

    def give_back(self) -> None:
        """The device has been given all work on it."""
        self._staging.give_back(self._buffer)

    def drop(self) -> None:
        """Nobody will use it; returns when nothing writes to it any more."""
        self._ticket.drain()
        self.give_back()


def bring(step, host: PagedKV, first: int, last: int, heads: slice, device: torch.device, gbps=None) -> Coming:
    """Start copying blocks ``first:last`` of some KV heads of every row to the device.

    Parameters
    ----------
    step : Step
        Its cache's staging memory takes them.
    host : PagedKV
        Neither changed nor cropped until the copy has been waited for or dropped.
    gbps : float or None
        Limit of an emulated link.
    """
    start, stop, _ = heads.indices(host.heads)
    shape = (2, host.batch, stop - start, last - first, host.block_size, host.head_dim)
    staging = step.cache.staging
    buffer = staging.take(shape, host.dtype, device)
    try:
        ticket = None
        if device.type == "cpu" and host.library is not None:
            ticket = step.backend.copy(*_places(host, first, last, start, stop, buffer), keep=(buffer, host.memory()))
        if ticket is None:
            free = step.links.mark(device)
            ticket = step.movers.submit(_copy, host, first, last, start, stop, buffer, step.links, free)
    except BaseException:
        staging.give_back(buffer)
        raise
    return Coming(first, last, heads, buffer, step.links.limit(ticket, buffer.nbytes, gbps), staging)


def _places(host: PagedKV, first: int, last: int, start: int, stop: int, buffer: torch.Tensor):
    """Addresses of the tiles, keys then values, where each goes, and the bytes of one."""
    tile = host.block_size * host.head_dim * buffer.element_size()
    pages = host.table.addresses[:, None, first:last]
    heads = torch.arange(start, stop, device="cpu")[None, :, None] * (2 * tile)
    keys = (pages + heads).flatten()
    sources = torch.cat([keys, keys + tile])
    targets = torch.arange(len(sources), device="cpu") * tile + buffer.data_ptr()
    return sources, targets, tile


def _copy(host: PagedKV, first: int, last: int, start: int, stop: int, buffer: torch.Tensor, links, free: Mark) -> Mark:
    """The same through torch; to another device by way of pinned memory and a stream beside, once ``free``."""
    keys, values = host.read(first * host.block_size, last * host.block_size)
    keys, values = (part[:, start:stop].unflatten(2, (-1, host.block_size)) for part in (keys, values))
    if buffer.device.type == "cpu":
        buffer[0].copy_(keys)
        buffer[1].copy_(values)
        return Mark()
    pinned = torch.empty(buffer.shape, dtype=buffer.dtype, pin_memory=True)
    pinned[0].copy_(keys)
    pinned[1].copy_(values)
    with links.beside("bring", buffer.device, buffer, after=free) as mark:
        buffer.copy_(pinned, non_blocking=True)
    return mark
