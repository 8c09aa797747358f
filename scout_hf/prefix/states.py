"""The state of one layer, cut to the blocks that a segment holds, and joined again from several segments."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from scout_hf.errors import SessionError
from scout_hf.stores.state import Pages, State, leaves

CODES = ("method", "selector", "codes")
SELECTOR = CODES[:2]
RESIDENTS = ("slots", "residents")


def cut(state: State, first: int, with_codes: bool) -> State:
    """Without the pages and codes before block ``first``, and without what can be made anew.

    Parameters
    ----------
    state : dict
        What :meth:`ScoutLayer.state_dict` of one row gave.
    first : int
    with_codes : bool
        Whether codes were made with the constants of the segment before this one, whose constants will be used.
    """

    def changed(path: tuple[str, ...], value: Any) -> Any:
        if isinstance(value, Pages):
            return value.behind(first)
        if path == CODES:
            return value[:, :, first:] if with_codes and value is not None else None
        return value

    made = _mapped(state, changed)
    if first and "selector" in made["method"]:
        made["method"]["selector"] = {CODES[-1]: made["method"]["selector"][CODES[-1]]}
    for name in RESIDENTS:
        if name in made["method"]:
            made["method"][name] = None
    return made


def paged_blocks(states: Sequence[State]) -> int:
    """Leading blocks that every layer has in pages."""
    orders = [value.order.shape[1] for state in states for _, value in leaves(state) if isinstance(value, Pages)]
    return min(orders, default=0)


def join(states: Sequence[State], ends: Sequence[int], coded: int) -> State:
    """The state of a layer from those of segments in order.

    Parameters
    ----------
    states : sequence of dict
        What :func:`cut` gave.
    ends : sequence of int
        How many pages of each are used; the last one is used wholly.
    coded : int
        Leading segments whose codes were made with the constants of the first one.

    Returns
    -------
    dict
        As of :meth:`ScoutLayer.state_dict`.

    Raises
    ------
    SessionError
        If they do not fit together.
    """
    first, last = states[0], states[-1]
    if len(states) == 1:
        return last

    def changed(path: tuple[str, ...], value: Any) -> Any:
        return _joined([_at(state, path) for state in states], ends) if isinstance(value, Pages) else value

    made = _mapped(last, changed)
    if "selector" in made["method"]:
        selector = dict(_at(first, SELECTOR))
        if selector.get("codes") is not None:
            codes = [_at(state, CODES) for state in states[:coded]]
            selector["codes"] = torch.cat(list(_run_of_codes(codes, ends, len(states))), dim=2)
        made["method"]["selector"] = selector
    return made


def constants_of(states: Sequence[State]) -> str:
    """One word for the digests' constants of all layers; empty if no layer has any digest."""
    found, some = hashlib.blake2b(digest_size=16), False
    for state in states:
        selector = state["method"].get("selector")
        if selector is None or selector.get("codes") is None:
            continue
        some = True
        found.update(str(selector["digest"]).encode())
        for path, value in leaves(selector["constants"]):
            tensor = isinstance(value, torch.Tensor)
            plain = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor else b""
            found.update(f"{path} {'' if tensor else value!r} ".encode() + plain)
    return found.hexdigest() if some else ""


def bytes_in(states: Sequence[State]) -> int:
    """Bytes that these states take in a file, about."""
    total = 0
    for state in states:
        for _, value in leaves(state):
            if isinstance(value, Pages):
                total += sum(slab.nbytes for slab in value.slabs)
            elif isinstance(value, torch.Tensor):
                total += value.nbytes
    return total


def _run_of_codes(codes: Sequence[torch.Tensor | None], ends: Sequence[int], segments: int) -> Iterator[torch.Tensor]:
    """Codes without a gap; those behind the first gap are made anew when they are wanted."""
    for place, (part, end) in enumerate(zip(codes, ends)):
        if part is None:
            return
        yield part if place == segments - 1 else part[:, :, :end]
        if part.shape[2] < end:
            return


def _joined(parts: Sequence[Any], ends: Sequence[int]) -> Pages:
    if not all(isinstance(part, Pages) for part in parts):
        raise SessionError("segments of one text hold different things")
    orders, before = [], 0
    for part, end in zip(parts, (*ends[:-1], None)):
        order = part.order[:, :end]
        if end is not None and order.shape[1] < end:
            raise SessionError(f"a segment of a text has {order.shape[1]} pages of {end}")
        orders.append(order + before)
        before += part.count
    slabs = tuple(slab for part in parts for slab in part.slabs)
    guards = tuple(guard for part in parts for guard in part.guards)
    return Pages(torch.cat(orders, dim=1), slabs, guards if len(guards) == len(slabs) else ())


def _at(state: State, path: tuple[str, ...]) -> Any:
    found: Any = state
    for name in path:
        if not isinstance(found, dict) or name not in found:
            raise SessionError(f"a segment of a text has no {'/'.join(path)}")
        found = found[name]
    return found


def _mapped(state: State, change: Callable[[tuple[str, ...], Any], Any], path: tuple[str, ...] = ()) -> State:
    made = {}
    for name, value in state.items():
        here = (*path, name)
        made[name] = _mapped(value, change, here) if isinstance(value, dict) else change(here, value)
    return made


def with_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The state of a stock layer with each tensor replaced."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: with_tensors(one, change) for name, one in value.items()}
    return type(value)(with_tensors(one, change) for one in value) if isinstance(value, (list, tuple)) else value


def one_row(tensor: torch.Tensor, row: int, rows: int) -> torch.Tensor:
    """One row of a tensor of a stock layer, if it has rows."""
    return tensor[row : row + 1] if tensor.dim() and len(tensor) == rows else tensor


def repeated(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """A tensor of one row of a stock layer for several rows with the same content."""
    return tensor.repeat_interleave(rows, dim=0) if rows > 1 and tensor.dim() and len(tensor) == 1 else tensor
