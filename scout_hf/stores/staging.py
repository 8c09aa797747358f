"""Staging buffers on the device for host-to-device copies; all layers share a few buffers."""

from __future__ import annotations

from typing import Any

import torch

GROWTH = 1.125


class Staging:
    """Reusable buffers: ``take`` one for a copy, ``give_back`` when the data was used.

    There are as many buffers as are in use at one time: two if one layer's copy overlaps with the attention of
    another. A copy of a cache gets its own.
    """

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []
        self._out: dict[int, torch.Tensor] = {}

    @property
    def used_bytes(self) -> int:
        """Bytes of all buffers, in use or not."""
        return sum(buffer.nbytes for buffer in (*self._free, *self._out.values()))

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A contiguous tensor of undefined content, reserved until ``give_back``."""
        needed = torch.Size(shape).numel() * dtype.itemsize
        fitting = [buffer for buffer in self._free if buffer.device == device and buffer.nbytes >= needed]
        if fitting:
            buffer = min(fitting, key=lambda each: each.nbytes)
        else:
            # With a margin: a growing context would otherwise need a new buffer in every block.
            buffer = torch.empty(int(needed * GROWTH) // 64 * 64 + 64, dtype=torch.uint8, device=device)
        # Drop the buffers that are too small: contexts grow.
        self._free = [each for each in self._free if each is not buffer and (fitting or each.device != device)]
        self._out[buffer.data_ptr()] = buffer
        return buffer[:needed].view(dtype).view(shape)

    def give_back(self, taken: torch.Tensor) -> None:
        """Free a buffer for reuse; on a GPU, all work that uses it must have been launched."""
        buffer = self._out.pop(taken.data_ptr(), None)
        if buffer is not None:
            self._free.append(buffer)

    def lose(self, taken: torch.Tensor) -> None:
        """Never reuse this buffer: something may still write to it."""
        self._out.pop(taken.data_ptr(), None)

    def drop_free(self) -> None:
        """Drop the buffers that are not in use."""
        self._free.clear()

    def forget(self) -> None:
        """Drop all buffers; those in use are freed with their last reference."""
        self._free.clear()
        self._out.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Staging:
        return Staging()
