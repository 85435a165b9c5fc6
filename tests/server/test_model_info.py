from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from headrace.config import ConfigError, ServerConfig
from headrace.server.model_info import load_model_info
from headrace.server.tokenizer import Tokenizer


@pytest.fixture
def folder(model_dir: Path, tmp_path: Path) -> Path:
    for path in model_dir.glob("*.json"):
        shutil.copy(path, tmp_path)
    return tmp_path


def test_defaults_and_stops(folder: Path, tokenizer: Tokenizer) -> None:
    generation = {"temperature": 0.0, "top_k": 5, "top_p": None, "eos_token_id": [3, 4], "x": 1}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    info = load_model_info(folder, tokenizer, ServerConfig())
    assert info.sampling_defaults == {"temperature": 0.0, "top_k": 5}
    names = ("<|return|>", "<|call|>", "<|endoftext|>")
    assert info.eos_token_ids == (3, 4, *(tokenizer.special_ids[name] for name in names))
    assert info.name == folder.name
    (folder / "generation_config.json").write_text('{"do_sample": false, "eos_token_id": [3, 4]}')
    assert load_model_info(folder, tokenizer, ServerConfig()).sampling_defaults == {
        "temperature": 0.0
    }
    own = load_model_info(folder, tokenizer, ServerConfig(generation_config="none"))
    assert own.sampling_defaults == {}
    assert own.eos_token_ids == info.eos_token_ids


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "{"),
        ("config.json", "[]"),
        ("config.json", "{}"),
        ("config.json", None),
        ("generation_config.json", "nonsense"),
        ("tokenizer_config.json", "nonsense"),
    ],
)
def test_a_bad_file_is_named(
    folder: Path, tokenizer: Tokenizer, name: str, content: str | None
) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(ConfigError, match=name):
        load_model_info(folder, tokenizer, ServerConfig())


@pytest.mark.parametrize(
    ("name", "value"),
    [("top_k", 2**31), ("top_k", "5"), ("min_p", 2), ("temperature", -1), ("top_p", 0)],
)
def test_a_default_that_no_request_may_send_is_named(
    folder: Path, tokenizer: Tokenizer, name: str, value: object
) -> None:
    (folder / "generation_config.json").write_text(json.dumps({name: value}))
    with pytest.raises(ConfigError, match=f"generation_config.json: {name} is {value!r}: Input"):
        load_model_info(folder, tokenizer, ServerConfig())
    own = load_model_info(folder, tokenizer, ServerConfig(generation_config="none"))
    assert own.sampling_defaults == {}
