"""Random adapters in PEFT's layout, written without PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from headrace.lora.targets import Target, model_sites
from headrace.models.config import read_config

PREFIX = "base_model.model."


def random_adapter(
    path: Path, model: Path, seed: int, rank: int = 4, strength: float = 1.0, **config: Any
) -> Path:
    """Write an adapter on attention and all experts; return its directory."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for site in model_sites(read_config(model))[1:-1]:
        for target in site.targets:
            if not target.key.endswith("router.weight"):
                tensors |= pair(target, rank, strength, generator)
    return write_adapter(path, tensors, r=rank, lora_alpha=2 * rank, **config)


def pair(
    target: Target, rank: int, strength: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """lora_A [experts * rank, in] and lora_B [out, rank * experts] in float32."""
    name = target.key.replace(".gate_up_proj", ".base_layer").replace(".down_proj", "")
    rows = target.num_experts * rank
    a = torch.randn(rows, target.in_features, generator=generator) * target.in_features**-0.5
    b = torch.randn(target.out_features, rows, generator=generator) * strength * rank**-0.5
    return {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}


def write_adapter(path: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """adapter_config.json and adapter_model.safetensors."""
    path.mkdir(parents=True, exist_ok=True)
    fields = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    } | config
    (path / "adapter_config.json").write_text(json.dumps(fields))
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path / "adapter_model.safetensors", metadata={"format": "pt"})
    return path
