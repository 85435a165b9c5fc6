from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import httpx
import openai
import pytest
from pydantic import ValidationError

from headrace.server.protocol import CompletionRequest
from headrace.server.tokenizer import Tokenizer
from tests.server.live import MODEL_NAME
from tests.server.scripted_engine import ScriptedEngine, connect, scripted_app

GREEDY: dict[str, Any] = {"model": MODEL_NAME, "max_tokens": 8, "temperature": 0}


def test_all_forms_of_a_prompt(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    texts = ["the quick", "brown fox"]
    ids = [tokenizer.encode(text) for text in texts]
    both = client.completions.create(prompt=texts, **GREEDY).choices
    assert [choice.index for choice in both] == [0, 1]
    assert client.completions.create(prompt=ids, **GREEDY).choices == both
    for prompt in (texts[0], ids[0]):
        alone = client.completions.create(prompt=prompt, **GREEDY)
        assert alone.choices[0].text == both[0].text != ""
        assert alone.usage is not None
        assert alone.usage.prompt_tokens == len(ids[0])
        assert alone.usage.completion_tokens == 8


def test_echo_with_logprobs_scores_the_prompt(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    """The scores of generated tokens, taken again as scores of a prompt, are the same."""
    first = client.completions.create(prompt="the quick", logprobs=2, **GREEDY).choices[0]
    assert first.logprobs is not None
    ids = tokenizer.encode("the quick")
    scored = client.completions.create(
        prompt="the quick", **GREEDY | {"max_tokens": 3}, logprobs=2, echo=True
    ).choices[0]
    assert scored.logprobs is not None
    assert scored.text.startswith("the quick")
    assert scored.logprobs.token_logprobs[0] is None
    assert scored.logprobs.top_logprobs[0] is None
    assert scored.logprobs.text_offset[: len(ids)] == [0, *map(len, offsets(tokenizer, ids))]
    assert len(scored.logprobs.tokens) == len(ids) + 3
    again = scored.logprobs.token_logprobs[len(ids) :]
    assert again == pytest.approx(first.logprobs.token_logprobs[:3], abs=1e-4)
    for token, logprob, top in zip(
        first.logprobs.tokens,
        first.logprobs.token_logprobs,
        first.logprobs.top_logprobs,
        strict=True,
    ):
        assert top[token] == logprob == max(top.values()) < 0  # greedy


def offsets(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.decode(ids[:end]) for end in range(1, len(ids))]


def test_echo_alone(client: openai.OpenAI) -> None:
    fields = GREEDY | {"max_tokens": 0}
    choice = client.completions.create(prompt="the quick", echo=True, **fields).choices[0]
    assert (choice.text, choice.finish_reason) == ("the quick", "length")
    choice = client.completions.create(prompt="the quick", echo=True, logprobs=1, **fields).choices[
        0
    ]
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in choice.logprobs.token_logprobs[1:])


def test_stream_equals_whole(client: openai.OpenAI) -> None:
    fields = GREEDY | {"max_tokens": 30}
    whole = client.completions.create(prompt=["a", "b"], n=1, logprobs=1, **fields)
    chunks = list(
        client.completions.create(
            prompt=["a", "b"],
            logprobs=1,
            stream=True,
            stream_options={"include_usage": True},
            **fields,
        )
    )
    assert chunks.pop().usage.total_tokens == whole.usage.total_tokens
    for choice in whole.choices:
        mine = [c.choices[0] for c in chunks if c.choices[0].index == choice.index]
        assert "".join(c.text for c in mine) == choice.text
        assert [t for c in mine if c.logprobs for t in c.logprobs.tokens] == choice.logprobs.tokens
        assert mine[-1].finish_reason == choice.finish_reason


def test_seed(client: openai.OpenAI) -> None:
    fields = GREEDY | {"temperature": 1}

    def texts(seed: int, n: int) -> list[str]:
        choices = client.completions.create(prompt="the", seed=seed, n=n, **fields).choices
        return [choice.text for choice in choices]

    three = texts(5, 3)
    assert len(set(three)) == 3
    assert [texts(seed, 1)[0] for seed in (5, 6, 7)] == three


def test_stop_string_on_the_real_model(client: openai.OpenAI) -> None:
    fields = GREEDY | {"max_tokens": 40}
    free = client.completions.create(prompt="lazy dog", **fields).choices[0].text
    stop = free[10:13]
    cut = client.completions.create(prompt="lazy dog", stop=[stop], **fields).choices[0]
    assert cut.text == free.split(stop)[0]
    assert cut.finish_reason == "stop"
    assert cut.model_extra["stop_reason"] == stop


def test_truncation_and_allowed_tokens(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("brown fox jumps")
    fields = {"extra_body": {"truncate_prompt_tokens": 2, "allowed_token_ids": [65, 66]}}
    result = client.completions.create(prompt=ids, **GREEDY, **fields)
    assert result.usage.prompt_tokens == 2
    assert set(result.choices[0].text) <= set(tokenizer.decode([65, 66]))


def test_a_thousand_wrong_ids_are_not_a_thousand_errors() -> None:
    for prompt in ([-1] * 1000, [[-1] * 1000]):
        with pytest.raises(ValidationError) as refusal:
            CompletionRequest(model=MODEL_NAME, prompt=prompt)
        assert refusal.value.error_count() < 10


async def test_stop_tokens_end_without_text(tokenizer: Tokenizer) -> None:
    end, dot = tokenizer.special_ids["<|return|>"], tokenizer.encode(",")[0]
    script = [*tokenizer.encode("fox"), dot, end]
    for stops, reason, text in (([], None, "fox,"), ([dot], dot, "fox")):
        engine = ScriptedEngine(script)
        async with connect(scripted_app(engine, tokenizer)) as http:
            body = {"model": "scripted", "prompt": "a", "stop_token_ids": stops}
            choice = (await http.post("/v1/completions", json=body)).json()["choices"][0]
        assert (choice["text"], choice["stop_reason"], choice["finish_reason"]) == (
            text,
            reason,
            "stop",
        )


async def test_special_tokens_are_shown_when_asked_for(tokenizer: Tokenizer) -> None:
    script = tokenizer.encode("<|channel|>final<|message|>x")
    for skip, text in ((True, "finalx"), (False, "<|channel|>final<|message|>x")):
        engine = ScriptedEngine(script)
        async with connect(scripted_app(engine, tokenizer)) as http:
            body = {"model": "scripted", "prompt": "a", "skip_special_tokens": skip}
            choice = (await http.post("/v1/completions", json=body)).json()["choices"][0]
        assert choice["text"] == text


@pytest.mark.parametrize("skip", [True, False])
async def test_echo_is_the_prompt_as_it_was_sent(tokenizer: Tokenizer, skip: bool) -> None:
    prompt = "<|start|>user<|message|>a"
    engine = ScriptedEngine(tokenizer.encode("<|channel|>b"))
    async with connect(scripted_app(engine, tokenizer)) as http:
        body = {"model": "scripted", "prompt": prompt, "echo": True, "skip_special_tokens": skip}
        choice = (await http.post("/v1/completions", json=body)).json()["choices"][0]
    assert choice["text"] == prompt + ("b" if skip else "<|channel|>b")


async def test_a_stop_string_waits_for_min_tokens(tokenizer: Tokenizer) -> None:
    script = tokenizer.encode("x x x x")
    engine = ScriptedEngine(script)
    async with connect(scripted_app(engine, tokenizer)) as http:
        body = {"model": "scripted", "prompt": "a", "stop": "x", "min_tokens": 3}
        choice = (await http.post("/v1/completions", json=body)).json()["choices"][0]
    assert choice["text"].startswith("x x")
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [2**31]}, "prompt"),
        ({"prompt": [100_000]}, "prompt"),
        ({"prompt": [10**400]}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a"] * 100, "n": 2}, "n"),
        ({"prompt": "a " * 4000}, "prompt"),
        ({"prompt": "\udc00"}, "prompt"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"seed": 2**63}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 2**200}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"\ud800": 2}, None),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 65}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [9999]}, "allowed_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"stream_options": {"include_usage": True}}, None),
        ({"stream": "yes"}, "stream"),
        ({"model": None}, "model"),
    ],
)
def test_refusals_name_the_field(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    body = {"model": MODEL_NAME, "prompt": "a"} | fields
    response = http.post(
        "/v1/completions", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    if param is not None:
        assert param.split(".")[0] in error["message"]


@pytest.mark.parametrize("field", ["n", "stream", "echo", "min_tokens", "suffix", "best_of"])
def test_null_is_absent(http: httpx.Client, field: str) -> None:
    """OpenAI's API has them nullable; whoever dumps a request with all its fields sends them."""
    body = GREEDY | {"prompt": "a"}
    plain = http.post("/v1/completions", json=body).json()
    response = http.post("/v1/completions", json=body | {field: None})
    assert response.status_code == 200, response.text
    assert response.json()["choices"] == plain["choices"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"a"', b"\xff", b"[" * 100_000, b'{"n": ' + b"9" * 5000 + b"}"],
)
def test_broken_bodies(http: httpx.Client, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    response = http.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded"])
def test_a_body_that_is_not_called_json(http: httpx.Client, content_type: str) -> None:
    """What `curl -d` sends when nobody names the type."""
    body = json.dumps(GREEDY | {"prompt": "a"})
    response = http.post("/v1/completions", content=body, headers={"content-type": content_type})
    assert response.status_code == 400
    assert "Content-Type: application/json" in response.json()["error"]["message"]


def test_a_rule_between_fields_is_told_in_its_own_words(http: httpx.Client) -> None:
    body = GREEDY | {"prompt": "a", "stream_options": {"include_usage": True}}
    error = http.post("/v1/completions", json=body).json()["error"]
    assert error["message"] == "stream_options is only allowed with stream=true"


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
async def test_a_prompt_being_tokenized_holds_up_nobody(tokenizer: Tokenizer, path: str) -> None:
    class Waiting(Tokenizer):
        """Encodes only once another request has been answered meanwhile."""

        def encode(self, text: str) -> list[int]:
            started.set()
            assert answered.wait(20), "nobody was answered meanwhile"
            return [1]

    started, answered = threading.Event(), threading.Event()
    engine = ScriptedEngine([5])
    waiting = Waiting(lambda text: [], {}, tokenizer.special_ids)
    async with connect(scripted_app(engine, waiting)) as http:
        slow = asyncio.create_task(http.post(path, json={"model": "scripted", "prompt": "long"}))
        assert await asyncio.to_thread(started.wait, 20)
        assert (await http.get("/version")).status_code == 200
        answered.set()
        assert (await slow).status_code == 200
