"""Text out: stop strings, several sequences in one stream, server-sent events, disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from typing import TypeVar

from fastapi.responses import Response
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from headrace.server.errors import ApiError

T = TypeVar("T")


class StopStrings:
    """Passes text on up to the first stop string, and never a part of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str, armed: bool = True) -> str:
        """Return what can be shown now; `found` is set once a stop string is complete.

        While not armed (fewer than min_tokens so far) nothing is searched or held back.
        """
        if self.found is not None:
            return ""
        text = self._held + text
        self._held = ""
        if not armed:
            return text
        hits = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            at, self.found = min(hits)
            return text[:at]
        keep = self._partial_length(text)
        if keep:
            text, self._held = text[:-keep], text[-keep:]
        return text

    def flush(self) -> str:
        """Return what was held back when no more text comes."""
        rest, self._held = self._held, ""
        return rest

    def _partial_length(self, text: str) -> int:
        """Length of the longest end of text that begins a stop string."""
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


async def merge(generators: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Yield from all generators as items come; on leaving, close every one of them."""
    queue: asyncio.Queue[T | BaseException | None] = asyncio.Queue()

    async def pump(generator: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(generator):
                async for item in generator:
                    queue.put_nowait(item)
        except Exception as error:
            queue.put_nowait(error)
        else:
            queue.put_nowait(None)

    tasks = [asyncio.create_task(pump(generator)) for generator in generators]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until_disconnect(receive: Receive, work: Awaitable[T]) -> T | None:
    """Await work, but cancel it when the client goes away (None then)."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.create_task(disconnected())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


def event(data: BaseModel) -> bytes:
    """Encode one server-sent event."""
    return b"data: " + data.model_dump_json(exclude_unset=True).encode() + b"\n\n"


class EventStream(Response):
    """Sends each item as an event, then [DONE]; an error becomes the last event.

    The generator is closed, and with it the engine's requests, as soon as the client is gone.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[BaseModel, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream, as an ASGI application."""
        await until_disconnect(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async with aclosing(self._chunks):
            try:
                async for chunk in self._chunks:
                    await send_body(send, event(chunk))
            except ApiError as error:
                await send_body(send, event(error.body()))
            except Exception as error:
                bug = ApiError(500, f"internal error: {type(error).__name__}")
                await send_body(send, event(bug.body()))
                raise
        await send_body(send, b"data: [DONE]\n\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def send_body(send: Send, body: bytes) -> None:
    """Send one piece of a response that goes on."""
    await send({"type": "http.response.body", "body": body, "more_body": True})
