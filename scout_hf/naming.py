"""Sets and removes the attention names of scout_hf on all configs of one decoder."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from scout_hf.attention import is_registered, register_over
from scout_hf.attention_name import AttentionName, name_over, name_under
from scout_hf.errors import PatchError, UnsupportedModelError
from scout_hf.plain_attention import is_of_transformers, seen, why_not_plain


class AttentionNames:
    """Attention names on a decoder's configs, on top of implementations that are plain attention.

    Parameters
    ----------
    decoder : Module
    layers : iterable of Module
    any_attention : bool
        Accept any attention as plain.
    """

    def __init__(self, decoder: torch.nn.Module, layers: Iterable[torch.nn.Module], any_attention: bool):
        inside = [module for layer in layers for module in layer.modules() if "config" in module.__dict__]
        configs = [_config_of(module) for module in (decoder, *inside)]
        self._configs = list({id(config): config for config in configs}.values())
        # One module per class and config represents all of them.
        attending = [module for module in inside if hasattr(module, "layer_idx")]
        self._kinds = list({(type(m), id(_config_of(m))): m for m in attending}.values())
        self._any = any_attention
        self._seen: list[Any] | None = None

    @property
    def foreign(self) -> bool:
        """Whether code outside transformers attends, and ``any_attention`` is not set."""
        return not self._any and not all(is_of_transformers(module) for module in self._kinds)

    def put_on(self) -> None:
        """Set the names. Raises UnsupportedModelError, before any change, if attention is not known to be plain."""
        if (found := self._not_plain()) is not None:
            raise UnsupportedModelError(found)
        for config in self._configs:
            self._put_on(config)

    def renew(self) -> None:
        """Set the names again where they were changed. Raises PatchError if attention is no longer known to be plain.

        A copy of a model starts with stock names.
        """
        if (found := self._not_plain()) is not None:
            raise PatchError(f"the attention implementation was changed after patch(): {found}")
        for config in self._configs:
            name = config._attn_implementation_internal
            if type(name) is not AttentionName or id(self) not in name.patches or not name.is_of(config):
                self._put_on(config)
            elif not is_registered(name):
                register_over(name)

    def take_off(self) -> None:
        """Restore the previous implementations, except where somebody has set another one since."""
        for config in self._configs:
            config._attn_implementation_internal = name_under(config, id(self))

    def __enter__(self) -> AttentionNames:
        self.put_on()
        return self

    def __exit__(self, *error: object) -> None:
        self.take_off()

    def __getstate__(self) -> dict[str, Any]:
        # Functions of users may not be picklable.
        return self.__dict__ | {"_seen": None}

    def _put_on(self, config: Any) -> None:
        name = name_over(config)
        register_over(name)
        config._attn_implementation_internal = name
        name.patches.add(id(self))

    def _not_plain(self) -> str | None:
        if self._any:
            return None
        now = [seen(_name(module), module) for module in self._kinds]
        if now == self._seen:
            return None
        for module in self._kinds:
            if (reason := why_not_plain(_name(module), module)) is not None:
                return (
                    f"{type(module).__name__} is not known to attend plainly: {reason}. Prompts would follow its rule "
                    "and decode steps would not; use transformers' own, as by model.set_attn_implementation('sdpa'), "
                    "or patch(model, attention='sdpa') if it is plain softmax attention"
                )
        self._seen = now
        return None


def _config_of(module: Any) -> Any:
    return module.config


def _name(module: torch.nn.Module) -> str:
    return str(_config_of(module)._attn_implementation_internal or "eager")
