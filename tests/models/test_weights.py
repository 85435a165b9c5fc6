from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from headrace.config import ConfigError
from headrace.files import read_json
from headrace.models.weights import INDEX_NAME, Checkpoint, write_checkpoint

TENSORS = {
    "a.weight": torch.arange(6.0).view(2, 3),
    "b.weight": torch.ones(4, dtype=torch.bfloat16),
    "c_blocks": torch.arange(16, dtype=torch.uint8).view(1, 16),
}
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


def opened(path: Path) -> Checkpoint:
    return Checkpoint(path)


@pytest.mark.parametrize("max_shard_bytes", [1, 30, 1000])
def test_what_is_written_is_read(tmp_path: Path, max_shard_bytes: int) -> None:
    write_checkpoint(tmp_path, {"x": 1}, TENSORS, max_shard_bytes)
    assert len(list(tmp_path.glob("*.safetensors"))) == {1: 3, 30: 2, 1000: 1}[max_shard_bytes]
    assert (tmp_path / INDEX_NAME).exists() == (max_shard_bytes < 1000)
    checkpoint = opened(tmp_path)
    checkpoint.check(SHAPES)
    assert set(checkpoint) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(checkpoint.read(name), tensor)
    assert read_json(tmp_path / "config.json") == {"x": 1}


def test_progress_counts_bytes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, TENSORS)
    seen: list[tuple[int, int]] = []
    checkpoint = Checkpoint(tmp_path, None, lambda done, total: seen.append((done, total)))
    for name in ("b.weight", "a.weight", "c_blocks"):
        checkpoint.read(name)
    assert seen == [(8, 48), (32, 48), (48, 48)]


def test_shards_without_an_index(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, TENSORS, max_shard_bytes=1)
    (tmp_path / INDEX_NAME).unlink()
    opened(tmp_path).check(SHAPES)


def test_other_formats_in_subdirectories_are_ignored(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, TENSORS)
    for folder in ("original", "metal"):
        (tmp_path / folder).mkdir()
        save_file({"other": torch.zeros(1)}, tmp_path / folder / "model.safetensors")
    opened(tmp_path).check(SHAPES)


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, TENSORS | {"extra": torch.zeros(1)})
    expected = SHAPES | {"a.weight": (3, 2), "lost": (5, 6)}
    with pytest.raises(ConfigError) as error:
        opened(tmp_path).check(expected)
    message = str(error.value)
    assert "tensor a.weight has shape [2, 3], expected [3, 2]" in message
    assert "missing tensor lost [5, 6]" in message
    assert "unknown tensor extra" in message
    assert "b.weight" not in message


def test_a_wrong_dtype_is_named(tmp_path: Path) -> None:
    swapped = TENSORS | {"a.weight": TENSORS["a.weight"].byte(), "c_blocks": torch.zeros(1, 16)}
    write_checkpoint(tmp_path, {}, swapped)
    with pytest.raises(ConfigError) as error:
        opened(tmp_path).check(SHAPES)
    assert "tensor a.weight has dtype U8, expected BF16 or F16 or F32" in str(error.value)
    assert "tensor c_blocks has dtype F32, expected U8" in str(error.value)


def test_many_problems_are_counted(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, TENSORS)
    with pytest.raises(ConfigError, match="and 12 more"):
        opened(tmp_path).check(SHAPES | {f"lost.{i}": (1,) for i in range(20)})


def test_a_directory_without_tensors(tmp_path: Path) -> None:
    (tmp_path / "original").mkdir()
    save_file({"other": torch.zeros(1)}, tmp_path / "original" / "model.safetensors")
    with pytest.raises(ConfigError, match=r"has no \*\.safetensors"):
        opened(tmp_path)


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, TENSORS, max_shard_bytes=1)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ConfigError, match="model-00002-of-00003"):
        opened(tmp_path)


def test_a_shard_that_is_damaged(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, TENSORS)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ConfigError, match=r"cannot read .*model\.safetensors"):
        opened(tmp_path)


def test_an_index_that_promises_too_much(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, TENSORS, max_shard_bytes=1)
    index = read_json(tmp_path / INDEX_NAME)
    index["weight_map"]["ghost"] = "model-00001-of-00003.safetensors"
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="lists tensor ghost"):
        opened(tmp_path)


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_json_that_cannot_be_read(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_json(file)
