"""The streaming client against a server that sends exact bytes."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import web

from headrace.bench.client import Client, Outcome, decode_chunk, note
from headrace.bench.datasets import Sample
from tests.bench.fake_server import DONE, FakeServer, Script, completion, event

SAMPLE = Sample([1, 2, 3], 3, 5)


async def send(script: Script, chat: bool = False, **fields: Any) -> tuple[Outcome, FakeServer]:
    with FakeServer(script) as server:
        path = "/v1/chat/completions" if chat else "/v1/completions"
        async with Client(server.url + path, chat, fields) as client:
            return await client.send(SAMPLE, "m"), server


async def test_a_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    outcome, server = await send(lambda i, body: completion(4), temperature=0.0)
    assert outcome.succeeded
    assert len(outcome.chunk_times) == 4
    assert outcome.usage_tokens == 4
    assert outcome.text == " t0 t1 t2 t3"
    assert outcome.prompt_len == 3
    assert outcome.start < outcome.chunk_times[0]
    assert outcome.chunk_times == sorted(outcome.chunk_times)
    assert server.bodies == [
        {
            "path": "/v1/completions", "model": "m", "prompt": [1, 2, 3], "max_tokens": 5,
            "repetition_penalty": 1.0, "temperature": 0.0,
            "stream": True, "stream_options": {"include_usage": True},
        }
    ]  # fmt: skip
    assert server.headers[0]["Authorization"] == "Bearer secret"


async def test_every_chunk_of_a_chat_counts_the_first_with_the_role_too() -> None:
    def script(i: int, body: dict[str, Any]) -> list[bytes]:
        deltas = [{"role": "assistant", "content": ""}, {"reasoning_content": "hm "}]
        deltas += [{"content": "yes"}, {"tool_calls": [{"index": 0}]}]
        pieces = [event(choices=[{"index": 0, "delta": delta}]) for delta in deltas]
        return [*pieces, event(choices=[{"delta": {}, "finish_reason": "stop"}]), DONE]

    outcome, server = await send(script, chat=True)
    assert outcome.succeeded
    assert len(outcome.chunk_times) == 5
    assert outcome.text == "hm yes"
    assert outcome.usage_tokens is None
    assert server.bodies[0]["messages"] == [{"role": "user", "content": [1, 2, 3]}]
    assert server.bodies[0]["max_completion_tokens"] == 5
    assert "prompt" not in server.bodies[0]


async def test_events_may_be_cut_anywhere_and_come_together() -> None:
    whole = b": a comment\r\n\r\n" + b"".join(completion(6)).replace(b"\n", b"\r\n")
    sizes = [1, 7, 50, 3, 200, 40]

    def script(i: int, body: dict[str, Any]) -> list[bytes]:
        pieces, rest = [], whole
        for size in sizes:
            pieces.append(rest[:size])
            rest = rest[size:]
        return [*pieces, rest]

    outcome, _ = await send(script)
    assert outcome.succeeded
    assert len(outcome.chunk_times) == 6
    assert outcome.text == " t0 t1 t2 t3 t4 t5"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            web.json_response({"error": {"message": "no such model"}}, status=404),
            "HTTP 404: no such model",
        ),
        (web.Response(text="<html>bad gateway", status=502), "HTTP 502: <html>bad gateway"),
        ([event(choices=[], usage={"completion_tokens": 0}), DONE], "without a token"),
        (completion(3)[:2], "broke off"),
        ([completion(1)[0], event(error={"message": "out of memory"}), DONE], "out of memory"),
        ([b"data: {nonsense\n\n", DONE], "DecodeError"),
    ],
)
async def test_what_goes_wrong_is_the_outcomes_error(said: Any, reason: str) -> None:
    outcome, _ = await send(lambda i, body: said)
    assert not outcome.succeeded
    assert reason in outcome.error


async def test_a_connection_that_breaks() -> None:
    outcome, _ = await send(lambda i, body: completion(3)[:2], user="cut")
    assert "Error" in outcome.error


async def test_no_server() -> None:
    async with Client("http://127.0.0.1:9/v1/completions", False, {}) as client:
        assert "Cannot connect" in (await client.send(SAMPLE, "m")).error


def test_a_chunk_of_many_fields_is_read_once() -> None:
    """Unknown fields are skipped, and the text of another form is not an empty token."""
    outcome, texts = Outcome(1, "m"), list[str]()
    raw = b'{"id":"x","choices":[{"index":0,"text":"","logprobs":null,"stop_reason":3}],"z":{}}'
    note(decode_chunk(raw), 1.5, outcome, texts)
    assert (outcome.chunk_times, texts, outcome.error) == ([1.5], [""], "")
