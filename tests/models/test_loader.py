from __future__ import annotations

from pathlib import Path

import pytest
import torch

from headrace.config import ConfigError
from headrace.models import load_model
from tests.checkpoints import random_checkpoint


def test_what_the_engine_reads_of_a_model(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    model = load_model(
        random_checkpoint(tmp_path, seed=0), progress=lambda done, total: seen.append((done, total))
    )
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert model.kv_layout.windows == (0, 16)
    assert model.kv_layout.group_of_layer == (1, 0)
    assert (model.kv_layout.num_layers, model.kv_layout.num_kv_heads) == (2, 2)
    assert model.config.vocab_size == 256
    assert seen[-1][0] == seen[-1][1] > 0
    assert sorted(seen) == seen


def test_a_model_of_one_kind_of_layer_has_one_group(tmp_path: Path) -> None:
    layers = ["full_attention"] * 2
    model = load_model(random_checkpoint(tmp_path, seed=0, layer_types=layers))
    assert (model.kv_layout.windows, model.kv_layout.group_of_layer) == ((0,), (0, 0))


def test_an_unknown_dtype(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--dtype is float8"):
        load_model(random_checkpoint(tmp_path, seed=0), dtype="float8")


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_model(tmp_path / "nowhere")


def test_float32_is_of_the_cpu(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--dtype float32 needs --device cpu"):
        load_model(random_checkpoint(tmp_path, seed=0), device="cuda", dtype="float32")


def test_a_gpu_has_no_number(tmp_path: Path) -> None:
    """Kernels are launched on the current device, which is the first."""
    with pytest.raises(ConfigError, match="--device is cuda:1; it must be auto, cpu or cuda"):
        load_model(random_checkpoint(tmp_path, seed=0), device="cuda:1")


@pytest.mark.gpu
def test_too_little_gpu_memory_is_told_before_reading(tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path, seed=0, vocab_size=200_000)  # two tables of 25 MB
    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(free - 30_000_000, dtype=torch.uint8, device="cuda")
    with pytest.raises(ConfigError, match="GB of weights"):
        load_model(path, device="cuda")
    del taken
    torch.cuda.empty_cache()
    assert load_model(path, device="cuda").device.type == "cuda"
