"""Random LoRA adapters in PEFT's layout: attention and all experts, as the peers were measured."""

from __future__ import annotations

import json
from pathlib import Path

from headrace.bench.random_files import RandomTensor, normal_table, write_random
from headrace.lora.targets import Target, model_sites
from headrace.models.config import GptOssConfig

DELTA = 0.1  # size of B (A x) for x of size 1, so that an adapter changes the tokens


def write_adapter(path: Path, config: GptOssConfig, rank: int, seed: int) -> None:
    """Write an adapter of one rank for a model. ConfigError if the disk has too little room."""
    path.mkdir(parents=True, exist_ok=True)
    targets = [t for site in model_sites(config) for t in site.targets if "_proj" in t.key]
    tensors = {n: tensor for t in targets for n, tensor in _factors(t, rank).items()}
    write_random({path / "adapter_model.safetensors": tensors}, seed)
    fields = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    (path / "adapter_config.json").write_text(json.dumps(fields, indent=2) + "\n")


def _factors(target: Target, rank: int) -> dict[str, RandomTensor]:
    """A [experts * rank, in] and B [out, rank * experts], by PEFT's names.

    PEFT wraps an expert layer's two tensors one in the other; the inner one is gate_up's.
    """
    name = target.key.replace(".gate_up_proj", ".base_layer").replace(".down_proj", "")
    rows = target.num_experts * rank
    a = RandomTensor((rows, target.in_features), normal_table(target.in_features**-0.5))
    b = RandomTensor((target.out_features, rows), normal_table(DELTA * rank**-0.5))
    prefix = f"base_model.model.{name}"
    return {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
