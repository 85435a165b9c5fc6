"""The bundled model through the API: it reasons, answers and calls functions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.server.live import MODEL_NAME, LiveServer, wait_for

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}
SUMS = [(123, 456), (9, 1), (77, 23), (808, 191), (5, 17), (640, 360), (31, 13)]


@pytest.fixture(scope="module")
def bundled() -> Iterator[LiveServer]:
    with LiveServer(Path(str(resources.files("headrace") / "data" / "tiny"))) as server:
        yield server


def ask(question: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"model": MODEL_NAME, "messages": messages, "max_tokens": 200} | fields


def test_reasoning_and_answer(bundled: LiveServer) -> None:
    with openai.OpenAI(base_url=f"{bundled.url}/v1", api_key="any") as client:
        result = client.chat.completions.create(**ask("What is 123 + 456?"))
    message = result.choices[0].message
    assert "579" in message.content
    assert "carry" in message.model_extra["reasoning_content"]
    assert result.choices[0].finish_reason == "stop"
    assert result.usage.completion_tokens_details.reasoning_tokens > 0


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_a_tool_call_and_back(bundled: LiveServer, choice: str) -> None:
    fields = ask("What is 12 * 7?", tools=[CALCULATOR])
    with openai.OpenAI(base_url=f"{bundled.url}/v1", api_key="any") as client:
        first = client.chat.completions.create(**fields, tool_choice=choice).choices[0]
        assert first.finish_reason == "tool_calls"
        [call] = first.message.tool_calls
        assert json.loads(call.function.arguments)["expression"].replace(" ", "") == "12*7"
        result = {"role": "tool", "tool_call_id": call.id, "content": "84"}
        fields["messages"] += [first.message.model_dump(), result]
        last = client.chat.completions.create(**fields).choices[0]
    assert last.finish_reason == "stop"
    assert "84" in last.message.content


async def test_eight_streams_give_the_answers_of_one(bundled: LiveServer) -> None:
    client = openai.AsyncOpenAI(base_url=f"{bundled.url}/v1", api_key="any", max_retries=0)
    requests = [ask(f"What is {a} + {b}?") for a, b in SUMS]
    requests.append(ask("What is 12 * 7?", tools=[CALCULATOR]))

    async def answer(request: dict[str, Any]) -> dict[str, str]:
        parts = {"reasoning": "", "content": "", "arguments": "", "finish": ""}
        async for chunk in await client.chat.completions.create(**request, stream=True):
            delta = chunk.choices[0].delta
            parts["reasoning"] += (delta.model_extra or {}).get("reasoning_content") or ""
            parts["content"] += delta.content or ""
            for call in delta.tool_calls or []:
                parts["arguments"] += call.function.arguments or ""
            parts["finish"] = chunk.choices[0].finish_reason or ""
        return parts

    async with client:
        alone = [await answer(request) for request in requests]
        together = await asyncio.gather(*map(answer, requests))
    assert together == alone
    for (a, b), parts in zip(SUMS, alone, strict=False):
        assert str(a + b) in parts["content"]
    assert alone[-1]["finish"] == "tool_calls"
    assert "12" in alone[-1]["arguments"]


def test_a_disconnect_frees_the_request_within_two_steps(bundled: LiveServer) -> None:
    """A step of this model takes some 8 ms, long beside a message, so that steps can be counted.

    Unless the server has to wait for a core just then: one time of five must do.
    """
    assert any(steps_after_a_disconnect(bundled) <= 2 for _ in range(5))


def steps_after_a_disconnect(bundled: LiveServer) -> float:
    """Steps whose tokens the server hasn't had from the engine."""
    fields = ask("Hello", max_tokens=2000, ignore_eos=True, stream=True)
    wait_for(lambda: bundled.engine.stats.num_running == 0)
    steps, sent = bundled.engine.stats.num_steps, tokens_sent(bundled)
    with httpx.stream("POST", f"{bundled.url}/v1/chat/completions", json=fields) as response:
        lines = response.iter_lines()
        for _ in range(20):
            next(lines)
    wait_for(lambda: bundled.serving.num_in_flight == 0)
    wait_for(lambda: bundled.engine.stats.num_running == 0)
    steps_sent = tokens_sent(bundled) - sent  # each step made a token, the prefill's too
    assert 8 < steps_sent < 1000
    return bundled.engine.stats.num_steps - steps - steps_sent


def tokens_sent(server: LiveServer) -> float:
    """Tokens that the server has had from the engine."""
    lines = server.serving.metrics.render().decode().splitlines()
    [line] = [x for x in lines if x.startswith("vllm:generation_tokens_total{")]
    return float(line.split()[-1])
