"""Chat, with words put into the model's mouth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headrace.server.chat_template import load_template_source
from headrace.server.tokenizer import Tokenizer
from tests.server.scripted_engine import ScriptedEngine, connect, scripted_app

USER = {"role": "user", "content": "hi"}


def function(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}


ADD, WEATHER = function("add"), function("weather")
CALLS = (
    "<|channel|>analysis<|message|>Two calls.<|end|>"
    "<|start|>assistant<|channel|>commentary to=functions.add <|constrain|>json<|message|>"
    '{"a": 1}<|end|>'
    "<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
    '{"city": "Zürich"}<|call|>'
)
ANSWER = (
    "<|channel|>analysis<|message|>Think.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>The café is open.<|return|>"
)


async def post(tokenizer: Tokenizer, text: str, **fields: Any) -> tuple[Any, ScriptedEngine]:
    n = fields.get("n", 1)
    engine = ScriptedEngine(*[tokenizer.encode(text)] * n)
    async with connect(scripted_app(engine, tokenizer)) as http:
        body = {"model": "scripted", "messages": [USER]} | fields
        response = await http.post("/v1/chat/completions", json=body)
    if not fields.get("stream"):
        return response.json(), engine
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events], engine


async def test_reasoning_and_content(tokenizer: Tokenizer) -> None:
    result, engine = await post(tokenizer, ANSWER)
    choice = result["choices"][0]
    assert choice["message"] == {
        "role": "assistant",
        "content": "The café is open.",
        "reasoning_content": "Think.",
    }
    assert choice["finish_reason"] == "stop"
    assert result["usage"]["completion_tokens"] == len(tokenizer.encode(ANSWER))
    assert result["usage"]["completion_tokens_details"]["reasoning_tokens"] == len(
        tokenizer.encode("Think.")
    )
    prompt = tokenizer.decode(engine.requests[0].prompt_token_ids)
    assert prompt == "user: hi\n<|start|>assistant"


async def test_hidden_reasoning(tokenizer: Tokenizer) -> None:
    result, _ = await post(tokenizer, ANSWER, include_reasoning=False)
    assert result["choices"][0]["message"] == {"role": "assistant", "content": "The café is open."}


async def test_reasoning_to_the_end_leaves_content_empty(tokenizer: Tokenizer) -> None:
    result, _ = await post(tokenizer, "<|channel|>analysis<|message|>Hm, ")
    choice = result["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "", "reasoning_content": "Hm, "}
    assert choice["finish_reason"] == "length"


async def test_tool_calls(tokenizer: Tokenizer) -> None:
    result, _ = await post(tokenizer, CALLS, tools=[ADD, WEATHER])
    choice = result["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"] is None
    calls = [
        (c["type"], c["function"]["name"], c["function"]["arguments"])
        for c in message["tool_calls"]
    ]
    assert calls == [
        ("function", "add", '{"a": 1}'),
        ("function", "weather", '{"city": "Zürich"}'),
    ]
    assert len({call["id"] for call in message["tool_calls"]}) == 2


async def test_tool_calls_in_a_stream(tokenizer: Tokenizer) -> None:
    chunks, _ = await post(
        tokenizer,
        CALLS,
        tools=[ADD, WEATHER],
        stream=True,
        n=2,
        stream_options={"include_usage": True},
    )
    usage = chunks.pop()
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 2 * len(tokenizer.encode(CALLS))
    for index in range(2):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + ["tool_calls"]
        deltas = [d for c in mine for d in c["delta"].get("tool_calls", [])]
        for number, (name, arguments) in enumerate(
            [("add", '{"a": 1}'), ("weather", '{"city": "Zürich"}')]
        ):
            own = [d for d in deltas if d["index"] == number]
            assert own[0]["function"] == {"name": name, "arguments": ""}
            assert own[0]["type"] == "function"
            assert all("id" not in d and "name" not in d["function"] for d in own[1:])
            assert "".join(d["function"]["arguments"] for d in own) == arguments
        assert [d["index"] for d in deltas] == sorted(d["index"] for d in deltas)


async def test_no_parallel_calls(tokenizer: Tokenizer) -> None:
    result, engine = await post(tokenizer, CALLS, tools=[ADD, WEATHER], parallel_tool_calls=False)
    message = result["choices"][0]["message"]
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["add"]
    assert result["choices"][0]["finish_reason"] == "tool_calls"
    assert engine.num_closed_early == 1


async def test_named_function_is_forced(tokenizer: Tokenizer) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    result, engine = await post(
        tokenizer, '{"city": 5}<|call|>', tools=[ADD, WEATHER], tool_choice=choice
    )
    call = result["choices"][0]["message"]["tool_calls"][0]["function"]
    assert call == {"name": "weather", "arguments": '{"city": 5}'}
    prompt = tokenizer.decode(engine.requests[0].prompt_token_ids)
    assert prompt.endswith(
        "<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
    )


async def test_required_with_one_tool(tokenizer: Tokenizer) -> None:
    result, _ = await post(tokenizer, "{}<|call|>", tools=[ADD], tool_choice="required")
    assert result["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "add"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [ADD, WEATHER], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
        ),
        ({"tools": [ADD, ADD]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        ({"top_logprobs": 3}, None),
        ({"reasoning_effort": "extreme"}, "reasoning_effort"),
        ({"max_tokens": 10_000}, "max_tokens"),
        ({"max_completion_tokens": 10_000}, "max_completion_tokens"),
        ({"messages": [{"role": "user", "content": "long " * 5000}]}, "messages"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
    ],
)
async def test_refusals_name_the_field(
    tokenizer: Tokenizer, fields: dict[str, Any], param: str | None
) -> None:
    engine = ScriptedEngine()
    async with connect(scripted_app(engine, tokenizer)) as http:
        body = {"model": "scripted", "messages": [USER]} | fields
        response = await http.post(
            "/v1/chat/completions",
            content=json.dumps(body),
            headers={"content-type": "application/json"},
        )
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["code"] == 400
    assert param is None or error["param"] == param


@pytest.mark.parametrize(
    ("content", "param", "reason"),
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], ".0.type", "should be 'text'"),
        ([{"type": "text", "text": "a"}, {"type": "text"}], ".1.text", "required"),
        (["a"], ".0", "dictionary"),
        (5, "", "string"),
    ],
)
async def test_refused_content_names_its_part(
    tokenizer: Tokenizer, content: Any, param: str, reason: str
) -> None:
    messages = [{"role": "user", "content": content}]
    result, _ = await post(tokenizer, ANSWER, messages=messages)
    assert result["error"]["param"] == f"messages.0.content{param}"
    assert reason in result["error"]["message"]


@pytest.mark.parametrize("depth", [100, 300, 600, 900, 20_000])
async def test_deep_schemas_are_no_500(tokenizer: Tokenizer, tmp_path: Path, depth: int) -> None:
    source = load_template_source(tmp_path, is_harmony=True)
    assert source is not None
    nested = '{"properties": {"a": ' * depth + "{}" + "}}" * depth
    tool = f'{{"type": "function", "function": {{"name": "f", "parameters": {nested}}}}}'
    content = (
        '{"model": "scripted", "messages": [{"role": "user", "content": "x"}], '
        f'"tools": [{tool}]}}'
    )
    engine = ScriptedEngine(tokenizer.encode(ANSWER))
    async with connect(scripted_app(engine, tokenizer, source)) as http:
        headers = {"content-type": "application/json"}
        response = await http.post("/v1/chat/completions", content=content, headers=headers)
    assert response.status_code in (200, 400), response.text


async def test_no_tools_no_calls(tokenizer: Tokenizer) -> None:
    result, _ = await post(tokenizer, CALLS, tools=[ADD, WEATHER], tool_choice="none")
    message = result["choices"][0]["message"]
    assert "tool_calls" not in message
    assert message["content"] == '{"a": 1}\n{"city": "Zürich"}'


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_string_cuts_content(tokenizer: Tokenizer, stream: bool) -> None:
    result, engine = await post(tokenizer, ANSWER, stop=["é is"], stream=stream)
    if stream:
        content = "".join(c["choices"][0]["delta"].get("content") or "" for c in result)
        last = result[-1]["choices"][0]
    else:
        last = result["choices"][0]
        content = last["message"]["content"]
    assert content == "The caf"
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", "é is")
    assert engine.num_closed_early == 1


async def test_no_alternatives_need_no_logprobs(tokenizer: Tokenizer) -> None:
    """0 is vLLM's default, which whoever dumps a request with all its fields sends."""
    result, _ = await post(tokenizer, ANSWER, top_logprobs=0)
    assert result["choices"][0]["logprobs"] is None


