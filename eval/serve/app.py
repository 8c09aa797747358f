"""The application: transformers' own, with its own handlers, and statistics of the patch."""

from __future__ import annotations

import inspect
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.transcription import TranscriptionHandler

from scout_hf.errors import ConfigError
from scout_hf.eval.serve.disconnects import CancelsTheAbandoned
from scout_hf.eval.serve.generating import OneModel
from scout_hf.eval.serve.models import PatchedModel


def make_app(models: PatchedModel) -> FastAPI:
    """The application of ``transformers serve`` for this model. Its end removes the patch.

    Examples
    --------
    >>> uvicorn.run(make_app(models), port=8000)
    """
    state = OneModel()
    app = build_server(models, generation_state=state, **_handlers(models, state))
    app.add_middleware(CancelsTheAbandoned)

    @app.get("/stats")
    def stats() -> JSONResponse:
        handle = models.handle
        return JSONResponse({} if handle is None else handle.stats().to_dict())

    return app


def _handlers(models: PatchedModel, state: OneModel) -> dict[str, Any]:
    """Those that this release of transformers asks for."""
    known: dict[str, Any] = {
        "chat_handler": ChatCompletionHandler,
        "completion_handler": CompletionHandler,
        "response_handler": ResponseHandler,
        "transcription_handler": TranscriptionHandler,
    }
    asked = inspect.signature(build_server).parameters
    if "systemone_handler" in asked:  # since 5.24
        from transformers.cli.serving.systemone import SystemOneHandler

        known["systemone_handler"] = SystemOneHandler
    needed = {name for name, one in asked.items() if one.default is one.empty}
    if strange := needed - {*known, "model_manager", "generation_state"}:
        raise ConfigError(f"the server of this transformers asks for {', '.join(sorted(strange))}: try 5.24")
    return {name: handler(models, state) for name, handler in known.items() if name in asked}
