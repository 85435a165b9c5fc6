"""The engine in its own process, through the client: everything runs for real."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from headrace.config import ConfigError, EngineConfig
from headrace.engine import client as client_module
from headrace.engine.client import EngineClient, EngineDeadError
from headrace.engine.messages import AddRequest, RequestOutput
from tests.engine.toy_model import (
    ToyModel,
    add_request,
    make_toy_engine,
    run,
    tokens_of,
    toy_engine,
)

CONFIG = EngineConfig(block_size=4, kv_cache_memory=1 << 22, max_num_seqs=8)
ENDLESS = 90_000


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that a busy machine keeps from its exit is not killed: exit codes are looked at."""
    monkeypatch.setattr(client_module, "EXIT_PATIENCE", 60.0)


@pytest.fixture
async def client() -> AsyncIterator[EngineClient]:
    client = EngineClient(CONFIG, make=make_toy_engine)
    await client.start()
    yield client
    await client.shutdown()
    assert not client.process.is_alive()


async def collect(client: EngineClient, request: AddRequest) -> list[RequestOutput]:
    return [output async for output in client.generate(request)]


async def until_idle(client: EngineClient) -> None:
    while client.stats.num_running or client.stats.num_waiting or client.stats.kv_cache_usage:
        await asyncio.sleep(0.02)


def alone(request: AddRequest) -> list[int]:
    return tokens_of(run(toy_engine(ToyModel(max_positions=1000)), request)[request.request_id])


async def test_concurrent_requests_get_their_own_tokens(client: EngineClient) -> None:
    requests = [add_request(f"r{i}", [i + 1, 7, i], max_tokens=10 + i) for i in range(8)]
    outputs = await asyncio.gather(*(collect(client, request) for request in requests))
    for request, got in zip(requests, outputs, strict=True):
        assert tokens_of(got) == alone(request)
        assert {output.request_id for output in got} == {request.request_id}
    await until_idle(client)
    assert client.stats.num_steps >= 17
    assert client.ready.block_size == 4


async def test_leaving_the_iteration_aborts_the_request(client: EngineClient) -> None:
    outputs = client.generate(add_request("a", [1, 2, 3], max_tokens=ENDLESS))
    assert (await anext(outputs)).finish_reason is None
    await outputs.aclose()  # type: ignore[attr-defined]
    await asyncio.wait_for(until_idle(client), 20)
    again = await collect(client, add_request("a", [1, 2, 3]))
    assert tokens_of(again) == alone(add_request("a", [1, 2, 3]))


async def test_leaving_after_the_end_spares_the_next_request_of_that_id(
    client: EngineClient,
) -> None:
    first = client.generate(add_request("a", [1, 2, 3], max_tokens=2))
    await anext(first)
    request = add_request("a", [4, 5, 6], max_tokens=50)
    second = client.generate(request)
    while (begin := await anext(second)).error:  # the id is in use until the last output is here
        await asyncio.sleep(0)
        second = client.generate(request)
    await first.aclose()  # type: ignore[attr-defined]
    assert tokens_of([begin, *[output async for output in second]]) == alone(request)


async def test_cancelling_the_consumer_aborts_the_request(client: EngineClient) -> None:
    task = asyncio.create_task(collect(client, add_request("a", [1, 2], max_tokens=ENDLESS)))
    while not client.stats.num_running:
        await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(until_idle(client), 20)


async def test_an_abort_ends_the_consumer(client: EngineClient) -> None:
    outputs = client.generate(add_request("a", [1, 2, 3], max_tokens=ENDLESS))
    await anext(outputs)
    client.abort(["a", "unknown"])
    last = [output async for output in outputs][-1]
    assert last.finish_reason == "abort"


async def test_bad_requests_get_an_answer_and_others_go_on(client: EngineClient) -> None:
    endless = client.generate(add_request("endless", [1, 2, 3], max_tokens=ENDLESS))
    await anext(endless)
    bad = {
        "token id 99": add_request("a", [99]),
        "prompt is empty": add_request("b", []),
        "Expected `int`": add_request("c", ["text"]),  # type: ignore[list-item]
        "Expected `float`": add_request("d", [1], temperature="hot"),
        "already in use": add_request("endless", [1]),
    }
    for text, request in bad.items():
        (output,) = await collect(client, request)
        assert output.finish_reason == "error"
        assert text in (output.error or "")
    assert (await anext(endless)).finish_reason is None
    await endless.aclose()  # type: ignore[attr-defined]


