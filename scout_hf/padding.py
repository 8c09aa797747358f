"""Which tokens of a batch are padding, known on the host, so that no decode step has to ask the device for it."""

from __future__ import annotations

from typing import Any

import torch

from scout_hf.errors import UnsupportedInputError
from scout_hf.stores.streams import Mark

SPARE_TOKENS = 256


class Padding:
    """What a cache remembers of the masks that came with its tokens; copies of the cache begin without.

    A mask on a GPU is read once. After that one more token per row is taken to be no padding and all others to be what
    they were, which is compared on the GPU and looked at a step later.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """The rows are others now."""
        # Where there is no last mask, the others say nothing.
        self._last: torch.Tensor | None = None
        self._tokens = -1
        self._known: torch.Tensor | None = None
        self._compared: tuple[torch.Tensor, Mark] | None = None

    def of(self, mask: torch.Tensor | None, rows: int, tokens: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The mask of a forward pass as bool (batch, tokens), where it came and on the CPU; None where all are real.

        Parameters
        ----------
        mask : Tensor (batch, tokens) or None
            As the model gets it.
        rows, tokens : int
            Of the inputs; tokens per row with those that are cached.

        Raises
        ------
        UnsupportedInputError
            If the mask has another size, or in the step before was another one than taken for granted.
        """
        if mask is None:
            self.forget()
            return None, None
        _check(mask, rows, tokens)
        mask = mask.bool().contiguous()
        if not _is_far(mask):
            here = None if bool(mask.all()) else mask
            return here, here
        self._look()
        # None until all of it is known: after an error the next mask is read.
        last, self._last = self._last, None
        if last is None or tokens != self._tokens + 1 or len(last) != rows:
            here = mask.cpu()
            known = None if bool(here.all()) else here
        else:
            self._compare(mask, last)
            known = None if self._known is None else _grown(self._known, tokens)
        self._known, self._tokens = known, tokens
        self._last = mask
        return (None, None) if known is None else (mask, known[:, :tokens])

    def _compare(self, mask: torch.Tensor, last: torch.Tensor) -> None:
        same = (mask[:, :-1] == last).all() & mask[:, -1].all()
        pin = same.is_cuda
        here = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=pin).copy_(same, non_blocking=True)
        self._compared = here, Mark(torch.cuda.current_stream(same.device).record_event() if pin else None)

    def _look(self) -> None:
        if self._compared is None or not self._compared[1].done():
            return
        (same, _), self._compared = self._compared, None
        if not bool(same):
            self.forget()
            raise UnsupportedInputError(
                "the attention_mask of the last decode step was not the one before it and one real token more per row, "
                "as a mask on a GPU is taken to be; the output ignored the difference. Pass such a mask on the CPU, or "
                "with a pass of several tokens"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Padding:
        return Padding()

    def __reduce__(self) -> tuple[type[Padding], tuple[()]]:
        return Padding, ()


def _is_far(mask: torch.Tensor) -> bool:
    """Whether reading the mask would wait for a device."""
    return mask.is_cuda


def _grown(known: torch.Tensor, tokens: int) -> torch.Tensor:
    if tokens <= known.shape[1]:
        return known
    return torch.nn.functional.pad(known, (0, tokens - known.shape[1] + SPARE_TOKENS), value=True)


def _check(mask: torch.Tensor, rows: int, tokens: int) -> None:
    if mask.shape[1] != tokens:
        raise UnsupportedInputError(
            f"attention_mask covers {mask.shape[1]} tokens, the cache and the new tokens together are {tokens}; pass a "
            "mask over all of them"
        )
    if mask.shape[0] != rows:
        raise UnsupportedInputError(
            f"attention_mask has {mask.shape[0]} rows, the inputs have {rows}; pass one per row"
        )
