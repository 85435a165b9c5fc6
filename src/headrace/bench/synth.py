"""Random gpt-oss checkpoints in the public layout, for sizes whose weights can't be had.

Activations stay finite and routing spreads over the experts; the text is noise.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from headrace.bench.random_files import Progress, RandomTensor, Table, normal_table, write_random
from headrace.bench.synth_tokenizer import special_ids, write_tokenizer
from headrace.config import ConfigError
from headrace.models.config import GptOssConfig, parse_config
from headrace.models.gpt_oss_weights import tensor_shapes
from headrace.models.weights import INDEX_NAME, split_shards

SHARD_BYTES = 5_000_000_000  # as in the public checkpoints
ROUTER_STD = 0.05


def _config(layers: int, experts: int, vocab: int = 201088, **sizes: int) -> dict[str, Any]:
    special = special_ids(vocab)
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "vocab_size": vocab,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": layers,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": experts,
        "num_experts_per_tok": 4,
        "experts_per_token": 4,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "max_position_embeddings": 131072,
        "initial_context_length": 4096,
        "rope_theta": 150000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "swiglu_limit": 7.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "use_cache": True,
        "eos_token_id": special["<|return|>"],
        "pad_token_id": special["<|endoftext|>"],
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
    } | sizes


SIZES: dict[str, dict[str, Any]] = {
    "20b": _config(layers=24, experts=32),
    "120b": _config(layers=36, experts=128),
    "tiny": _config(
        **{"layers": 4, "experts": 8, "vocab": 4096, "hidden_size": 256, "intermediate_size": 256},
        **{"num_attention_heads": 8, "num_key_value_heads": 2},
    ),
}


def write_synthetic(
    path: Path, config: dict[str, Any], seed: int, progress: Progress | None = None
) -> None:
    """Write a checkpoint directory: config, tokenizer, chat template, sharded safetensors.

    Raises ConfigError when the directory has safetensors already, or the disk too little room.
    """
    typed = parse_config(config)
    shapes = tensor_shapes(typed, is_mxfp4=True)
    path.mkdir(parents=True, exist_ok=True)
    if any(path.glob("*.safetensors")):
        raise ConfigError(f"{path} holds a checkpoint already; delete it or name another directory")
    tensors = {n: RandomTensor(shape, _table(n, typed)) for n, shape in shapes.items()}
    shards = split_shards({n: t.num_bytes for n, t in tensors.items()}, SHARD_BYTES)
    files = {
        path / f"model-{i:05}-of-{len(shards) - 1:05}.safetensors": {n: tensors[n] for n in shard}
        for i, shard in enumerate(shards)
    }
    write_random(files, seed, progress)
    weight_map = {name: file.name for file, shard in files.items() for name in shard}
    size = sum(tensor.num_bytes for tensor in tensors.values())
    _write_json(path / INDEX_NAME, {"metadata": {"total_size": size}, "weight_map": weight_map})
    _write_json(path / "config.json", config)
    _write_json(path / "generation_config.json", _generation_config(config["vocab_size"]))
    write_tokenizer(path, config["vocab_size"])
    template = resources.files("headrace") / "data" / "harmony.jinja"
    (path / "chat_template.jinja").write_text(template.read_text(encoding="utf-8"))


def _table(name: str, config: GptOssConfig) -> Table:
    """What the bits of a tensor stand for: all bytes, scales 119 to 121, or a normal in bf16."""
    if name.endswith("_blocks"):
        return np.arange(256, dtype=np.uint8)
    if name.endswith("_scales"):
        return (119 + np.arange(256) * 3 // 256).astype(np.uint8)
    if "norm" in name:
        return normal_table(std=0.1, mean=1.0)
    if name.endswith("embed_tokens.weight") or name.endswith("sinks"):
        return normal_table(std=1.0)
    if "router" in name or name.endswith("bias"):
        return normal_table(std=ROUTER_STD)
    in_features = config.hidden_size
    if "o_proj" in name:
        in_features = config.num_attention_heads * config.head_dim
    return normal_table(std=in_features**-0.5)


def _generation_config(vocab_size: int) -> dict[str, Any]:
    ids = special_ids(vocab_size)
    eos = [ids["<|return|>"], ids["<|endoftext|>"], ids["<|call|>"]]
    return {
        "bos_token_id": ids["<|startoftext|>"],
        "do_sample": True,
        "eos_token_id": eos,
        "pad_token_id": ids["<|endoftext|>"],
    }


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")
