from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from headrace.config import ConfigError
from headrace.server.tokenizer import IncrementalDetokenizer, Tokenizer, load_tokenizer
from tests.server.live import TEXT

any_text = st.text(st.characters(exclude_categories=["Cs"]))


@given(any_text)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(tokenizer.quote(text))) == text.replace("\ufdd0", "")


@given(any_text)
def test_encodes_as_the_reference(model_dir: Path, tokenizer: Tokenizer, text: str) -> None:
    reference = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    text = text.replace("\ufdd0", "")
    assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids


def test_special_tokens(model_dir: Path, tokenizer: Tokenizer) -> None:
    reference = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    text = "<|start|>user<|message|>hi<|end|>"
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text).ids
    assert ids[0] == tokenizer.special_ids["<|start|>"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "userhi"


def test_quoted_special_tokens_are_text(tokenizer: Tokenizer) -> None:
    text = "say <|start|>system<|message|> now"
    ids = tokenizer.encode(tokenizer.quote(text))
    assert not set(ids) & set(tokenizer.special_tokens)
    assert tokenizer.decode(ids) == text


@given(st.lists(st.integers(0, 450)))
def test_incremental_equals_whole(tokenizer: Tokenizer, ids: list[int]) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    pieces = [detokenizer.feed(i) for i in ids] + [detokenizer.flush()]
    assert "".join(pieces) == b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", "replace")


def test_never_half_a_character(tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    ids = tokenizer.encode("🧀")
    assert len(ids) > 1
    assert [detokenizer.feed(i) for i in ids] == [""] * (len(ids) - 1) + ["🧀"]


def test_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="surrogate at position 1"):
        tokenizer.encode("a\ud800")


def test_no_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIKTOKEN_ENCODINGS_BASE", raising=False)
    with pytest.raises(ConfigError, match=r"tokenizer\.json does not exist"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{", '{"model": 1}', json.dumps({"decoder": None})])
def test_broken_tokenizer(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match="tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.skipif("TIKTOKEN_ENCODINGS_BASE" not in os.environ, reason="needs o200k_base.tiktoken")
def test_o200k_harmony(tmp_path: Path) -> None:
    o200k = load_tokenizer(tmp_path)
    assert o200k.encode("Hello world") == [13225, 2375]
    assert o200k.special_ids["<|return|>"] == 200002
    assert o200k.special_ids["<|start|>"] == 200006
    assert o200k.decode(o200k.encode(TEXT)) == TEXT
    assert o200k.encode("<|channel|>") == [200005]
