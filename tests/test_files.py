from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from headrace.config import ConfigError
from headrace.files import parse_module, read_ahead, read_json


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What the system was asked to read: names and first bytes."""
    calls: list[tuple[str, int]] = []

    def advise(fd: int, start: int, length: int, advice: int) -> None:
        assert (length, advice) == (0, os.POSIX_FADV_WILLNEED)
        calls.append((Path(os.readlink(f"/proc/self/fd/{fd}")).name, start))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    return calls


def test_a_checkpoint_is_read_ahead(tmp_path: Path, asked: list[tuple[str, int]]) -> None:
    for name in ("b.safetensors", "a.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"bytes")
    read_ahead(tmp_path)
    assert asked == [("a.safetensors", 0), ("b.safetensors", 0)]


def test_one_that_memory_does_not_hold_is_not(tmp_path: Path, asked: list[tuple[str, int]]) -> None:
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.truncate(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 + 1)
    read_ahead(tmp_path)
    assert not asked


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    read_ahead(tmp_path / "nowhere")
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "nothing")
    read_ahead(tmp_path)


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    for name in ("nowhere", "a" * 5000, "a\0b"):
        with pytest.raises(ConfigError, match="cannot read"):
            read_json(tmp_path / name)
        assert read_json(tmp_path / name, missing_ok=True) == {}
    (tmp_path / "list").write_text("[]")
    with pytest.raises(ConfigError, match="must hold a JSON object"):
        read_json(tmp_path / "list")


def test_a_module_is_name_and_directory_in_two_forms() -> None:
    """The JSON form has vLLM's fields, and no others."""
    assert parse_module("sql=adapters/sql") == ("sql", Path("adapters/sql"))
    module = {"name": "sql", "path": "adapters/sql", "base_model_name": "gpt-oss-20b"}
    assert parse_module(json.dumps(module)) == ("sql", Path("adapters/sql"))
    with pytest.raises(ConfigError, match="'rank' is not a known field"):
        parse_module(json.dumps(module | {"rank": 8}))
    with pytest.raises(ConfigError, match="must be NAME=DIRECTORY"):
        parse_module('{"name": "sql"}')
