"""The padding mask of a batch, kept on the host, so that decode steps need not read it from the device."""

from __future__ import annotations

from typing import Any

import torch

from scout_hf.errors import UnsupportedInputError
from scout_hf.stores.streams import Mark

SPARE_TOKENS = 256


class Padding:
    """The padding mask of a cache's tokens. Copies of the cache start without one.

    A mask on a GPU is read once. After that each decode step assumes one more real token per row and no other change.
    This is compared on the GPU, and the result is read one step later.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Forget the mask, since rows have changed."""
        # Without a last mask the other attributes are not used.
        self._last: torch.Tensor | None = None
        self._tokens = -1
        self._known: torch.Tensor | None = None
        self._compared: tuple[torch.Tensor, Mark] | None = None

    def of(self, mask: torch.Tensor | None, rows: int, tokens: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The padding mask of a forward pass, on its own device and on the CPU; None without padding.

        Parameters
        ----------
        mask : Tensor (batch, tokens) or None
            The ``attention_mask`` of the model.
        rows, tokens : int
            Rows of the inputs; tokens per row, cached ones included.

        Returns
        -------
        tuple of Tensor (batch, tokens) of bool, or None
            False for padding.

        Raises
        ------
        UnsupportedInputError
            If the mask has another size, or the mask of the previous step was not the assumed one.
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
                "the attention_mask of the last decode step was not the one before it plus one real token per row, as "
                "scout_hf assumes for masks on a GPU; the output ignored the difference. Pass such a mask on the CPU, "
                "or with a pass of several tokens"
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
