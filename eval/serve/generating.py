"""Generation that ends with the request that asked for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.utils import GenerateManager, GenerationState


class OneModel(GenerationState):
    """The state of transformers' handlers, for one model: requests generate one after the other, in one thread."""

    def __init__(self) -> None:
        super().__init__()
        self._manager = EndsWithItsRequest()

    def get_manager(self, model_id: str, use_cb: bool = False) -> GenerateManager:
        return self._manager


class EndsWithItsRequest(GenerateManager):
    """As transformers' manager, but what nobody waits for any more is not generated.

    The stock manager ends streams whose client has gone once they are being sent, and nothing else.
    """

    def generate_streaming(self, *args: Any, **options: Any) -> Any:
        queue, streamer = super().generate_streaming(*args, **options)
        request = asyncio.current_task()
        if request is not None:  # which the handlers are always in
            request.add_done_callback(lambda _: streamer.cancel())
        return queue, streamer

    async def generate_non_streaming(self, model: Any, processor: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        ended = RequestEnded()
        inputs = {**inputs, "stopping_criteria": StoppingCriteriaList([ended])}
        # Shielded: the inference thread sets the result of a future that must not be cancelled.
        generated = asyncio.ensure_future(super().generate_non_streaming(model, processor, inputs, *args, **options))
        try:
            return await asyncio.shield(generated)
        except asyncio.CancelledError:
            ended.flag.set()
            raise

    def async_submit(self, fn: Callable[..., Any], *args: Any, **options: Any) -> Any:
        for one in options.get("stopping_criteria") or ():
            if isinstance(one, RequestEnded):
                return super().async_submit(one.unless_ended, fn, *args, **options)
        return super().async_submit(fn, *args, **options)


class RequestEnded(StoppingCriteria):
    """Stops ``generate()`` once the flag is set."""

    def __init__(self) -> None:
        self.flag = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        return torch.full(input_ids.shape[:1], self.flag.is_set(), dtype=torch.bool, device=input_ids.device)

    def unless_ended(self, fn: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call ``fn``, unless the request ended while it waited for others: its prompt is not even read."""
        if self.flag.is_set():
            raise RuntimeError("the request ended before its turn")
        return fn(*args, **options)
