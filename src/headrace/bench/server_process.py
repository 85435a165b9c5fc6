"""A server of our own, started for a measurement and stopped after it."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from headrace.config import ConfigError
from headrace.files import parse_module, read_json

START = "from headrace.cli import main; main()"
POLL = 0.1  # seconds between looks at /health
STOP_TIMEOUT = 60  # seconds to drain and leave, after which it is killed
LOG_LINES = 40  # shown of a server that failed


@contextlib.contextmanager
def running_server(model: Path, flags: Sequence[str], start_timeout: float) -> Iterator[str]:
    """Run `headrace serve MODEL` on a free port; yields its URL once it is healthy.

    Raises ConfigError with the end of its log if it ends first, or takes over start_timeout
    seconds. The log of one that fails later is printed when it is stopped.
    """
    port = free_port()
    command = [sys.executable, "-c", START, "serve", str(model), "--port", str(port), *flags]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + start_timeout
            while not is_healthy(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise ConfigError(f"the server did not start:\n{end_of(log)}")
                time.sleep(POLL)
            try:
                yield url
            finally:
                if not is_healthy(url):
                    print(f"the server is not healthy any more:\n{end_of(log)}", file=sys.stderr)
        finally:
            stop(process)


def end_of(log: TextIO) -> str:
    """Return the last lines of a log that another process writes."""
    log.seek(0)
    return "".join(log.readlines()[-LOG_LINES:])


def lora_flags(modules: Sequence[str]) -> list[str]:
    """Return the flags that make a server serve these adapters, NAME=DIRECTORY each."""
    if not modules:
        return []
    sizes = ["--max-loras", str(len(modules)), "--max-lora-rank", str(largest_rank(modules))]
    return ["--enable-lora", *sizes, *(f"--lora-modules={module}" for module in modules)]


def largest_rank(modules: Sequence[str]) -> int:
    """Return the largest rank of these adapters, 0 without any; ConfigError for what is none."""
    rank = 0
    for _, path in map(parse_module, modules):
        config = read_json(path / "adapter_config.json")
        if not isinstance(config.get("r"), int):
            raise ConfigError(f"{path / 'adapter_config.json'} has no rank `r`")
        rank = max(rank, config["r"], *config.get("rank_pattern", {}).values())
    return rank


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def is_healthy(url: str) -> bool:
    """Whether the server takes requests."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask it to drain and leave; kill it if it doesn't."""
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
