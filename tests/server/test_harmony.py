from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.server.harmony import Delta, HarmonyParser, speaks_harmony
from headrace.server.tokenizer import Tokenizer, load_tokenizer
from tests.server.live import SPECIALS

TOOLS = ("add", "get_weather")


def parse(tokenizer: Tokenizer, text: str, tools: tuple[str, ...] = TOOLS) -> dict:
    return collect(run(tokenizer, tokenizer.encode(text), tools))


def run(tokenizer: Tokenizer, ids: list[int], tools: tuple[str, ...] = TOOLS) -> list[Delta]:
    parser = HarmonyParser(tokenizer, tools)
    return [delta for i in ids for delta in parser.feed(i)] + parser.finish()


def collect(deltas: list[Delta]) -> dict:
    result: dict = {"reasoning": "", "content": "", "calls": []}
    for delta in deltas:
        if delta.name is not None:
            result["calls"].append([delta.name, ""])
        if delta.kind == "tool":
            assert delta.call == len(result["calls"]) - 1
            result["calls"][-1][1] += delta.text
        else:
            result[delta.kind] += delta.text
    return result


def expected(reasoning: str = "", content: str = "", *calls: list[str]) -> dict:
    return {"reasoning": reasoning, "content": content, "calls": list(calls)}


CALL = '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}<|call|>'
WELL_FORMED = {
    "<|channel|>final<|message|>Hi 🙂<|return|>": expected("", "Hi 🙂"),
    "<|channel|>analysis<|message|>Hm.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Yes<|end|>": expected("Hm.", "Yes"),
    "<|channel|>commentary<|message|>I'll add.<|end|><|start|>assistant" + CALL: (
        expected("", "I'll add.", ["add", '{"a": 1}'])
    ),
    ' to=functions.add<|channel|>commentary <|constrain|>json<|message|>{"a": 2}<|call|>': (
        expected("", "", ["add", '{"a": 2}'])
    ),
    ' to=functions.add<|channel|>commentary json<|message|>{"a": 3}<|call|>': (
        expected("", "", ["add", '{"a": 3}'])
    ),
    "<|channel|>analysis to=functions.add code<|message|>{}<|call|>": expected(
        "", "", ["add", "{}"]
    ),
    "<|channel|>commentary to=add json<|message|>{}<|call|>": expected("", "", ["add", "{}"]),
    CALL + "<|start|>assistant" + CALL.replace("add", "get_weather"): (
        expected("", "", ["add", '{"a": 1}'], ["get_weather", '{"a": 1}'])
    ),
    "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b": (
        expected("a\nb")
    ),
}
MALFORMED = {
    "": expected(),
    "Hello world": expected("", "Hello world"),
    "Hello<|return|>": expected("", "Hello"),
    "assistant": expected("", "assistant"),
    "<|channel|>musings<|message|>x<|end|>": expected("", "x"),
    "<|message|>x<|end|>": expected("", "x"),
    "<|channel|>final": expected("", "final"),
    "<|channel|>this is not a channel, is it?": expected("", "this is not a channel, is it?"),
    "<|channel|>analysis<|message|>a<|channel|>final<|message|>b": expected("a", "b"),
    "<|channel|>analysis<|message|>a<|end|>assistant<|channel|>final<|message|>b": (
        expected("a", "b")
    ),
    "<|channel|>analysis<|message|>a<|end|>So the answer is 5": expected("a", "So the answer is 5"),
    "<|channel|>final<|message|>a<|constrain|>b<|message|>c": expected("", "abc"),
    "<|start|><|start|><|end|><|call|><|channel|><|channel|><|message|><|message|>": expected(),
    "<|channel|>final<|message|>a<|start|>user<|message|>b": expected("", "a\nb"),
    "<|endoftext|>x": expected("", "x"),
}


@pytest.mark.parametrize(("text", "result"), [*WELL_FORMED.items(), *MALFORMED.items()])
def test_parse(tokenizer: Tokenizer, text: str, result: dict) -> None:
    assert parse(tokenizer, text) == result


def test_without_tools_a_call_is_content(tokenizer: Tokenizer) -> None:
    assert parse(tokenizer, CALL, tools=()) == expected("", '{"a": 1}')


def test_counts(tokenizer: Tokenizer) -> None:
    parser = HarmonyParser(tokenizer, TOOLS)
    for i in tokenizer.encode("<|channel|>analysis<|message|>abc<|end|><|start|>assistant" + CALL):
        parser.feed(i)
    assert parser.num_calls == 1
    assert parser.num_reasoning_tokens == len(tokenizer.encode("abc"))


words = st.sampled_from(
    [
        *(*SPECIALS, *SPECIALS, "assistant", " to=functions.add", "analysis", "final"),
        *("commentary", " json", "hello", " ", "é", "🧀", '{"a": 1}'),
    ]
)


@given(st.lists(words, max_size=30))
def test_near_harmony_never_fails_and_loses_no_content(
    tokenizer: Tokenizer, parts: list[str]
) -> None:
    check(tokenizer, [i for part in parts for i in tokenizer.encode(part)])


@given(st.lists(st.integers(0, 450), max_size=60))
def test_any_tokens(tokenizer: Tokenizer, ids: list[int]) -> None:
    check(tokenizer, ids)


def check(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Special tokens never show, and message bodies come out whole, in order."""
    deltas = run(tokenizer, ids)
    result = collect(deltas)
    shown = result["reasoning"] + result["content"] + "".join(c[1] for c in result["calls"])
    plain = tokenizer.decode(ids, skip_special_tokens=True)
    assert set(shown) <= set(plain) | set(" \n\ufffd")
    assert not any(f"<|{name}" in shown for name in ("start", "end", "message", "channel"))
    specials = [i for i in ids if i in tokenizer.special_tokens]
    if not specials:
        assert result["content"] == plain
    body = last_body(tokenizer, ids)
    assert shown.endswith(body) or body in shown


def last_body(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text after the last <|message|> up to the next special token."""
    message = tokenizer.special_ids["<|message|>"]
    if message not in ids:
        return ""
    start = len(ids) - ids[::-1].index(message)
    body = []
    for i in ids[start:]:
        if i in tokenizer.special_tokens:
            break
        body.append(i)
    return tokenizer.decode(body)


def test_speaks_harmony(tokenizer: Tokenizer) -> None:
    assert speaks_harmony(tokenizer)
    assert not speaks_harmony(Tokenizer(lambda text: [], {}, {"<|endoftext|>": 0}))


@pytest.mark.skipif("TIKTOKEN_ENCODINGS_BASE" not in os.environ, reason="needs o200k_base.tiktoken")
@pytest.mark.parametrize("text", WELL_FORMED)
def test_agrees_with_openai(tmp_path: Path, text: str) -> None:
    import openai_harmony as oh

    o200k = load_tokenizer(tmp_path)
    encoding = oh.load_harmony_encoding(oh.HarmonyEncodingName.HARMONY_GPT_OSS)
    ids = o200k.encode(text)
    theirs: dict = {"reasoning": [], "content": [], "calls": []}
    for message in encoding.parse_messages_from_completion_tokens(ids, oh.Role.ASSISTANT):
        body = "".join(part.text for part in message.content)
        if message.recipient is not None and message.recipient != "assistant":
            theirs["calls"].append([message.recipient.removeprefix("functions."), body])
        else:
            theirs["reasoning" if message.channel == "analysis" else "content"].append(body)
    joined = {k: v if k == "calls" else "\n".join(v) for k, v in theirs.items()}
    assert parse(o200k, text) == joined
