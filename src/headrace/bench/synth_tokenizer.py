"""A tokenizer of any vocabulary size: words t0, t1, ..., harmony's special tokens, single bytes.

A word is its name after a space, so that the text of any ids, " t17 t4", gives these ids again; all
other text is spelled in bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headrace.config import ConfigError
from headrace.server.tokenizer import byte_level_alphabet

# Distance from the first special token, whose place in o200k_harmony is 199998 of 201088.
FIRST_SPECIAL = 201088 - 199998
FIRST_BYTE = 201088 - 200100
_SPECIAL = {
    "<|startoftext|>": 0,
    "<|endoftext|>": 1,
    "<|return|>": 4,
    "<|constrain|>": 5,
    "<|channel|>": 7,
    "<|start|>": 8,
    "<|end|>": 9,
    "<|message|>": 10,
    "<|call|>": 14,
}


def special_ids(vocab_size: int) -> dict[str, int]:
    """Ids of harmony's special tokens: those of gpt-oss when vocab_size is its 201088.

    Raises ConfigError for a vocabulary that is too small for them.
    """
    if vocab_size < FIRST_SPECIAL + 1:
        raise ConfigError(f"vocab_size is {vocab_size}; at least {FIRST_SPECIAL + 1} are needed")
    return {name: vocab_size - FIRST_SPECIAL + i for name, i in _SPECIAL.items()}


def vocabulary(vocab_size: int) -> dict[str, int]:
    """Every token, in byte-level spelling, with its id."""
    alphabet = byte_level_alphabet()
    first_byte = vocab_size - FIRST_BYTE
    others = special_ids(vocab_size) | {alphabet[b]: first_byte + b for b in range(256)}
    words = set(range(vocab_size)) - set(others.values())
    return others | {f"{alphabet[ord(' ')]}t{i}": i for i in sorted(words)}


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    special = special_ids(vocab_size)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    # a word with the space before it, or spaces: a word of the vocabulary is taken as a whole
    words = {"type": "Split", "pattern": {"Regex": " ?[^ ]+| "}, "behavior": "Isolated"}
    spec: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(name, i) for name, i in special.items()],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [words | {"invert": False}, byte_level | {"trim_offsets": False}],
        },
        "post_processor": None,
        "decoder": byte_level | {"trim_offsets": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocabulary(vocab_size),
            "merges": [],
        },
    }
    (path / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|return|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _added(name: str, token_id: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": name} | flags | {"special": True}
