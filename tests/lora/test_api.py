"""The bundled model's two adapters through the API."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from headrace.files import BUNDLED_MODEL
from headrace.lora.adapter import CONFIG_NAME
from headrace.server.adapters import ServedAdapter
from tests.server.live import MODEL_NAME, LiveServer, wait_for

ADAPTERS = BUNDLED_MODEL.parent / "adapters"
SKILLS = {MODEL_NAME: "add", "subtract": "subtract", "reverse": "reverse"}


def questions(skill: str, count: int) -> list[dict[str, Any]]:
    lines = (BUNDLED_MODEL.parent / "eval" / f"{skill}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[:count]]


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    modules = f"subtract={ADAPTERS / 'subtract'}", f"reverse={ADAPTERS / 'reverse'}"
    engine = {"enable_lora": True, "lora_modules": modules, "max_lora_rank": 8, "max_loras": 2}
    with LiveServer(BUNDLED_MODEL, engine) as live:
        yield live


@pytest.fixture
def http(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


async def answers(server: LiveServer, asked: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """The contents of the answers to questions that are asked at the same time."""
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
        found = await asyncio.gather(
            *(
                client.chat.completions.create(
                    model=model, max_tokens=400, temperature=0, **question["request"]
                )
                for model, question in asked
            )
        )
    for (model, _), answer in zip(asked, found, strict=True):
        assert answer.model == model
    return [str(answer.choices[0].message.content) for answer in found]


async def test_base_and_adapters_answer_rightly_in_one_batch(server: LiveServer) -> None:
    asked = [(m, q) for i in range(2) for m, s in SKILLS.items() for q in [questions(s, 2)[i]]]
    expected = [question["expected"]["content"] for _, question in asked]
    assert await answers(server, asked) == expected


async def test_the_same_question_to_all_three(server: LiveServer) -> None:
    """Asked at once, only the one that learnt the skill is right."""
    [question] = questions("subtract", 1)
    right = question["expected"]["content"]
    base, subtract, reverse = await answers(server, [(model, question) for model in SKILLS])
    assert subtract == right
    assert base != right
    assert reverse != right


def test_models_lists_adapters_with_their_parent(http: httpx.Client) -> None:
    cards = {card["id"]: card for card in http.get("/v1/models").json()["data"]}
    assert set(cards) == set(SKILLS)
    assert cards["reverse"]["parent"] == MODEL_NAME
    assert cards["reverse"]["root"] == str(ADAPTERS / "reverse")
    assert cards[MODEL_NAME]["parent"] is None
    assert http.get("/v1/models/subtract").json() == cards["subtract"]
    assert http.get("/v1/models/nothing").status_code == 404


def test_load_use_and_unload(server: LiveServer, http: httpx.Client) -> None:
    body = {"lora_name": "more", "lora_path": str(ADAPTERS / "reverse")}
    loaded = http.post("/v1/load_lora_adapter", json=body)
    assert (loaded.status_code, loaded.text) == (
        200,
        "Success: LoRA adapter 'more' added successfully.",
    )
    completion = {"model": "more", "prompt": "Hello", "max_tokens": 3}
    assert http.post("/v1/completions", json=completion).json()["model"] == "more"
    again = http.post("/v1/load_lora_adapter", json=body)
    assert again.status_code == 400
    assert "'more' is already loaded" in again.json()["error"]["message"]
    replaced = http.post("/v1/load_lora_adapter", json=body | {"load_inplace": True})
    assert replaced.status_code == 200
    text = http.get("/metrics").text
    assert 'headrace:lora_generation_tokens_total{lora_adapter="more"} 3.0' in text
    assert 'headrace:lora_requests_total{lora_adapter="more"} 1.0' in text
    stop = {"max_tokens": 50, "stop": [" ", "e", "1"], "ignore_eos": True}
    [stopped] = http.post("/v1/completions", json=completion | stop).json()["choices"]
    assert stopped["finish_reason"] == "stop"
    text = http.get("/metrics").text
    assert 'headrace:lora_requests_total{lora_adapter="more"} 2.0' in text
    body = {"lora_name": "more", "lora_int_id": None}  # as vLLM's clients say it
    removed = http.post("/v1/unload_lora_adapter", json=body)
    assert removed.text == "Success: LoRA adapter 'more' removed successfully."
    assert "more" not in http.get("/metrics").text
    gone = http.post("/v1/completions", json=completion)
    assert gone.status_code == 404
    assert gone.json()["error"]["message"] == "The model `more` does not exist."
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "more"}).status_code == 404


def test_the_counts_of_an_adapter_end_with_it(server: LiveServer, http: httpx.Client) -> None:
    """Though a request of it runs on."""
    body = {"lora_name": "step-1", "lora_path": str(ADAPTERS / "reverse")}
    assert http.post("/v1/load_lora_adapter", json=body).status_code == 200
    completion = {"model": "step-1", "prompt": "Hello", "max_tokens": 50, "ignore_eos": True}
    with http.stream("POST", "/v1/completions", json=completion | {"stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "step-1"}).status_code == 200
        assert "data: [DONE]" in list(lines)
    wait_for(lambda: not server.serving.num_in_flight)
    assert 'lora_adapter="step-1"' not in http.get("/metrics").text


def test_the_gauge_that_routers_read(server: LiveServer, http: httpx.Client) -> None:
    # far more tokens than there are until the gauge has been read
    completion = {"model": "subtract", "prompt": "Hello", "max_tokens": 1900, "ignore_eos": True}
    with http.stream("POST", "/v1/completions", json=completion | {"stream": True}) as response:
        lines = response.iter_lines()  # kept: its end would close the stream
        next(lines)
        wanted = 'max_lora="2",running_lora_adapters="subtract",waiting_lora_adapters=""}'
        wait_for(lambda: wanted in server.serving.metrics.render().decode())


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        ({"lora_name": "x", "lora_path": "/nowhere"}, 404, "No adapter found for /nowhere"),
        ({"lora_name": "x", "lora_path": str(BUNDLED_MODEL)}, 400, "adapter_config.json"),
        ({"lora_name": MODEL_NAME, "lora_path": "/x"}, 400, "the base model's name"),
        ({"lora_name": "x\ny", "lora_path": "/x"}, 400, "lora_name"),
        ({"lora_name": "x"}, 400, "lora_path"),
        ({"lora_name": "x", "lora_path": "~nobody-here/x"}, 404, "No adapter found"),
        ({"lora_name": "x", "lora_path": "a\0b"}, 404, "No adapter found"),
        ({"lora_name": "x", "lora_path": "a" * 5000}, 400, "failed"),
        ({"lora_name": "\ud800", "lora_path": "\ud800"}, 400, "lora_name"),
        ({"lora_name": "x", "lora_path": "\ud800"}, 400, "lora_path"),
        ({"lora_name": "x", "lora_path": "/x", "rank": 1}, 400, "rank"),
    ],
)
def test_loads_that_are_refused(
    http: httpx.Client, body: dict[str, Any], status: int, text: str
) -> None:
    content, headers = json.dumps(body), {"Content-Type": "application/json"}
    response = http.post("/v1/load_lora_adapter", content=content, headers=headers)
    assert response.status_code == status, response.text
    assert text in response.json()["error"]["message"]
    assert [c["id"] for c in http.get("/v1/models").json()["data"]] == list(SKILLS)


def test_a_load_whose_error_names_a_file_that_is_no_utf8(
    http: httpx.Client, tmp_path: Path
) -> None:
    """The engine can say so, and goes on."""
    shutil.copy(ADAPTERS / "reverse" / CONFIG_NAME, tmp_path)
    Path(os.fsdecode(bytes(tmp_path) + b"/adapter_model.\xff")).touch()
    body = {"lora_name": "x", "lora_path": str(tmp_path)}
    response = http.post("/v1/load_lora_adapter", json=body)
    assert response.status_code == 404
    assert r"convert adapter_model.\udcff to safetensors" in response.json()["error"]["message"]
    assert http.get("/health").status_code == 200


def test_whose_fault_it_is_that_an_adapter_is_not_there(tmp_path: Path) -> None:
    """500 where the server can't read it again; 404 where it was unloaded on the request's way."""
    for name in ("a", "b"):
        shutil.copytree(ADAPTERS / "reverse", tmp_path / name)
    modules = tuple(f"{name}={tmp_path / name}" for name in ("a", "b"))
    engine = {"enable_lora": True, "lora_modules": modules, "max_loras": 1, "max_cpu_loras": 1}
    with (
        LiveServer(BUNDLED_MODEL, engine) as live,
        httpx.Client(base_url=live.url, timeout=60) as client,
    ):
        shutil.rmtree(tmp_path / "b")
        completion = {"model": "b", "prompt": "Hello", "max_tokens": 3}
        lost = client.post("/v1/completions", json=completion)
        assert lost.status_code == 500
        assert "'b' could not be loaded" in lost.json()["error"]["message"]
        assert client.post("/v1/completions", json=completion | {"model": "a"}).status_code == 200
        live.serving.adapters._served["c"] = ServedAdapter("c", "unloaded a moment ago")
        gone = client.post("/v1/completions", json=completion | {"model": "c"})
        assert gone.status_code == 404
        assert gone.json()["error"]["message"] == "the LoRA adapter 'c' is not loaded"


def test_a_load_that_the_engine_never_ended_is_not_the_callers_fault() -> None:
    """500 when the engine dies, 503 while the server shuts down; whatever waits its turn, too."""
    body = {"lora_name": "x", "lora_path": str(ADAPTERS / "reverse")}
    for draining, status in ((False, 500), (True, 503)):
        with (
            LiveServer(BUNDLED_MODEL, {"enable_lora": True}) as live,
            httpx.Client(base_url=live.url, timeout=60) as client,
            ThreadPoolExecutor(2) as pool,
        ):
            os.kill(live.engine.process.pid, signal.SIGSTOP)
            replies = [
                pool.submit(client.post, "/v1/load_lora_adapter", json=body) for _ in range(2)
            ]
            wait_for(lambda live=live: live.engine._adapters)
            live.serving.draining = draining
            os.kill(live.engine.process.pid, signal.SIGKILL)
            assert [reply.result().status_code for reply in replies] == [status, status]
