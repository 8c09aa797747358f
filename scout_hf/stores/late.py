"""Whether CPU attention of a step came too late for the device, or failed; asked before the step's end."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from scout_hf.errors import CacheStateError
from scout_hf.stores.streams import Links, Mark


class LateShares:
    """Words in host memory that a device, or a job, sets when the CPU's share of a layer is not in its output.

    One object per cache. A device goes on with whatever was in memory, because a stream cannot raise; so every decode
    step looks at these words before it ends.
    """

    def __init__(self) -> None:
        self._words: dict[torch.device, tuple[torch.Tensor, ctypes.c_int64]] = {}
        self._ends: list[Mark] = []

    def word(self, device: torch.device) -> torch.Tensor:
        """The word of a device, (1,) of int64, 0 while all is well; pinned if it is a GPU."""
        if device not in self._words:
            word = torch.zeros(1, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
            if device.type == "cuda":
                word.to(device, non_blocking=True)  # the pinned-memory allocator then waits for this stream
            self._words[device] = word, ctypes.c_int64.from_address(word.data_ptr())
        return self._words[device][0]

    def mark(self, links: Links) -> None:
        """Note the end of what was launched so far, which :meth:`found` waits for."""
        self._ends = [links.mark(device) for device in self._words]

    def found(self) -> int:
        """Wait for the step's last layer. The number of a late job, a negative status of a failed one, or 0."""
        ends, self._ends = self._ends, []
        for end in ends:
            end.finish()
        return next((here.value for _, here in self._words.values() if here.value), 0)

    @staticmethod
    def error(late: int) -> CacheStateError:
        """What to raise for what :meth:`found` returned."""
        if late < 0:
            return CacheStateError(
                f"CPU attention of a layer failed in the native library (status {late}), and the step was taken back; "
                "please report this, or use hand_over='join'"
            )
        return CacheStateError(
            f"CPU attention number {late} of a layer timed out, and the step was taken back: did its threads get no "
            "core, or was the process stopped? Take the step again, or use hand_over='join', which never gives up"
        )

    def forget(self) -> None:
        """All is well again: the step was taken back, and its jobs have ended."""
        for _, here in self._words.values():
            here.value = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> LateShares:
        return LateShares()
