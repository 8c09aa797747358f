"""Device memory for what comes from the host and is used once: layers take turns in a few buffers."""

from __future__ import annotations

from typing import Any

import torch

ROOM = 1.125


class Staging:
    """Buffers that whoever brings something takes, and gives back when it was used.

    There are as many as are out at one time: two where a layer's share comes while another's is attended. One copy of
    a cache never sees another's.
    """

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []
        self._out: dict[int, torch.Tensor] = {}

    @property
    def used_bytes(self) -> int:
        """Bytes of all buffers, in use or not."""
        return sum(buffer.nbytes for buffer in (*self._free, *self._out.values()))

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A contiguous tensor of undefined content that is nobody else's until ``give_back``."""
        needed = torch.Size(shape).numel() * dtype.itemsize
        fitting = [buffer for buffer in self._free if buffer.device == device and buffer.nbytes >= needed]
        if fitting:
            buffer = min(fitting, key=lambda each: each.nbytes)
        else:
            # A context that grows would outgrow its buffer in every block.
            buffer = torch.empty(int(needed * ROOM) // 64 * 64 + 64, dtype=torch.uint8, device=device)
        # Those that are too small will be so from now on.
        self._free = [each for each in self._free if each is not buffer and (fitting or each.device != device)]
        self._out[buffer.data_ptr()] = buffer
        return buffer[:needed].view(dtype).view(shape)

    def give_back(self, taken: torch.Tensor) -> None:
        """Whoever took it is through; on a GPU, all work that uses it has been launched."""
        buffer = self._out.pop(taken.data_ptr(), None)
        if buffer is not None:
            self._free.append(buffer)

    def lose(self, taken: torch.Tensor) -> None:
        """Whoever took it cannot say whether something still writes to it: nobody gets it any more."""
        self._out.pop(taken.data_ptr(), None)

    def forget(self) -> None:
        """Let go of all buffers; those that are out go when their users do."""
        self._free.clear()
        self._out.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Staging:
        return Staging()
