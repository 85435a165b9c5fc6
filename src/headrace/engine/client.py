"""The server's end: starts the engine process and hands its outputs to whoever waits for them."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import multiprocessing
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from headrace.config import ConfigError, EngineConfig
from headrace.engine.messages import (
    AbortRequest,
    AdapterReply,
    AddRequest,
    EngineLoading,
    EngineReady,
    EngineStats,
    FromEngine,
    LoadAdapter,
    RequestOutput,
    Shutdown,
    ToEngine,
    UnloadAdapter,
)
from headrace.engine.spawn import MakeEngine, Progress, run

LAST_WORDS = 0.2  # seconds between the end of the process and reading no more of its messages
EXIT_PATIENCE = 5.0  # seconds that the process gets to exit before it is killed
NO_STATS = EngineStats(0, 0, 0.0, 0, 0, 0, 0)


class EngineDeadError(RuntimeError):
    """The engine process is gone; the text says why."""


class EngineClient:
    """Talks to one engine process; all methods belong to the event loop that called start().

    on_progress(done, total) is called while the checkpoint is read. on_stats(stats) is called
    with every EngineStats, for the lists in it cover only the time since the one before.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        make: MakeEngine | None = None,
        on_progress: Progress | None = None,
        on_stats: Callable[[EngineStats], None] | None = None,
    ) -> None:
        self.config = config
        self.stats = NO_STATS
        self.dead_reason: str | None = None
        self.on_stats = on_stats
        self._on_progress = on_progress
        self._make = make
        self._queues: dict[str, asyncio.Queue[RequestOutput]] = {}
        self._adapters: dict[str, asyncio.Future[AdapterReply]] = {}  # loads and unloads, by name
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False

    async def start(self) -> None:
        """Start the process and wait until it is ready.

        Raises:
            ConfigError: wrong flags, or a bad checkpoint.
            EngineDeadError: the process ended for another reason.
        """
        self._directory = tempfile.TemporaryDirectory(prefix="headrace-")
        address = f"ipc://{Path(self._directory.name) / 'engine'}"
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.linger = 0
        self._socket.bind(address)
        # spawn: a forked child would inherit locks that other threads hold
        self.process = multiprocessing.get_context("spawn").Process(
            target=run,
            args=(self.config, address, self._make),
            name="headrace-engine",
            daemon=True,
        )
        self.process.start()
        # the engine ignores SIGTERM, with which multiprocessing would end it at exit
        atexit.register(self.process.kill)
        loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[EngineReady] = loop.create_future()
        self._reader = asyncio.create_task(self._read())
        exited = asyncio.Event()
        loop.add_reader(self.process.sentinel, exited.set)
        self._watcher = asyncio.create_task(self._watch(exited))
        try:
            self.ready = await self._ready
        except BaseException:
            self.process.kill()  # while it loads it reads no messages
            await self.shutdown()
            raise

    @property
    def is_alive(self) -> bool:
        """Whether the engine runs; False as soon as its process is gone."""
        return self.dead_reason is None and self.process.is_alive()

    async def generate(self, request: AddRequest) -> AsyncIterator[RequestOutput]:
        """Outputs of one request, the last one with a finish_reason.

        Leaving the iteration early (aclose, cancel) aborts the request.
        """
        request_id = request.request_id
        refusal = self._refusal(request_id)
        if refusal is not None:
            yield RequestOutput(request_id, [], finish_reason="error", error=refusal)
            return
        queue: asyncio.Queue[RequestOutput] = asyncio.Queue()
        self._queues[request_id] = queue
        self._idle.clear()
        finished = False
        try:
            self._send(request)
            while not finished:
                output = await queue.get()
                finished = output.finish_reason is not None
                yield output
        finally:
            # once its last output is here the id may be another request's
            if self._queues.get(request_id) is queue:
                self.abort([request_id])

    def _refusal(self, request_id: str) -> str | None:
        """Why no request can be taken now."""
        if not self.is_alive:
            return f"the engine is gone: {self.dead_reason or 'its process ended'}"
        if self._closing:
            return "the server is shutting down"
        if request_id in self._queues:
            return f"request id {request_id!r} is already in use"
        return None

    def abort(self, request_ids: Iterable[str]) -> None:
        """Free requests; a consumer that still waits for one gets finish_reason "abort"."""
        if self.is_alive:
            self._send(AbortRequest(list(request_ids)))

    async def change_adapter(self, message: LoadAdapter | UnloadAdapter) -> AdapterReply:
        """Load or unload an adapter, after what is under way for its name; says how it ended.

        Raises EngineDeadError if the engine is gone before that.
        """
        while before := self._adapters.get(message.name):
            await asyncio.wait([before])
        if not self.is_alive:
            raise EngineDeadError(f"the engine is gone: {self.dead_reason}")
        reply: asyncio.Future[AdapterReply] = asyncio.get_running_loop().create_future()
        self._adapters[message.name] = reply
        self._send(message)
        return await asyncio.shield(reply)

    async def shutdown(self, drain_timeout: float = 0.0) -> None:
        """Take no more requests, let running ones finish for a while, then end the process."""
        self._closing = True
        if self.is_alive and self._queues and drain_timeout > 0:
            # those that are left then get an error output
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), drain_timeout)
        if self.is_alive:
            self._send(Shutdown())
        await self._join()
        self._bury("it was shut down")
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        self._socket.close()
        self._context.term()
        self._directory.cleanup()
        atexit.unregister(self.process.kill)

    async def _join(self) -> None:
        """Wait for the process to exit, and kill it if it doesn't."""
        try:
            await asyncio.wait_for(asyncio.shield(self._watcher), EXIT_PATIENCE)
        except TimeoutError:
            self.process.kill()
            await self._watcher

    def _send(self, message: ToEngine) -> None:
        # there is no limit on queued messages, so this never has to wait
        self._socket.send(msgspec.msgpack.encode(message))

    async def _read(self) -> None:
        """Hand every message of the engine to whom it concerns."""
        decoder = msgspec.msgpack.Decoder(list[FromEngine])
        while True:
            for message in decoder.decode(await self._socket.recv()):
                self._dispatch(message)

    def _dispatch(self, message: FromEngine) -> None:
        if isinstance(message, RequestOutput):
            self._deliver(message)
        elif isinstance(message, AdapterReply):
            self._adapters.pop(message.name).set_result(message)
        elif isinstance(message, EngineStats):
            self.stats = message
            if self.on_stats:
                self.on_stats(message)
        elif isinstance(message, EngineLoading):
            if self._on_progress:
                self._on_progress(message.done, message.total)
        elif isinstance(message, EngineReady):
            self._ready.set_result(message)
        else:
            self._bury(message.reason, message.caller_mistake)

    async def _watch(self, exited: asyncio.Event) -> None:
        """Notice the end of the process, however it came."""
        await exited.wait()
        asyncio.get_running_loop().remove_reader(self.process.sentinel)
        self.process.join()
        await asyncio.sleep(LAST_WORDS)
        self._bury(f"its process ended with exit code {self.process.exitcode}")

    def _deliver(self, output: RequestOutput) -> None:
        """Queue an output for its consumer; an id stays in use until the engine is done with it."""
        queue = self._queues.get(output.request_id)
        if queue is None:
            return
        queue.put_nowait(output)
        if output.finish_reason is not None:
            del self._queues[output.request_id]
            if not self._queues:
                self._idle.set()

    def _bury(self, reason: str, caller_mistake: bool = False) -> None:
        """Tell everybody who waits that the engine is gone; the first reason stands."""
        if self.dead_reason is not None:
            return
        self.dead_reason = reason
        if not self._ready.done():
            error = ConfigError(reason) if caller_mistake else EngineDeadError(reason)
            self._ready.set_exception(error)
        text = f"the engine is gone: {reason}"
        for name in list(self._adapters):
            self._adapters.pop(name).set_exception(EngineDeadError(text))
        for request_id in list(self._queues):
            self._deliver(RequestOutput(request_id, [], finish_reason="error", error=text))
