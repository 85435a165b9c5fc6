"""A server from start to end: load, listen, and on SIGTERM drain and leave."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import Generator
from typing import TYPE_CHECKING

import uvicorn
from rich.console import Console
from rich.progress import Progress

from headrace.config import ConfigError, EngineConfig, ServerConfig
from headrace.engine.client import EngineClient
from headrace.engine.phases import process_age, settle
from headrace.server.start_table import start_table

if TYPE_CHECKING:
    from headrace.server.serving import Serving

LAST_REPLIES = 5  # seconds for connections to close after the drain
POLL = 0.05  # seconds between looks at the requests that are left


def run_server(engine_config: EngineConfig, server_config: ServerConfig) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status.

    Raises ConfigError for wrong flags, a bad checkpoint or a port that is taken.
    """
    return asyncio.run(serve(engine_config, server_config))


async def serve(engine_config: EngineConfig, server_config: ServerConfig) -> int:
    """Start the engine and the HTTP server, and end them in order."""
    start = time.monotonic() - (process_age() or 0.0)
    console = Console(stderr=True)
    with bind(server_config) as listener, Progress(console=console, transient=True) as bar:
        loading = bar.add_task(f"loading {engine_config.model.name}", total=None)
        engine = EngineClient(
            engine_config, on_progress=lambda d, t: bar.update(loading, completed=d, total=t)
        )
        before = time.monotonic() - start
        starting = asyncio.create_task(engine.start())
        try:
            await asyncio.sleep(0)  # starts the engine's process, which works meanwhile
            from headrace.server.app import create_app
            from headrace.server.model_info import load_model_info
            from headrace.server.tokenizer import load_tokenizer

            tokenizer = await asyncio.to_thread(load_tokenizer, engine_config.model)
            model = load_model_info(
                engine_config.model, tokenizer, server_config, engine_config.lora_modules
            )
            await starting
        finally:
            starting.cancel()
        bar.stop()
        app = create_app(engine, tokenizer, server_config, model)
        http = HttpServer(app.state.serving, uvicorn.Config(app, log_level="warning"))
        settle()
        listener.listen()  # before anybody is told: uvicorn itself would do so only a moment later
        console.print(start_table(engine.ready.start, before, time.monotonic() - start))
        announce(console, server_config.host, listener.getsockname()[1], model.name)
        try:
            await http.serve_until_signal(listener)
        finally:
            await engine.shutdown()
            await http.close()
    return 0


def bind(config: ServerConfig) -> socket.socket:
    """Bind the port before the slow part, so that a taken port is known at once."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # asyncio lets small packets go at once (TCP_NODELAY) only where the protocol is named; else the
    # first token of a stream waits 40 ms for the acknowledgement of its headers
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        where = f"--host {config.host} --port {config.port}"
        raise ConfigError(f"can't listen on {where}: {error.strerror}") from None
    return listener


def announce(console: Console, host: str, port: int, model: str) -> None:
    """Say where the server is and how to try it."""
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{port}"
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    console.print(f"Serving {model} on {url}", style="bold", markup=False, highlight=False)
    line = f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"
    console.print(line, markup=False, highlight=False, soft_wrap=True)
    real = "A real checkpoint: headrace serve path/to/gpt-oss-20b (a Hugging Face directory)"
    console.print(real, style="dim", markup=False, highlight=False)


class HttpServer:
    """uvicorn, with our own way out: drain, then the engine ends, then the connections."""

    def __init__(self, serving: Serving, config: uvicorn.Config) -> None:
        config.timeout_graceful_shutdown = LAST_REPLIES
        self._serving = serving
        self._server = QuietServer(config)
        self._leave = asyncio.Event()

    async def serve_until_signal(self, listener: socket.socket) -> None:
        """Serve on listener until a signal; then refuse new requests and drain."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._leave.set)
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]))
        await self._leave.wait()
        self._leave.clear()  # a second signal ends the drain
        await self._drain()

    async def close(self) -> None:
        """Send the last replies and close all connections."""
        self._server.should_exit = True
        await self._task

    async def _drain(self) -> None:
        """Let running requests end while /health says 503, up to the deadline."""
        self._serving.draining = True
        deadline = time.monotonic() + self._serving.config.drain_timeout
        while self._serving.num_in_flight and time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._leave.wait(), POLL)
                return


class QuietServer(uvicorn.Server):
    """Leaves signals alone: HttpServer handles them, and exits 0 where uvicorn would raise."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Install no handlers."""
        yield
