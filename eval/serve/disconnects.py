"""Requests whose client has gone are cancelled; transformers' server does so with streams alone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

GONE = "http.disconnect"


class CancelsTheAbandoned:
    """ASGI middleware: cancels a request whose client disconnects before the answer begins."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = _Request(receive, send)
        handled = asyncio.ensure_future(self._app(scope, request.receive, request.send))
        watched = asyncio.ensure_future(request.watch(handled))
        try:
            await handled
        except asyncio.CancelledError:
            if not request.abandoned:
                raise
        finally:
            watched.cancel()


class _Request:
    def __init__(self, receive: Receive, send: Send):
        self.abandoned = False
        self._receive, self._send = receive, send
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        self._gone = self._answered = False

    async def watch(self, handled: asyncio.Future[None]) -> None:
        """Read ahead for the handler, and cancel it when the client has gone."""
        while not self._gone:
            message = await self._receive()
            self._gone = message["type"] == GONE
            self._messages.put_nowait(message)
        if not self._answered:
            self.abandoned = handled.cancel()

    async def receive(self) -> Message:
        if self._gone and self._messages.empty():
            return {"type": GONE}
        return await self._messages.get()

    async def send(self, message: Message) -> None:
        self._answered = True
        await self._send(message)