async def test_a_killed_engine_is_noticed(client: EngineClient) -> None:
    outputs = client.generate(add_request("a", [1, 2, 3], max_tokens=ENDLESS))
    await anext(outputs)
    assert client.is_alive
    assert client.process.pid is not None
    os.kill(client.process.pid, signal.SIGKILL)
    last = [output async for output in outputs][-1]
    assert last.finish_reason == "error"
    assert "exit code -9" in (last.error or "")
    assert not client.is_alive
    (refused,) = await collect(client, add_request("b", [1]))
    assert refused.finish_reason == "error"
    assert "exit code -9" in (refused.error or "")


async def test_signals_to_the_group_do_not_end_the_engine(client: EngineClient) -> None:
    assert client.process.pid is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(client.process.pid, number)
    request = add_request("a", [1, 2, 3])
    assert tokens_of(await collect(client, request)) == alone(request)


async def test_an_exception_in_a_step_is_told_and_ends_the_process() -> None:
    client = EngineClient(
        EngineConfig(model=Path("breaks"), kv_cache_memory=1 << 20), make=make_toy_engine
    )
    await client.start()
    (output,) = await collect(client, add_request("a", [1, 2]))
    assert output.finish_reason == "error"
    assert "ZeroDivisionError" in (output.error or "")
    assert client.dead_reason is not None
    await client.shutdown()
    assert client.process.exitcode == 1


async def test_a_wrong_flag_is_a_config_error() -> None:
    config = EngineConfig(block_size=4, kv_cache_memory=64)
    client = EngineClient(config, make=make_toy_engine)
    with pytest.raises(ConfigError, match="--kv-cache-memory is 64 bytes"):
        await client.start()
    assert not client.is_alive


async def test_a_process_that_dies_while_loading_is_an_error() -> None:
    client = EngineClient(CONFIG, make=exit_while_loading)  # type: ignore[arg-type]
    with pytest.raises(EngineDeadError, match="exit code 3"):
        await client.start()


def exit_while_loading(config: EngineConfig, progress: object) -> None:
    os._exit(3)


async def test_shutdown_drains() -> None:
    seen: list[tuple[int, int]] = []
    client = EngineClient(
        CONFIG, make=make_toy_engine, on_progress=lambda done, total: seen.append((done, total))
    )
    await client.start()
    assert seen == [(1, 2)]
    short = asyncio.create_task(collect(client, add_request("a", [1, 2, 3], max_tokens=40)))
    await asyncio.sleep(0)
    closing = asyncio.create_task(client.shutdown(drain_timeout=30))
    await asyncio.sleep(0)
    (refused,) = await collect(client, add_request("b", [1]))
    assert "shutting down" in (refused.error or "")
    await closing
    assert tokens_of(await short) == alone(add_request("a", [1, 2, 3], max_tokens=40))
    assert client.process.exitcode == 0


async def test_shutdown_answers_those_that_do_not_finish_in_time() -> None:
    client = EngineClient(CONFIG, make=make_toy_engine)
    await client.start()
    task = asyncio.create_task(collect(client, add_request("a", [1], max_tokens=ENDLESS)))
    await asyncio.sleep(0)
    await client.shutdown(drain_timeout=0.1)
    assert (await task)[-1].finish_reason == "error"
    assert client.process.exitcode == 0


ORPHAN = """
import asyncio, os, signal
from headrace.engine.client import EngineClient
from tests.engine.test_process import CONFIG, make_toy_engine

async def main():
    client = EngineClient(CONFIG, make=make_toy_engine)
    await client.start()
    print(client.process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_the_engine_dies_with_its_parent(tmp_path: Path) -> None:
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    path = os.pathsep.join(sys.path)
    # stderr is a pipe that the engine holds too: communicate ends when both are gone
    parent = subprocess.Popen(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    out, err = parent.communicate(timeout=240)
    assert parent.returncode == -signal.SIGKILL
    assert int(out) > 0
    assert "the server process is gone" in err
