"""Random adapters in PEFT's layout, written without PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from headrace.lora.targets import EMBEDDING, Target, model_sites
from headrace.models.config import read_config

PREFIX = "base_model.model."


def random_adapter(
    path: Path,
    model: Path,
    seed: int,
    rank: int = 4,
    everything: bool = False,  # router, embedding and LM head too, not only attention and experts
    **config: Any,
) -> Path:
    """Write an adapter that moves the logits; return its directory."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for site in model_sites(read_config(model)):
        for target in site.targets:
            if everything or "_proj" in target.key:
                tensors |= pair(target, rank, generator)
    return write_adapter(path, tensors, r=rank, lora_alpha=2 * rank, **config)


def pair(target: Target, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    """lora_A [experts * rank, in] and lora_B [out, rank * experts] in float32, by PEFT's names."""
    name = target.key.replace(".gate_up_proj", ".base_layer").replace(".down_proj", "")
    name = PREFIX + name.removesuffix(".weight")
    rows = target.num_experts * rank
    std = 1.0 if target.key == EMBEDDING else target.in_features**-0.5
    a = torch.randn(rows, target.in_features, generator=generator) * std
    b = torch.randn(target.out_features, rows, generator=generator) * rank**-0.5
    if target.key == EMBEDDING:
        return {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": 0.3 * b}
    return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}


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
    contiguous = {n: t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    save_file(contiguous, path / "adapter_model.safetensors", metadata={"format": "pt"})
    return path
