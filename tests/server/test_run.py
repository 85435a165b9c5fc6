"""The whole program, as a process of its own."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from headrace.bench.memory import descendants
from headrace.config import ConfigError, EngineConfig, ServerConfig
from headrace.server.run import bind, run_server

PROGRAM = """
import sys
from pathlib import Path
from headrace.config import EngineConfig, ServerConfig
from headrace.server.run import run_server
if __name__ == "__main__":
    engine = EngineConfig(model=Path(sys.argv[1]), device="cpu", kv_cache_memory=16 << 20)
    server = ServerConfig(port=0, served_model_name="m", drain_timeout=float(sys.argv[2]))
    sys.exit(run_server(engine, server))
"""


@contextmanager
def program(tmp_path: Path, model: Path, drain: float) -> Iterator[tuple[subprocess.Popen, str]]:
    script = tmp_path / "serve.py"  # a file, for the engine process is spawned from it
    script.write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, script, model, str(drain)], stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"http://[\d.:]+", line):
                yield process, found[0]
                break
        else:
            raise AssertionError("it never said where it serves")
    finally:
        process.kill()
        process.communicate()


@contextmanager
def stopped_engine(process: subprocess.Popen) -> Iterator[None]:
    """A server whose answers can't end meanwhile."""
    children = descendants(process.pid)
    for pid in children:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in children:
            os.kill(pid, signal.SIGCONT)


def test_sigterm_drains_and_exits_0(model_dir: Path, tmp_path: Path) -> None:
    """A running stream ends whole; meanwhile /health says draining and new requests get 503."""
    with program(tmp_path, model_dir, drain=600) as (process, url):
        body = {"model": "m", "prompt": "a", "max_tokens": 1900, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            with stopped_engine(process):
                process.send_signal(signal.SIGTERM)
                health = httpx.get(f"{url}/health", timeout=60)
                while health.status_code == 200:
                    health = httpx.get(f"{url}/health", timeout=60)
                assert (health.status_code, health.json()["status"]) == (503, "draining")
                late = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
                assert (late.status_code, late.json()["error"]["code"]) == (503, 503)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-2]
        assert process.wait(120) == 0


def test_the_drain_has_a_deadline(model_dir: Path, tmp_path: Path) -> None:
    with program(tmp_path, model_dir, drain=0.2) as (process, url):
        # many sequences, so that the answer takes far longer than the metric's delay
        body = {"model": "m", "prompt": "a", "max_tokens": 1900, "ignore_eos": True, "n": 64}
        answers: list[httpx.Response] = []

        def ask() -> None:
            answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60))

        thread = threading.Thread(target=ask)
        thread.start()
        idle = 'running{engine="0",model_name="m"} 0.0'
        while idle in httpx.get(f"{url}/metrics", timeout=60).text:
            assert thread.is_alive(), "the answer came too soon"
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
        thread.join(120)
        assert answers[0].status_code == 503


def test_a_taken_port_is_known_before_loading(model_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}"):
            run_server(EngineConfig(model=model_dir), ServerConfig(port=port))


def test_an_unknown_host() -> None:
    with pytest.raises(ConfigError, match="--host nowhere"):
        bind(ServerConfig(host="nowhere.invalid", port=0))


def test_tokens_are_sent_at_once() -> None:
    """Or the kernel keeps a small packet until the one before is acknowledged, 40 ms later."""

    async def accepted() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = writer.get_extra_info("socket")
            found.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = bind(ServerConfig(host="127.0.0.1", port=0))
        async with await asyncio.start_server(accept, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            writer.close()
            return await found

    assert asyncio.run(accepted())


def test_the_server_needs_no_torch() -> None:
    """Its own process starts sooner, and is smaller, than the engine's."""
    script = "import sys, headrace.server.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
