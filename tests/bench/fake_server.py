"""An OpenAI-compatible server over real HTTP that says what a test tells it to, when it says so."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

from aiohttp import web

DONE = b"data: [DONE]\n\n"


def event(**fields: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def completion(num_tokens: int, usage: bool = True) -> list[bytes]:
    """The pieces of a whole stream of /v1/completions, a token each."""
    pieces = [event(choices=[{"index": 0, "text": f" t{i}"}]) for i in range(num_tokens)]
    if usage:
        pieces.append(event(choices=[], usage={"completion_tokens": num_tokens}))
    return [*pieces, DONE]


Script = Callable[[int, dict[str, Any]], "list[bytes] | AsyncIterator[bytes] | web.Response"]


class FakeServer:
    """Answers request i with script(i, body): pieces of a stream, each sent on its own."""

    def __init__(
        self, script: Script, models: tuple[dict[str, Any], ...] = ({"id": "m"},), status: int = 200
    ) -> None:
        self._script = script
        self._models, self._status = models, status
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.num_open = self.most_open = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> FakeServer:
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)

    async def _serve(self) -> None:
        app = web.Application()
        app.router.add_get("/v1/models", self._list_models)
        app.router.add_post("/{tail:.*}", self._answer)
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _list_models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": list(self._models)}, status=self._status)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        number = len(self.bodies)
        self.bodies.append(body | {"path": request.path})
        self.headers.append(dict(request.headers))
        said = self._script(number, body)
        if isinstance(said, web.Response):
            return said
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        async for piece in said if isinstance(said, AsyncIterator) else one_by_one(said):
            await response.write(piece)
        self.num_open -= 1
        if body.get("user") == "cut":  # the connection ends without an end of the stream
            assert request.transport is not None
            request.transport.abort()
        return response


async def one_by_one(pieces: list[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece
        await asyncio.sleep(0)
