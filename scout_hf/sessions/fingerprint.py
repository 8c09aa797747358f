"""Which model a session belongs to: its config, and numbers taken out of every weight."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from scout_hf.errors import SessionError
from scout_hf.files import parse_json
from scout_hf.ranks import Ranks, here
from scout_hf.sessions.weights import weights_of

SAMPLED = 4096
"""Numbers of each weight, spread over all of it."""

EVERY_ROW = 4
"""Numbers of each row of the input embeddings."""

FACTORS = ("scaling", "attention_scaling")
"""Attributes of modules that change keys, and that somebody may have set."""

WITHOUT_EFFECT = (
    "transformers_version", "architectures", "use_cache", "dtype", "torch_dtype", "auto_map",
    "attn_implementation", "experts_implementation", "return_dict", "output_hidden_states",
    "output_attentions", "id2label", "label2id", "problem_type", "chunk_size_feed_forward", "bos_token_id",
    "eos_token_id", "pad_token_id", "tie_word_embeddings", "is_decoder", "gradient_checkpointing",
    "base_model_tp_plan", "base_model_pp_plan", "distributed_config", "gguf_file",
)  # fmt: skip
"""Entries of a config that change neither keys nor values; weights have a check of their own."""


@dataclass(frozen=True)
class Fingerprint:
    """Of one model.

    config : dict
        What of its config has an effect.
    weights : str
        A hash over names, shapes and some numbers of all weights and buffers.
    """

    config: dict[str, Any]
    weights: str

    def as_json(self) -> dict[str, Any]:
        """Both, as plain data."""
        return {"config": self.config, "weights": self.weights}

    @property
    def key(self) -> str:
        """One word for both."""
        return hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()

    def refuse(self, other: Any, what: str) -> None:
        """Raise SessionError, which says how they differ, unless ``other``, from a file, is of the same model."""
        theirs = other.get("config") if isinstance(other, dict) else None
        if not isinstance(theirs, dict):
            raise SessionError(f"{what} does not say which model it is of")
        if theirs != self.config:
            names = sorted(
                name for name in theirs.keys() | self.config.keys() if theirs.get(name) != self.config.get(name)
            )
            shown = ", ".join(
                f"{name}={theirs.get(name)!r:.80} there and {self.config.get(name)!r:.80} here" for name in names[:4]
            )
            raise SessionError(f"{what} is of another model: {shown}; load the model that it was made with")
        if other.get("weights") != self.weights:
            raise SessionError(
                f"{what} was made with other weights of this kind of model (another checkpoint, adapter or dtype); "
                "load those that it was made with"
            )


def fingerprint(model: torch.nn.Module) -> Fingerprint:
    """The fingerprint of a model, in well under a second: a few numbers of every weight are read.

    Two models with the same one give the same keys and values, unless a weight was changed in a few numbers only.
    Adapters count, with what is active of them.

    Parameters
    ----------
    model : PreTrainedModel

    Returns
    -------
    Fingerprint

    Examples
    --------
    >>> from scout_hf.sessions import fingerprint
    >>> fingerprint(model).weights == fingerprint(model).weights
    True
    """
    return Fingerprint(config_of(model), weights_hash(model))


def config_of(model: Any) -> dict[str, Any]:
    """What of a model's config changes keys and values, as plain data."""
    ranks = Ranks(model)
    part = {"tensor_parallel": str(ranks)} if ranks.size > 1 else {}
    text = json.dumps(_effective(model.config.to_dict()) | part, sort_keys=True, default=str)
    return parse_json(text, infinite=True)  # large numbers are allowed


def _effective(value: Any) -> Any:
    if isinstance(value, dict):
        # Names that begin with an underscore are labels and notes of transformers.
        kept = {str(name): one for name, one in value.items() if name not in WITHOUT_EFFECT}
        return {name: _effective(one) for name, one in kept.items() if not name.startswith("_")}
    if isinstance(value, (list, tuple)):
        return [_effective(one) for one in value]
    # JSON has no infinities.
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@torch.no_grad()
def weights_hash(model: torch.nn.Module) -> str:
    """A hash over names, shapes and some numbers of every weight and buffer: another one for any other checkpoint."""
    found, unused = hashlib.sha256(), tuple(_of_unused_adapters(model))
    embedding = here(getattr(getattr(model, "get_input_embeddings", lambda: None)(), "weight", None))
    for name, weight in weights_of(model):
        if name.startswith(unused):
            continue
        if isinstance(weight, str):
            found.update(f"{name} {weight} ".encode())
            continue
        most = max(2, round(SAMPLED ** (1 / max(1, weight.dim()))))
        some = whole = offloaded(model, name) if weight.is_meta else weight.detach()
        if weight is embedding and whole.dim() == 2:
            # A checkpoint may differ in the rows of a few added tokens.
            found.update(_bytes(whole[:, :: max(1, whole.shape[1] // EVERY_ROW)]))
        for place, size in enumerate(weight.shape):
            step = max(1, size // most)
            some = some[(slice(None),) * place + (slice(None, step * most, step),)]
        found.update(f"{name} {tuple(weight.shape)} {weight.dtype} ".encode())
        found.update(_bytes(some))
    for name, module in model.named_modules():
        for factor in FACTORS:
            if isinstance(value := getattr(module, factor, None), (int, float)):
                found.update(f"{name} {factor} {value!r} ".encode())
        if (active := _active_adapters(module)) is not None:
            scaling = getattr(module, "scaling", None)
            scaling = {one: scaling.get(one) for one in active} if isinstance(scaling, dict) else None
            found.update(f"{name} {active!r} {scaling!r} ".encode())
    return found.hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def offloaded(model: torch.nn.Module, name: str) -> torch.Tensor:
    """A weight that accelerate keeps in memory or on disk until its layer runs.

    Raises
    ------
    SessionError
        If it is not at hand: such a model cannot be recognised.
    """
    path, _, own = name.rpartition(".")
    hook = getattr(model.get_submodule(path), "_hf_hook", None)
    for one in (hook, *getattr(hook, "hooks", ())):
        held = getattr(one, "weights_map", None)
        if held is not None:
            return held[own].detach()
    raise SessionError(
        f"{name} has no numbers at hand (device 'meta'), so the model cannot be recognised; load its weights, or do "
        "without sessions and a store"
    )


def _active_adapters(module: torch.nn.Module) -> list[str] | None:
    """Adapters of a PEFT layer that have an effect; None for any other module."""
    active = getattr(module, "active_adapters", None)
    if active is None or callable(active) or not hasattr(module, "base_layer"):
        return None
    return [] if getattr(module, "disable_adapters", False) else list(active)


def _of_unused_adapters(model: torch.nn.Module) -> Iterator[str]:
    """Beginnings of the names of weights that belong to adapters without effect."""
    for name, module in model.named_modules():
        if (active := _active_adapters(module)) is not None:
            for part, held in module.named_children():
                if isinstance(held, (torch.nn.ModuleDict, torch.nn.ParameterDict)):
                    end = "." if isinstance(held, torch.nn.ModuleDict) else ""
                    yield from (f"{name}.{part}.{one}{end}" for one in held if one not in active)
