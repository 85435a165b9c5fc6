from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from headrace.bench.synth import SIZES, write_synthetic
from headrace.bench.synth_adapter import DELTA, write_adapter
from headrace.models.config import parse_config
from tests.lora.random_adapters import random_adapter

CONFIG = parse_config(SIZES["tiny"])


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "adapter_model.safetensors")


def test_its_tensors_have_the_names_and_shapes_of_pefts(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "model", SIZES["tiny"], seed=0)
    as_peft = tensors_of(random_adapter(tmp_path / "peft", tmp_path / "model", seed=0, rank=4))
    write_adapter(tmp_path / "ours", CONFIG, rank=4, seed=0)
    ours = tensors_of(tmp_path / "ours")
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in as_peft.items()}
    assert {t.dtype for t in ours.values()} == {torch.bfloat16}
    fields = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"]) == (4, 4)


def test_its_delta_has_the_size_that_was_meant(tmp_path: Path) -> None:
    write_adapter(tmp_path, CONFIG, rank=8, seed=0)
    tensors = tensors_of(tmp_path)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    a, b = (tensors[name.format(side)].float() for side in "AB")
    x = torch.randn(1000, CONFIG.hidden_size, generator=torch.Generator().manual_seed(0))
    assert abs((x @ a.T @ b.T).std().item() / DELTA - 1) < 0.2


def test_another_seed_is_another_adapter(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_adapter(tmp_path / str(seed), CONFIG, rank=2, seed=seed)
    first, second = (tensors_of(tmp_path / str(seed)) for seed in (0, 1))
    assert not any(torch.equal(first[name], second[name]) for name in first)
