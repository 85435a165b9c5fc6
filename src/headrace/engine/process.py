"""The engine in its own process: messages from the client in, outputs and counters out.

The loop sleeps in poll when there is nothing to do, and ends when the client says so or when the
process that started it is gone.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import sys
import time
import traceback

import msgspec
import zmq

from headrace.config import ConfigError, EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.messages import (
    AbortRequest,
    AddRequest,
    EngineDead,
    EngineLoading,
    FromEngine,
    LoadAdapter,
    RequestOutput,
    Shutdown,
    ToEngine,
    UnloadAdapter,
)
from headrace.engine.phases import settle
from headrace.engine.spawn import MakeEngine, Progress
from headrace.engine.threads import share_python

STATS_INTERVAL = 0.25  # seconds between two EngineStats while there is work
LINGER_MS = 1000  # time that the last words get to leave


class ParentDied(Exception):
    """Nobody is left to work for."""


def make_engine(config: EngineConfig, progress: Progress) -> Engine:
    """The engine of a checkpoint."""
    return Engine(config, progress=progress)


class Link:
    """The engine's end of the socket."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self._socket = context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.linger = LINGER_MS
        self._socket.connect(address)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToEngine)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        parent = multiprocessing.parent_process()
        assert parent is not None, "run_engine is the main function of a child process"
        self._parent = parent.sentinel
        self._poller.register(self._parent, zmq.POLLIN)

    def send(self, messages: list[FromEngine]) -> None:
        """Send the messages of one step as one frame."""
        self._socket.send(self._encoder.encode(messages))

    def receive(self, wait: bool) -> ToEngine | None:
        """The next message, or None if there is none now; with wait, sleep until there is one.

        Raises:
            ParentDied: the process that started this one is gone.
        """
        ready = dict(self._poller.poll(None if wait else 0))
        if self._parent in ready:
            raise ParentDied
        if not ready:
            return None
        frame = self._socket.recv()
        try:
            return self._decoder.decode(frame)
        except msgspec.ValidationError as error:
            self._refuse(frame, error)
            return AbortRequest([])

    def _refuse(self, frame: bytes, error: msgspec.ValidationError) -> None:
        """A request that breaks the schema is answered like any other that can't run."""
        raw = msgspec.msgpack.decode(frame)
        request_id = raw.get("request_id") if isinstance(raw, dict) else None
        if isinstance(request_id, str):
            self.send([RequestOutput(request_id, [], finish_reason="error", error=str(error))])

    def close(self) -> None:
        """Let the last messages leave."""
        self._socket.close()


def run_engine(config: EngineConfig, address: str, make: MakeEngine = make_engine) -> None:
    """Main function of the engine process; exits 0 on Shutdown, 1 when it can't go on."""
    # Ctrl-C and a service manager's SIGTERM reach the whole group: the client decides when to stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    share_python()
    logging.basicConfig(format="headrace engine: %(message)s")
    logging.getLogger("headrace").setLevel(logging.INFO)
    context = zmq.Context()
    link = Link(context, address)
    status = 1
    try:
        engine = make(config, lambda done, total: link.send([EngineLoading(done, total)]))
        settle()
        link.send([engine.ready, engine.stats()])
        serve(engine, link)
        status = 0
    except ConfigError as error:
        link.send([EngineDead(str(error), caller_mistake=True)])
    except ParentDied:
        print("headrace engine: the server process is gone", file=sys.stderr)
    except Exception as error:
        traceback.print_exc()
        link.send([EngineDead(f"{type(error).__name__}: {error}")])
    link.close()
    context.term()
    sys.exit(status)


def serve(engine: Engine, link: Link) -> None:
    """Step while there is work, sleep while there is none, until Shutdown."""
    told = 0.0  # when the last EngineStats left; 0: tell with the next step
    while True:
        message = link.receive(wait=not engine.has_work())
        while message is not None:
            if isinstance(message, Shutdown):
                return
            handle(engine, message)
            message = link.receive(wait=False)
        if not engine.has_work():
            continue
        news: list[FromEngine] = [*engine.step(), *engine.adapters.take_replies()]
        now = time.monotonic()
        if now - told >= STATS_INTERVAL or not engine.has_work():
            news.append(engine.stats())
            told = now if engine.has_work() else 0.0
        link.send(news)


def handle(
    engine: Engine, message: AddRequest | AbortRequest | LoadAdapter | UnloadAdapter
) -> None:
    """Apply one message of the client."""
    if isinstance(message, AddRequest):
        engine.add_request(message)
    elif isinstance(message, AbortRequest):
        engine.abort(message.request_ids)
    else:
        engine.adapters.handle(message)
