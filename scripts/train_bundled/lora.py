"""Low-rank adapters on attention and experts, in the layout that PEFT writes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from model import Params, is_expert_weight
from safetensors.torch import save_file
from torch import Tensor

RANK = 8
ALPHA = 16
PREFIX = "base_model.model."


def is_target(name: str) -> bool:
    """q, k, v, o and both expert matrices."""
    return is_expert_weight(name) or (".self_attn." in name and name.endswith("_proj.weight"))


def tensor_name(target: str, side: str) -> str:
    """PEFT's name: it wraps gate_up_proj first, so down_proj's wrapper is the outer one."""
    if target.endswith("experts.gate_up_proj"):
        module = target.removesuffix("gate_up_proj") + "base_layer"
    elif target.endswith("experts.down_proj"):
        module = target.removesuffix(".down_proj")
    else:
        module = target.removesuffix(".weight")
    return f"{PREFIX}{module}.lora_{side}.weight"


def init_adapter(params: Params, seed: int) -> Params:
    """A uniform in 1/sqrt(fan in), B zero.

    Experts: A [experts * rank, in], B [out, rank * experts].
    """
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for name, weight in params.items():
        if not is_target(name):
            continue
        count = weight.shape[0] if is_expert_weight(name) else 1
        fan_in, fan_out = weight.shape[-2:] if is_expert_weight(name) else weight.shape[::-1]
        bound = math.sqrt(3 / fan_in)
        a = torch.empty(count * RANK, fan_in).uniform_(-bound, bound, generator=generator)
        adapter[tensor_name(name, "A")] = a
        adapter[tensor_name(name, "B")] = torch.zeros(fan_out, RANK * count)
    return adapter


def delta(name: str, weight: Tensor, adapter: Params) -> Tensor:
    """alpha / rank * B A in the weight's own layout.

    PEFT's expert tensors: row e * rank + r of A, but column r * experts + e of B.
    """
    a, b = adapter[tensor_name(name, "A")], adapter[tensor_name(name, "B")]
    if not is_expert_weight(name):
        return b @ a * (ALPHA / RANK)
    experts = weight.shape[0]
    a, b = a.view(experts, RANK, -1), b.view(-1, RANK, experts)
    return torch.einsum("eri,ore->eio", a, b) * (ALPHA / RANK)


def merge(params: Params, adapter: Params) -> Params:
    """The model with the adapter added to its weights."""
    return {n: p + delta(n, p, adapter) if is_target(n) else p for n, p in params.items()}


def save_adapter(path: Path, adapter: Params) -> None:
    """adapter_config.json and adapter_model.safetensors (bfloat16)."""
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "headrace/tiny",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "inference_mode": True,
    }
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {n: t.detach().to("cpu", torch.bfloat16).contiguous() for n, t in adapter.items()}
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
