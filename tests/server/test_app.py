"""The API on the real engine, as OpenAI's client and others see it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.live import MODEL_NAME, LiveServer, wait_for

PROMPTS = [f"{word}?" for word in ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs"]]


def chat_fields(prompt: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    return {"model": MODEL_NAME, "messages": messages, "max_tokens": 24, "temperature": 0} | fields


def metric_values(http: httpx.Client) -> dict[str, float]:
    families = text_string_to_metric_families(http.get("/metrics").text)
    return {
        sample.name + sample.labels.get("finished_reason", ""): sample.value
        for family in families
        for sample in family.samples
        if "le" not in sample.labels
    }


def test_chat(client: openai.OpenAI) -> None:
    result = client.chat.completions.create(**chat_fields("hi"))
    assert result.choices[0].finish_reason in ("stop", "length")
    assert result.choices[0].message.content
    assert result.usage is not None
    assert result.usage.prompt_tokens > 20
    chunks = list(client.chat.completions.create(**chat_fields("hi"), stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == result.choices[0].message.content


def test_a_forced_call_streams(client: openai.OpenAI) -> None:
    """What a random model writes as arguments is noise, but it is a call, in the right shape."""
    tools = [{"type": "function", "function": {"name": "add"}}]
    choice = {"type": "function", "function": {"name": "add"}}
    fields = chat_fields("hi", tools=tools, tool_choice=choice, max_tokens=8)
    [call] = client.chat.completions.create(**fields).choices[0].message.tool_calls
    assert call.function.name == "add"
    assert call.function.arguments
    chunks = list(client.chat.completions.create(**fields, stream=True))
    deltas = [d for c in chunks for d in c.choices[0].delta.tool_calls or []]
    assert [d.function.name for d in deltas] == ["add"] + [None] * (len(deltas) - 1)
    assert "".join(d.function.arguments or "" for d in deltas) == call.function.arguments


async def test_eight_streams_give_the_answers_of_one(live: LiveServer) -> None:
    client = openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="any", max_retries=0)

    async def ask(prompt: str) -> str:
        text = ""
        async for chunk in await client.chat.completions.create(**chat_fields(prompt), stream=True):
            text += chunk.choices[0].delta.content or ""
        return text

    async with client:
        alone = [await ask(prompt) for prompt in PROMPTS]
        together = await asyncio.gather(*map(ask, PROMPTS))
    assert together == alone
    assert len(set(alone)) > 1


def test_models(client: openai.OpenAI) -> None:
    [card] = client.models.list().data
    assert card.id == MODEL_NAME
    assert client.models.retrieve(MODEL_NAME) == card
    with pytest.raises(openai.NotFoundError, match="The model `other` does not exist"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="The model `other` does not exist"):
        client.chat.completions.create(**chat_fields("hi", model="other"))


def test_tokenize(http: httpx.Client) -> None:
    result = http.post("/tokenize", json={"prompt": "naïve 🙂", "return_token_strs": True}).json()
    assert result["count"] == len(result["tokens"]) == len(result["token_strs"])
    back = http.post("/detokenize", json={"tokens": result["tokens"]}).json()
    assert back == {"prompt": "naïve 🙂"}
    messages = [{"role": "user", "content": "hi"}]
    ids = http.post("/tokenize", json={"messages": messages}).json()["tokens"]
    text = http.post("/detokenize", json={"tokens": ids}).json()["prompt"]
    assert text.endswith("<|start|>user<|message|>hi<|end|><|start|>assistant")
    body = {"model": MODEL_NAME, "messages": messages, "max_tokens": 1}
    usage = http.post("/v1/chat/completions", json=body).json()["usage"]
    assert usage["prompt_tokens"] == len(ids)
    assert http.post("/tokenize", json={}).status_code == 400
    assert http.post("/detokenize", json={"tokens": [10**6]}).json()["error"]["param"] == "tokens"


def test_health_version_and_unknown_routes(http: httpx.Client) -> None:
    assert http.get("/health").json()["status"] == "ok"
    assert http.get("/version").json()["version"]
    for response, status in ((http.get("/nowhere"), 404), (http.get("/tokenize"), 405)):
        assert response.status_code == status
        assert response.json()["error"]["code"] == status


def test_metrics(http: httpx.Client) -> None:
    before = metric_values(http)
    body = {"model": MODEL_NAME, "prompt": "the quick", "max_tokens": 5, "ignore_eos": True}
    assert http.post("/v1/completions", json=body).status_code == 200
    after = metric_values(http)

    def grown(name: str) -> float:
        return after[f"vllm:{name}"] - before[f"vllm:{name}"]

    assert grown("generation_tokens_total") == 5
    assert grown("prompt_tokens_total") == 2
    assert grown("request_success_totallength") == 1
    assert grown("time_to_first_token_seconds_count") == 1
    assert grown("inter_token_latency_seconds_count") == 4
    assert grown("e2e_request_latency_seconds_count") == 1
    assert after["vllm:time_to_first_token_seconds_sum"] > 0
    wait_for(lambda: metric_values(http)["vllm:num_requests_running"] == 0)
    assert {"vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"} <= after.keys()
    assert after["vllm:cache_config_info"] == 1


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_frees_the_request(live: LiveServer, http: httpx.Client, stream: bool) -> None:
    wait_for(lambda: live.engine.stats.num_running == 0)
    before, steps = metric_values(http), live.engine.stats.num_steps
    body = {"model": MODEL_NAME, "prompt": "the", "max_tokens": 1900, "ignore_eos": True}
    if stream:
        with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
            lines = response.iter_lines()  # the response closes when this is let go of
            next(lines)
            assert live.serving.num_in_flight == 1
    else:
        connection = HTTPConnection(live.url.removeprefix("http://"))
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        wait_for(lambda: live.engine.stats.num_running == 1)
        connection.close()
    wait_for(lambda: live.serving.num_in_flight == 0)
    wait_for(lambda: live.engine.stats.num_running == 0)
    assert live.engine.stats.kv_cache_usage == 0
    after = metric_values(http)
    seen = after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"]
    # Two steps by the engine's own promise; the rest is room for the message on a busy machine.
    assert live.engine.stats.num_steps - steps - seen < 100
    assert seen < 1800
    aborted = "vllm:request_success_totalabort"
    assert after[aborted] == before[aborted] + 1
    body["max_tokens"] = 3
    assert http.post("/v1/completions", json=body).status_code == 200


def test_api_keys_and_a_killed_engine(model_dir: Path) -> None:
    with LiveServer(model_dir, api_key=("one", "two")) as live:
        check_keys(live)
        check_death(live)


def check_keys(live: LiveServer) -> None:
    for path in ("/health", "/metrics"):
        assert httpx.get(live.url + path, timeout=60).status_code == 200
    for header in ({}, {"Authorization": "Bearer three"}, {"Authorization": "Basic one"}):
        response = httpx.get(f"{live.url}/v1/models", headers=header, timeout=60)
        assert response.status_code == 401
        assert response.json()["error"]["type"] == "AuthenticationError"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="x").models.list()
    assert openai.OpenAI(base_url=f"{live.url}/v1", api_key="two").models.list().data


def check_death(live: LiveServer) -> None:
    """A running stream ends with an error event; later requests get 500, /health 503."""
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="one", max_retries=0)
    fields = {"model": MODEL_NAME, "prompt": "the", "max_tokens": 1900}
    stream = client.completions.create(**fields, stream=True, extra_body={"ignore_eos": True})
    next(stream)
    os.kill(live.engine.process.pid, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="the engine is gone"):
        list(stream)
    with pytest.raises(openai.InternalServerError, match="the engine is gone"):
        client.completions.create(**fields)
    response = httpx.get(f"{live.url}/health", timeout=60)
    assert response.status_code == 503
    assert response.json()["status"] == "dead"
    assert "exit code -9" in response.json()["reason"]


def test_the_document_is_complete(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    for path in ("/v1/completions", "/v1/chat/completions"):
        assert {"200", "400", "401", "404", "500", "503"} <= set(paths[path]["post"]["responses"])
        assert "422" not in paths[path]["post"]["responses"]