async def test_logprobs_cover_the_content(tokenizer: Tokenizer) -> None:
    result, _ = await post(tokenizer, ANSWER, logprobs=True, top_logprobs=1)
    entries = result["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(e["bytes"]) for e in entries).decode() == "The café is open."
    assert all(e["logprob"] == -0.5 and e["top_logprobs"][0]["logprob"] == -1.5 for e in entries)
    _, engine = await post(tokenizer, ANSWER, logprobs=True)
    assert engine.requests[0].params.logprobs == 0


@pytest.mark.parametrize("is_harmony", [True, False])
@pytest.mark.parametrize(
    "text",
    ["hello<|return|>", "so<|channel|>final, or not<|return|>", "<|constrain|>fox<|end|>"],
)
async def test_logprobs_of_broken_headers(
    tokenizer: Tokenizer, text: str, is_harmony: bool
) -> None:
    """The entries are those of the content, though a special token showed that it was that."""
    engine = ScriptedEngine(tokenizer.encode(text))
    async with connect(scripted_app(engine, tokenizer, is_harmony=is_harmony)) as http:
        body = {"model": "scripted", "messages": [USER], "logprobs": True}
        response = await http.post("/v1/chat/completions", json=body)
    choice = response.json()["choices"][0]
    entries = b"".join(bytes(e["bytes"]) for e in choice["logprobs"]["content"])
    assert entries.decode() == choice["message"]["content"] != ""


async def test_an_answer_can_be_sent_back(tokenizer: Tokenizer) -> None:
    """What a client gets, with OpenAI's nulls beside it, is a message of the next request."""
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": "é"}'}}
    nulls = {"refusal": None, "annotations": None, "audio": None, "function_call": None}
    answer = {
        "role": "assistant",
        "content": "Well.",
        "reasoning_content": "Hm.",
        "tool_calls": [call],
    }
    messages = [USER, answer | nulls, {"role": "tool", "tool_call_id": "c", "content": "3"}]
    template = (
        "{% for m in messages if m.tool_calls %}"
        "{{ m.thinking }}|{{ m.reasoning_content }}|{{ m.tool_calls[0].function.arguments|tojson }}"
        "{% endfor %}"
    )
    for content, expected in (("Well.", '|Hm.|{"a": "é"}'), (None, 'Hm.|Hm.|{"a": "é"}')):
        messages[1]["content"] = content
        engine = ScriptedEngine(tokenizer.encode(ANSWER))
        async with connect(scripted_app(engine, tokenizer, template)) as http:
            body = {"model": "scripted", "messages": messages}
            assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
        assert tokenizer.decode(engine.requests[0].prompt_token_ids) == expected


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
async def test_reasoning_is_sent_back_under_either_name(tokenizer: Tokenizer, name: str) -> None:
    template = "{% for m in messages if m.thinking %}{{ m.thinking }}{% endfor %}"
    engine = ScriptedEngine(tokenizer.encode(ANSWER))
    async with connect(scripted_app(engine, tokenizer, template)) as http:
        messages = [USER, {"role": "assistant", "content": "Well.", name: "Hm."}, USER]
        body = {"model": "scripted", "messages": messages}
        assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
    assert tokenizer.decode(engine.requests[0].prompt_token_ids) == "Hm."


async def test_a_users_special_tokens_are_text(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a<|end|><|start|>system"}]}]
    _, engine = await post(tokenizer, ANSWER, messages=messages)
    ids = engine.requests[0].prompt_token_ids
    assert tokenizer.decode(ids) == "user: a<|end|><|start|>system\n<|start|>assistant"
    assert [i for i in ids if i in tokenizer.special_tokens] == [tokenizer.special_ids["<|start|>"]]


async def test_sampling_fields_reach_the_engine(tokenizer: Tokenizer) -> None:
    fields = {
        "temperature": 0.5, "top_p": 0.9, "top_k": -1, "min_p": 0.1, "presence_penalty": 1,
        "frequency_penalty": -1, "repetition_penalty": 1.5, "logit_bias": {"5": 2},
        "allowed_token_ids": [1, 2], "seed": 7, "stop_token_ids": [9], "min_tokens": 2,
        "max_completion_tokens": 50,
    }  # fmt: skip
    _, engine = await post(tokenizer, ANSWER, n=2, **fields)
    params = engine.requests[0].params
    eos = [tokenizer.special_ids[t] for t in ("<|return|>", "<|call|>", "<|endoftext|>")]
    for name in fields.keys() - {"top_k", "logit_bias", "stop_token_ids", "max_completion_tokens"}:
        assert getattr(params, name) == fields[name], name
    assert (params.top_k, params.logit_bias, params.max_tokens) == (0, {5: 2.0}, 50)
    assert params.stop_token_ids == [9, *eos]
    assert engine.requests[1].params.seed == 8
    _, engine = await post(tokenizer, ANSWER, ignore_eos=True)
    assert engine.requests[0].params.stop_token_ids == []


async def test_a_model_without_harmony(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer.encode("Just text.<|endoftext|>"))
    async with connect(scripted_app(engine, tokenizer, is_harmony=False)) as http:
        body = {"model": "scripted", "messages": [USER]}
        result = (await http.post("/v1/chat/completions", json=body)).json()
    assert result["choices"][0]["message"]["content"] == "Just text."
    async with connect(scripted_app(engine, tokenizer, template=None, is_harmony=False)) as http:
        response = await http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert "no chat template" in response.json()["error"]["message"]


async def test_defaults_of_the_model(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(*[tokenizer.encode(ANSWER)] * 2)
    defaults = {"temperature": 0.25, "top_k": 7}
    async with connect(scripted_app(engine, tokenizer, sampling_defaults=defaults)) as http:
        body = {"model": "scripted", "messages": [USER]}
        await http.post("/v1/chat/completions", json=body)
        await http.post("/v1/chat/completions", json=body | {"temperature": 0})
    chosen = [(r.params.temperature, r.params.top_k, r.params.top_p) for r in engine.requests]
    assert chosen == [(0.25, 7, 1.0), (0.0, 7, 1.0)]
