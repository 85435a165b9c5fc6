"""Prompts of a load: exact lengths, ShareGPT's filter rules, files with mistakes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from headrace.bench.datasets import Sample, load_samples, ordinary_ids
from headrace.bench.serve_config import ServeBenchConfig
from headrace.config import ConfigError
from headrace.files import BUNDLED_MODEL
from headrace.server.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    """A word is a token, so that lengths can be read."""
    names: dict[str, int] = {}

    def encode(text: str) -> list[int]:
        return [names.setdefault(word, len(names)) for word in text.split()]

    return Tokenizer(encode, {}, {})


@pytest.fixture(scope="module")
def bundled() -> Tokenizer:
    return load_tokenizer(BUNDLED_MODEL)


def load(tokenizer: Tokenizer, **fields: Any) -> list[Sample]:
    return load_samples(ServeBenchConfig(**fields), tokenizer)


def of(length: int, word: str = "a") -> str:
    return " ".join([word] * length)


def test_random_prompts_walk_through_the_ordinary_tokens(bundled: Tokenizer) -> None:
    ordinary = ordinary_ids(bundled)
    assert not set(ordinary) & set(bundled.special_tokens)
    assert all(bundled.token_bytes(i) for i in ordinary)
    samples = load(bundled, num_prompts=9, random_input_len=37, random_output_len=11)
    for sample in samples:
        assert isinstance(sample.prompt, list)
        first = ordinary.index(sample.prompt[0])
        assert sample.prompt == [ordinary[(first + j) % len(ordinary)] for j in range(37)]
        assert (sample.prompt_len, sample.output_len) == (37, 11)
    assert len({sample.prompt[0] for sample in samples}) > 5  # type: ignore[index]
    assert samples == load(bundled, num_prompts=9, random_input_len=37, random_output_len=11)
    other = load(bundled, num_prompts=9, random_input_len=37, random_output_len=11, seed=1)
    assert samples != other


def test_random_lengths_fill_their_range(bundled: Tokenizer) -> None:
    samples = load(
        bundled, num_prompts=300, random_input_len=5, random_output_len=3, random_range_ratio=0.5
    )
    assert {s.prompt_len for s in samples} == set(range(2, 9))  # floor(2.5) ... ceil(7.5)
    assert {s.output_len for s in samples} == set(range(1, 6))  # floor(1.5) ... ceil(4.5)


def test_a_random_prefix_is_shared_and_counts_on_top(bundled: Tokenizer) -> None:
    first, second = load(bundled, num_prompts=2, random_input_len=10, random_prefix_len=6)
    assert first.prompt[:6] == second.prompt[:6]
    assert first.prompt[6:] != second.prompt[6:]
    assert first.prompt_len == second.prompt_len == 16


def test_random_chats_are_text_of_that_length(bundled: Tokenizer) -> None:
    samples = load(bundled, num_prompts=20, random_input_len=40, backend="openai-chat")
    lengths = [s.prompt_len for s in samples]
    assert lengths == [len(bundled.encode(s.prompt)) for s in samples]  # type: ignore[arg-type]
    assert lengths.count(40) >= 15


CONVERSATIONS = [
    (4, 4),  # the shortest
    (3, 50),  # prompt too short
    (50, 3),  # answer too short, unless the length is given
    (1024, 1024),  # the longest
    (1025, 50),  # prompt too long
    (1000, 1049),  # together too long
    (60, None),  # one turn
]


def sharegpt(path: Path) -> Path:
    entries = []
    for number, (question, answer) in enumerate(CONVERSATIONS):
        turns = [{"from": "human", "value": of(question, f"q{number}")}]
        if answer is not None:
            turns += [{"from": "gpt", "value": of(answer)}, {"from": "human", "value": "more"}]
        entries.append({"id": str(number), "conversations": turns})
    path.write_text(json.dumps(entries))
    return path


def test_sharegpt_keeps_to_the_fields_rules(tmp_path: Path, words: Tokenizer) -> None:
    path = sharegpt(tmp_path / "sharegpt.json")
    fields = {"dataset_name": "sharegpt", "dataset_path": path, "oversample": False}
    lengths = {(s.prompt_len, s.output_len) for s in load(words, **fields)}
    assert lengths == {(4, 4), (1024, 1024)}
    lengths = {(s.prompt_len, s.output_len) for s in load(words, **fields, sharegpt_output_len=9)}
    assert lengths == {(4, 9), (50, 9), (1024, 9), (1000, 9)}


def test_sharegpt_is_shuffled_as_the_field_does(tmp_path: Path, words: Tokenizer) -> None:
    path = sharegpt(tmp_path / "sharegpt.json")
    fields = {"dataset_name": "sharegpt", "dataset_path": path, "oversample": False}
    samples = load(words, **fields, sharegpt_output_len=9, seed=5)
    order = [number for number, (_, answer) in enumerate(CONVERSATIONS) if answer is not None]
    random.Random(5).shuffle(order)  # of the conversations with two turns, before the filter
    kept = [f"q{i}" for i in order if CONVERSATIONS[i][0] not in (3, 1025)]
    assert [s.prompt.split()[0] for s in samples] == kept  # type: ignore[union-attr]


def test_too_few_prompts_are_drawn_again(tmp_path: Path, words: Tokenizer) -> None:
    path = sharegpt(tmp_path / "sharegpt.json")
    samples = load(words, dataset_name="sharegpt", dataset_path=path, num_prompts=20)
    assert len(samples) == 20
    assert {s.prompt_len for s in samples} == {4, 1024}
    assert len(load(words, dataset_name="sharegpt", dataset_path=path, num_prompts=1)) == 1


def test_custom_lines(tmp_path: Path, words: Tokenizer) -> None:
    path = tmp_path / "custom.jsonl"
    path.write_text('{"prompt": "one two"}\n\n{"prompt": "three", "output_tokens": 7}\n')
    samples = load(
        words, dataset_name="custom", dataset_path=path, custom_output_len=5, oversample=False
    )
    assert samples == [Sample("one two", 2, 5), Sample("three", 1, 7)]


@pytest.mark.parametrize(
    ("kind", "text", "words_of_the_error"),
    [
        ("sharegpt", '[\n{"conversations": []},\n{oops}\n]', "line 3: not JSON"),
        ("sharegpt", "{}", "JSON list"),
        ("sharegpt", '[{"conversations": []}, {"items": []}]', "entry 1"),
        ("sharegpt", '[{"conversations": [{"value": "a"}, {"value": 3}]}]', "entry 0"),
        ("sharegpt", '[{"conversations": [{"value": "\\ud800 b c d"}, {"value": "e"}]}]', "lone"),
        ("sharegpt", "[]", "no entry"),
        ("custom", '{"prompt": "a"}\n{"prompt": "a"\n', "line 2: not JSON"),
        ("custom", '{"prompt": "a"}\n{"text": "a"}\n', "line 2"),
        ("custom", '{"prompt": ["a"]}\n', "line 1"),
        ("custom", '{"prompt": "a", "output_tokens": 0}\n', "line 1"),
        ("custom", "", "no entry"),
    ],
)
def test_a_bad_file_is_refused_by_line(
    tmp_path: Path, words: Tokenizer, kind: str, text: str, words_of_the_error: str
) -> None:
    path = tmp_path / "data"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words_of_the_error) as error:
        load(words, dataset_name=kind, dataset_path=path)
    assert str(path) in str(error.value)


def test_a_file_that_is_missing_or_not_text(tmp_path: Path, words: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(words, dataset_name="custom", dataset_path=tmp_path / "none")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="utf-8"):
        load(words, dataset_name="custom", dataset_path=tmp_path / "bytes")
