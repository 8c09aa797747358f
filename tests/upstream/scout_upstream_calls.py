"""What the generate() calls of one test gave, written down for a comparison with another arm. Changes no class."""

import contextlib

import torch
from transformers.utils import ModelOutput


class Calls:
    """One dict per call: its ``tokens``, the error it ``raised``, and per forward ``passes`` what was fed and came."""

    def __init__(self) -> None:
        self.made: list[dict] = []

    @contextlib.contextmanager
    def record(self, model: torch.nn.Module):
        call = {"tokens": None, "raised": None, "passes": []}
        self.made.append(call)

        def note(module, args, kwargs, output):
            # A compiled pass can't be looked into without compiling it otherwise.
            if torch.compiler.is_compiling() or not isinstance(getattr(output, "logits", None), torch.Tensor):
                return
            fed = kwargs.get("input_ids", args[0] if args else None)
            routed = hasattr(output, "router_logits")
            call["passes"].append({"fed": _kept(fed), "logits": _kept(output.logits), "routed": routed})

        hook = model.register_forward_hook(note, with_kwargs=True)
        try:
            yield call
        except BaseException as error:
            call["raised"] = type(error).__name__
            raise
        finally:
            hook.remove()


def tokens_of(returned: ModelOutput | torch.Tensor) -> torch.Tensor | None:
    """The sequences, in whichever way generate() was asked to return them."""
    sequences = getattr(returned, "sequences", returned)
    return _kept(sequences) if isinstance(sequences, torch.Tensor) else None


def _kept(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().cpu().clone()
