"""Random tiny gpt-oss checkpoints whose every component moves the logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headrace.models.weights import quantize_experts, write_checkpoint

YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "truncate": False,
}


def tiny_config(**overrides: Any) -> dict[str, Any]:
    """A config.json as Hugging Face writes it."""
    config: dict[str, Any] = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "max_position_embeddings": 256,
        "rope_theta": 150000.0,
        "rope_scaling": YARN,
        "rms_norm_eps": 1e-5,
        "swiglu_limit": 7.0,
        "hidden_act": "silu",
        "attention_bias": True,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
    } | overrides
    kinds = ["sliding_attention", "full_attention"] * config["num_hidden_layers"]
    config.setdefault("layer_types", kinds[: config["num_hidden_layers"]])
    return config


def random_tensors(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """bf16 tensors with dense experts [num_experts, in, out], by Hugging Face's names."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float, mean: float = 0.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std + mean).bfloat16()

    hidden, inter = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim, experts = config["head_dim"], config["num_local_experts"]
    tensors = {
        "model.embed_tokens.weight": normal(config["vocab_size"], hidden, std=1.0),
        "model.norm.weight": normal(hidden, std=0.2, mean=1.0),
    }
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = normal(config["vocab_size"], hidden, std=2 * hidden**-0.5)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = normal(hidden, std=0.2, mean=1.0)
        sizes = {"q": heads, "k": kv_heads, "v": kv_heads}
        for proj, count in sizes.items():
            name = f"{prefix}self_attn.{proj}_proj"
            tensors[f"{name}.weight"] = normal(count * head_dim, hidden, std=1.5 * hidden**-0.5)
            tensors[f"{name}.bias"] = normal(count * head_dim, std=0.5)
        width = heads * head_dim
        tensors[f"{prefix}self_attn.o_proj.weight"] = normal(hidden, width, std=2 * width**-0.5)
        tensors[f"{prefix}self_attn.o_proj.bias"] = normal(hidden, std=0.3)
        tensors[f"{prefix}self_attn.sinks"] = normal(heads, std=1.0, mean=1.0)
        tensors[f"{prefix}mlp.router.weight"] = normal(experts, hidden, std=2 * hidden**-0.5)
        tensors[f"{prefix}mlp.router.bias"] = normal(experts, std=0.5)
        # std 3 reaches the SwiGLU limit of 7 in about one value of fifty
        gate_up = normal(experts, hidden, 2 * inter, std=3 * hidden**-0.5)
        tensors[f"{prefix}mlp.experts.gate_up_proj"] = gate_up
        tensors[f"{prefix}mlp.experts.gate_up_proj_bias"] = normal(experts, 2 * inter, std=0.5)
        down = normal(experts, inter, hidden, std=0.3 * inter**-0.5)
        tensors[f"{prefix}mlp.experts.down_proj"] = down
        tensors[f"{prefix}mlp.experts.down_proj_bias"] = normal(experts, hidden, std=0.3)
    if not config["attention_bias"]:
        tensors = {n: t for n, t in tensors.items() if not n.endswith("_proj.bias")}
    return tensors


def random_checkpoint(
    path: Path,
    *,
    seed: int,
    experts: str = "mxfp4",  # or "dense"
    max_shard_bytes: int = 5_000_000_000,
    **config_overrides: Any,
) -> Path:
    """Write a random checkpoint and return its directory."""
    assert experts in ("mxfp4", "dense"), experts
    config = tiny_config(**config_overrides)
    tensors = random_tensors(config, seed)
    if experts == "mxfp4":
        tensors = quantize_experts(tensors)
        config["quantization_config"] = {"quant_method": "mxfp4"}
    write_checkpoint(path, config, tensors, max_shard_bytes)
    return path
