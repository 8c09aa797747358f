"""In-flight host-to-device copies, for methods that attend only on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from scout_hf.kernels.cpu import Ticket
from scout_hf.step import Step
from scout_hf.stores import PagedKV
from scout_hf.stores.staging import Staging
from scout_hf.stores.streams import Links, Mark


class InFlightCopy:
    """An in-flight copy of keys and values: ``wait`` for it or ``drain`` it, then ``give_back`` its buffer, once.

    Attributes
    ----------
    what : tuple
        Identifies the copied range, to check that it is the one needed.
    nbytes : int
        Bytes that cross the link.
    """

    def __init__(self, what: tuple[Any, ...], buffer: torch.Tensor, ticket: Ticket[Mark | None], staging: Staging):
        self.what, self.nbytes = what, buffer.nbytes
        self._buffer, self._ticket, self._staging = buffer, ticket, staging

    def wait(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, (batch, heads, tokens, head_dim) each, valid until ``give_back``."""
        mark = self._ticket.wait()
        if isinstance(mark, Mark):
            mark.before(self._buffer.device)
        return self._buffer[0], self._buffer[1]

    def give_back(self) -> None:
        """Return the buffer; all work that uses it must have been launched."""
        self._staging.give_back(self._buffer)

    def drain(self) -> None:
        """Block until nothing writes to the buffer any more; for a copy that is not used. ``give_back`` follows."""
        self._ticket.drain()


def blocks_to_device(
    step: Step, host: PagedKV, first: int, last: int, heads: slice, device: torch.device, gbps: float | None = None
) -> InFlightCopy:
    """Start copying blocks ``first:last`` of some KV heads of every row to the device.

    Parameters
    ----------
    step : Step
        Its cache's staging buffers receive the copy.
    host : PagedKV
        Must not be changed until the copy has been waited for or drained.
    first, last : int
        Blocks.
    heads : slice
        KV heads; with start and stop.
    device : torch.device
    gbps : float or None
        Bandwidth of an emulated link in GB/s.

    Returns
    -------
    InFlightCopy
        Keys and values, (batch, heads, tokens, head_dim) each.
    """
    size, dim = host.block_size, host.head_dim
    shape = (2, host.batch, heads.stop - heads.start, (last - first) * size, dim)

    host.touch(torch.arange(first, last, dtype=torch.int64, device="cpu").expand(host.batch, host.heads, -1))

    def places() -> tuple[torch.Tensor, int]:
        tile = size * dim * host.dtype.itemsize
        pages = host.table.addresses[:, None, first:last]
        numbers = torch.arange(heads.start, heads.stop, dtype=torch.int64, device="cpu")
        keys = pages + numbers[None, :, None] * (2 * tile)
        return torch.stack([keys, keys + tile]), tile

    def read(into: torch.Tensor) -> None:
        for part, whole in zip(into, host.read(first * size, last * size)):
            part.copy_(whole[:, heads])

    return _bring(step, host, (first, last, heads), shape, places, read, device, gbps)


def tokens_to_device(
    step: Step,
    host: PagedKV,
    ids: torch.Tensor,
    device: torch.device,
    gbps: float | None = None,
    real: torch.Tensor | None = None,
) -> InFlightCopy:
    """Start copying single tokens to the device; other parameters as in :func:`blocks_to_device`.

    Parameters
    ----------
    ids : Tensor (batch, kv_heads, n) of int64, on the CPU
        Token positions.
    real : Tensor (batch, kv_heads, n) of bool, or None
        Which of them to copy; keys and values are then (copied, head_dim), in the order of ``real.nonzero()``.

    Returns
    -------
    InFlightCopy
    """
    size, dim, heads = host.block_size, host.head_dim, host.heads
    offsets = (torch.arange(heads, dtype=torch.int64, device="cpu")[None, :, None] * (2 * size) + ids % size).flatten()
    host.touch(ids // size)
    picked = None if real is None else real.flatten().nonzero()[:, 0]
    shape: tuple[int, ...] = ids.shape
    if picked is not None:
        offsets, shape = offsets[picked], (len(picked),)

    def of_pages(what: torch.Tensor) -> torch.Tensor:
        found = what.gather(1, ids.flatten(1) // size).flatten()
        return found if picked is None else found[picked]

    def places() -> tuple[torch.Tensor, int]:
        row = dim * host.dtype.itemsize
        keys = of_pages(host.table.addresses) + offsets * row
        return torch.stack([keys, keys + size * row]), row

    def read(into: torch.Tensor) -> None:
        for slab, here, local in host.table.pool.by_slab(of_pages(host.table.ids)):
            if isinstance(local, slice):
                local = torch.arange(local.start, local.stop, dtype=torch.int64, device="cpu")
            flat = slab.view(-1, dim)
            rows = local * (heads * 2 * size) + offsets[here]
            into[0].view(-1, dim)[here] = flat[rows]
            into[1].view(-1, dim)[here] = flat[rows + size]

    return _bring(step, host, (), (2, *shape, dim), places, read, device, gbps)


def _bring(
    step: Step,
    host: PagedKV,
    what: tuple[Any, ...],
    shape: tuple[int, ...],
    places: Callable[[], tuple[torch.Tensor, int]],
    read: Callable[[torch.Tensor], None],
    device: torch.device,
    gbps: float | None,
) -> InFlightCopy:
    staging = step.cache.staging
    buffer = staging.take(shape, host.dtype, device)
    native = host.library is not None and not host.packed

    def copy(into: torch.Tensor) -> Ticket[None] | None:
        sources, nbytes = places()
        targets = torch.arange(sources.numel(), dtype=torch.int64, device="cpu") * nbytes + into.data_ptr()
        return step.backend.copy(sources.flatten(), targets, nbytes, keep=(into, host.memory()))

    try:
        ticket: Ticket[Mark | None] | None = copy(buffer) if native and device.type == "cpu" else None
        if ticket is None:
            ticket = step.movers.submit(
                _carry, buffer, read, copy if native else None, step.links, step.links.mark(device)
            )
    except BaseException:
        staging.lose(buffer)
        raise
    return InFlightCopy(what, buffer, step.links.limit(ticket, buffer.nbytes, gbps), staging)


def _carry(
    buffer: torch.Tensor,
    read: Callable[[torch.Tensor], None],
    copy: Callable[[torch.Tensor], Ticket[None] | None] | None,
    links: Links,
    free: Mark,
) -> Mark:
    """On a worker thread: copy to the device through pinned memory and a side stream, after ``free``."""
    if buffer.device.type == "cpu":
        read(buffer)
        return Mark()
    pinned = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu", pin_memory=True)
    ticket = None if copy is None else copy(pinned)
    if ticket is None:
        read(pinned)
    else:
        ticket.wait()
    with links.beside("bring", buffer.device, buffer, after=free) as mark:
        buffer.copy_(pinned, non_blocking=True)
    return mark
