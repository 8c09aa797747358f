"""The one model of the server: loaded as transformers loads it, patched right after, unpatched when unloaded."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import split_model_id

from scout_hf import Handle
from scout_hf.errors import ConfigError


class PatchedModel(ModelManager):
    """transformers' model manager, pinned to one model, which it patches.

    Parameters
    ----------
    name : str
        What clients call the model.
    source : str
        What ``from_pretrained`` takes for it.
    patch : callable
        Patches a model and returns the handle; called again when the model was unloaded and is loaded again.
    **options
        Of ``ModelManager``, such as ``device`` and ``dtype``.

    Attributes
    ----------
    handle : Handle or None
        None while no model is loaded.

    Examples
    --------
    >>> models = PatchedModel("tiny", "/models/tiny", scout_hf.patch, device="cpu")
    >>> models.handle.stats()
    >>> models.shutdown()
    """

    def __init__(self, name: str, source: str, patch: Callable[[Any], Handle], **options: Any):
        # All before the base class, which loads the model.
        self.handle: Handle | None = None
        self._name, self._source, self._patch = name, source, patch
        self._patching = threading.Lock()
        super().__init__(force_model=name, **options)

    def process_model_name(self, model_id: str) -> str:  # type: ignore[override] # static in the base class
        return ModelManager.process_model_name(self._source if model_id == self._name else model_id)

    def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **options: Any) -> tuple[Any, Any]:
        if model_id_and_revision != self.process_model_name(split_model_id(self._name)[0]):
            raise ConfigError(f"{model_id_and_revision} is not served: this server has {self._name} alone")
        model, processor = super().load_model_and_processor(model_id_and_revision, *args, **options)
        with self._patching:
            if self.handle is None:
                self.handle = self._patch(model)
        return model, processor

    def shutdown(self) -> None:
        """Remove the patch, which waits for a running pass, and unload the model."""
        with self._patching:
            handle, self.handle = self.handle, None
        try:
            if handle is not None:
                handle.remove()
        finally:
            super().shutdown()
