"""Prompts and lengths of a load: random tokens, ShareGPT conversations, or a file of one's own."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headrace.bench.serve_config import ServeBenchConfig
from headrace.config import ConfigError
from headrace.server.tokenizer import Tokenizer

MIN_TOKENS, MAX_PROMPT_TOKENS, MAX_TOKENS = 4, 1024, 2048  # of a ShareGPT conversation
LARGEST_VOCABULARY = 1 << 20
MAX_RECODINGS = 10  # tries to find a text of a wanted number of tokens


@dataclass(frozen=True)
class Sample:
    """One request to send."""

    prompt: str | list[int]  # text, or token ids
    prompt_len: int  # tokens
    output_len: int  # tokens to generate


def load_samples(config: ServeBenchConfig, tokenizer: Tokenizer) -> list[Sample]:
    """Make config.num_prompts samples.

    Raises ConfigError naming the file, and the line or entry, that can't be read.
    """
    if config.dataset_name == "random":
        return random_samples(config, tokenizer)
    assert config.dataset_path is not None
    read = {"sharegpt": sharegpt_samples, "custom": custom_samples}[config.dataset_name]
    samples = []
    for sample in read(config, config.dataset_path, tokenizer):
        samples.append(sample)
        if len(samples) == config.num_prompts:
            return samples
    if not samples:
        raise ConfigError(f"{config.dataset_path}: no entry in it can be used as a prompt")
    if config.oversample:
        draw = random.Random(config.seed)
        samples += draw.choices(samples, k=config.num_prompts - len(samples))
    return samples


def random_samples(config: ServeBenchConfig, tokenizer: Tokenizer) -> list[Sample]:
    """Prompts of exact lengths: token j of prompt i is ordinary[(offset_i + i + j) mod n].

    Lengths are uniform integers of floor(len (1 - r)) ... ceil(len (1 + r)). All prompts begin
    with the same --random-prefix-len tokens, which count on top. Chats take text, not ids: theirs
    is searched for by decoding and encoding again, and its real length is what counts.
    """
    ordinary = np.array(ordinary_ids(tokenizer))
    draw = np.random.default_rng(config.seed)
    prefix = draw.choice(ordinary, config.random_prefix_len).tolist()
    input_lens = draw_lengths(draw, config, config.random_input_len)
    output_lens = draw_lengths(draw, config, config.random_output_len)
    offsets = draw.integers(0, len(ordinary), config.num_prompts)
    samples = []
    for i in range(config.num_prompts):
        positions = offsets[i] + i + np.arange(input_lens[i])
        ids = prefix + ordinary[positions % len(ordinary)].tolist()
        prompt = text_of_length(tokenizer, ids) if config.is_chat else ids
        length = len(tokenizer.encode(prompt)) if isinstance(prompt, str) else len(prompt)
        samples.append(Sample(prompt, length, int(output_lens[i])))
    return samples


def draw_lengths(
    draw: np.random.Generator, config: ServeBenchConfig, length: int
) -> np.ndarray[Any, Any]:
    """Draw a length around `length` for every prompt."""
    low = math.floor(length * (1 - config.random_range_ratio))
    high = math.ceil(length * (1 + config.random_range_ratio))
    return draw.integers(max(low, 1), high + 1, config.num_prompts)


def ordinary_ids(tokenizer: Tokenizer) -> list[int]:
    """All ids that stand for text, in order."""
    ids = (i for i in range(LARGEST_VOCABULARY) if i not in tokenizer.special_tokens)
    return [i for i in ids if tokenizer.token_bytes(i)]


def text_of_length(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Find a text close to these tokens that has as many; the closest after ten tries."""
    wanted, text = len(ids), tokenizer.decode(ids)
    for _ in range(MAX_RECODINGS):
        again = tokenizer.encode(text)
        if len(again) == wanted:
            break
        text = tokenizer.decode((again + ids)[:wanted])
    return text


def sharegpt_samples(
    config: ServeBenchConfig, path: Path, tokenizer: Tokenizer
) -> Iterator[Sample]:
    """First questions and answers of a shuffled ShareGPT file.

    Left out are conversations of one turn; prompts and answers under 4 tokens (answers only if
    they give the length), prompts over 1024, and prompt and answer over 2048 together.
    """
    entries = read_conversations(path)
    random.Random(config.seed).shuffle(entries)
    for where, question, answer in entries:
        prompt_len = len(encode(tokenizer, question, where))
        output_len = config.sharegpt_output_len or len(encode(tokenizer, answer, where))
        is_short = config.sharegpt_output_len is None and output_len < MIN_TOKENS
        if prompt_len < MIN_TOKENS or is_short or prompt_len > MAX_PROMPT_TOKENS:
            continue
        if prompt_len + output_len <= MAX_TOKENS:
            yield Sample(question, prompt_len, output_len)


def read_conversations(path: Path) -> list[tuple[str, str, str]]:
    """Read the first two turns of each conversation of two or more, with where they stand."""
    try:
        entries = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(entries, list):
        raise ConfigError(f"{path}: a ShareGPT file is a JSON list of conversations")
    turns = []
    for number, entry in enumerate(entries):
        where = f"{path}, entry {number}"
        conversation = entry.get("conversations") if isinstance(entry, dict) else None
        if not isinstance(conversation, list):
            raise ConfigError(f"{where}: it has no list `conversations`")
        if len(conversation) < 2:
            continue
        question, answer = (turn_text(turn, where) for turn in conversation[:2])
        turns.append((where, question, answer))
    return turns


def turn_text(turn: Any, where: str) -> str:
    """Return what was said in one turn of a conversation."""
    value = turn.get("value") if isinstance(turn, dict) else None
    if not isinstance(value, str):
        raise ConfigError(f"{where}: a turn has no text `value`")
    return value


def custom_samples(config: ServeBenchConfig, path: Path, tokenizer: Tokenizer) -> Iterator[Sample]:
    """Prompts of a JSONL file, in its order: {"prompt": TEXT} and perhaps "output_tokens"."""
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{where}: not JSON: {error.msg}") from None
        prompt = entry.get("prompt") if isinstance(entry, dict) else None
        if not isinstance(prompt, str) or not prompt:
            raise ConfigError(f'{where}: each line must be an object with a text "prompt"')
        output_len = entry.get("output_tokens", config.custom_output_len)
        if not isinstance(output_len, int) or output_len < 1:
            raise ConfigError(f'{where}: "output_tokens" is {output_len!r}; it must be 1 or more')
        yield Sample(prompt, len(encode(tokenizer, prompt, where)), output_len)


def read_text(path: Path) -> str:
    """Read a file, or raise ConfigError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--dataset-path {path}: {error}") from None


def encode(tokenizer: Tokenizer, text: str, where: str) -> list[int]:
    """Tokenize, or raise ConfigError naming the place in the file."""
    try:
        return tokenizer.encode(text)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
