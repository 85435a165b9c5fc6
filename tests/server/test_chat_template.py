from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from headrace.config import ConfigError
from headrace.server.chat_template import ChatTemplate, load_template_source
from headrace.server.errors import ApiError
from headrace.server.tokenizer import Tokenizer, load_tokenizer

USER = {"role": "user", "content": "2+2?"}


def same(text: str) -> str:
    return text


@pytest.mark.parametrize(
    "source", ["{{ raise_exception('no system') }}", "{{ messages.x.y }}", "{{ 1 / 0 }}"]
)
def test_a_refusing_template_is_the_callers_400(source: str) -> None:
    with pytest.raises(ApiError) as caught:
        ChatTemplate(source, same).render([USER])
    assert caught.value.status == 400


def test_the_sandbox_holds() -> None:
    template = ChatTemplate("{{ messages.__class__.__mro__ }}{{ messages.append(1) }}", same)
    with pytest.raises(ApiError):
        template.render([USER])


def test_a_broken_template_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="not valid Jinja"):
        ChatTemplate("{% if %}", same)


def test_where_templates_come_from(tmp_path: Path) -> None:
    assert load_template_source(tmp_path, is_harmony=False) is None
    ours = load_template_source(tmp_path, is_harmony=True)
    assert ours is not None
    assert "<|start|>" in ours
    named = [{"name": "tools", "template": "a"}, {"name": "default", "template": "b"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert load_template_source(tmp_path, is_harmony=True) == "b"
    (tmp_path / "chat_template.jinja").write_text("c")
    assert load_template_source(tmp_path, is_harmony=True) == "c"


def ours(tokenizer: Tokenizer, tmp_path: Path) -> ChatTemplate:
    source = load_template_source(tmp_path, is_harmony=True)
    assert source is not None
    return ChatTemplate(source, tokenizer.quote)


def test_our_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    call = {"id": "c1", "function": {"name": "add", "arguments": {"a": "é"}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": "", "reasoning_content": "Add.", "tool_calls": [call]},
        {"role": "tool", "content": "4", "tool_call_id": "c1"},
    ]
    parameters = {"type": "object", "properties": {"a": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "add", "parameters": parameters}}]
    text = ours(tokenizer, tmp_path).render(messages, tools, "high")
    assert "Reasoning: high" in text
    assert "<|start|>developer<|message|># Instructions\n\nBe brief." in text
    assert "type add = (_: {\na?: string,\n}) => any;" in text
    assert text.endswith(
        "<|start|>user<|message|>2+2?<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>Add.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.add <|constrain|>json<|message|>"
        '{"a": "é"}<|call|>'
        "<|start|>functions.add to=assistant<|channel|>commentary<|message|>4<|end|>"
        "<|start|>assistant"
    )


def test_a_result_goes_by_its_calls_name(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The latest call of its id; without one, the latest call."""

    def call(call_id: str, name: str) -> dict[str, Any]:
        return {"id": call_id, "function": {"name": name, "arguments": "{}"}}

    def result(call_id: str) -> dict[str, Any]:
        return {"role": "tool", "content": call_id, "tool_call_id": call_id}

    messages = [
        USER,
        {"role": "assistant", "tool_calls": [call("c1", "add"), call("c2", "weather")]},
        *(result("c2"), result("c1"), result("unknown")),
        {"role": "assistant", "tool_calls": [call("c1", "spell"), call("c3", "copy")]},
        *(result("c1"), result("c2"), {"role": "tool", "content": "no id"}),
    ]
    text = ours(tokenizer, tmp_path).render(messages)
    headers = [part.split(" to=assistant")[0] for part in text.split("<|start|>functions.")[1:]]
    assert headers == ["weather", "add", "add", "spell", "weather", "weather"]


@pytest.mark.skipif("TIKTOKEN_ENCODINGS_BASE" not in os.environ, reason="needs o200k_base.tiktoken")
@pytest.mark.parametrize("with_tools", [False, True])
def test_agrees_with_openai(tmp_path: Path, with_tools: bool) -> None:
    """The same conversation, rendered by openai-harmony, up to the date and blank lines."""
    import openai_harmony as oh

    o200k = load_tokenizer(tmp_path)
    parameters: dict[str, Any] = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "Where"},
            "days": {"type": "integer"},
        },
        "required": ["city"],
    }
    spec = {"name": "weather", "description": "Look it up", "parameters": parameters}
    tools = [{"type": "function", "function": spec}] if with_tools else None
    messages = [{"role": "system", "content": "Be brief."}, USER]
    text = ours(o200k, tmp_path).render(messages, tools, "low")
    developer = oh.DeveloperContent.new().with_instructions("Be brief.")
    if with_tools:
        developer = developer.with_function_tools([oh.ToolDescription.new(**spec)])
    date = text.split("Current date: ")[1][:10]
    system = oh.SystemContent.new().with_reasoning_effort(oh.ReasoningEffort.LOW)
    conversation = oh.Conversation.from_messages(
        [
            oh.Message.from_role_and_content(
                oh.Role.SYSTEM, system.with_conversation_start_date(date)
            ),
            oh.Message.from_role_and_content(oh.Role.DEVELOPER, developer),
            oh.Message.from_role_and_content(oh.Role.USER, "2+2?"),
        ]
    )
    encoding = oh.load_harmony_encoding(oh.HarmonyEncodingName.HARMONY_GPT_OSS)
    theirs = encoding.render_conversation_for_completion(conversation, oh.Role.ASSISTANT)
    assert o200k.encode(text) == list(theirs)
