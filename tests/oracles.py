"""Two independent gpt-oss implementations in float32: transformers' and OpenAI's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headrace.files import read_json
from headrace.ops.mxfp4 import dequantize

os.environ["HF_HUB_OFFLINE"] = "1"


def stored_tensors(path: Path) -> dict[str, Tensor]:
    """A checkpoint's tensors in float32, the experts dense [num_experts, in, out]."""
    from safetensors.torch import load_file

    stored = {
        n: t for file in sorted(path.glob("*.safetensors")) for n, t in load_file(file).items()
    }
    dense = {n: t.float() for n, t in stored.items() if not n.endswith(("_blocks", "_scales"))}
    for name in [n.removesuffix("_blocks") for n in stored if n.endswith("_blocks")]:
        weight = dequantize(stored[f"{name}_blocks"], stored[f"{name}_scales"], torch.float32)
        dense[name] = weight.transpose(1, 2).contiguous()
    return dense


def transformers_model(path: Path) -> Any:
    """GptOssForCausalLM with the dequantized weights.

    The weights are given rather than loaded: 5.17 leaves dequantized experts in bfloat16.
    """
    from transformers import GptOssConfig, GptOssForCausalLM

    raw = {k: v for k, v in read_json(path / "config.json").items() if k != "quantization_config"}
    config = GptOssConfig(**raw, attn_implementation="eager", experts_implementation="eager")
    model = GptOssForCausalLM(config).float().eval()
    missing, unexpected = model.load_state_dict(stored_tensors(path), strict=False)
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    assert missing == tied, missing
    assert not unexpected, unexpected
    model.tie_weights()
    return model


@torch.inference_mode()
def transformers_logits(path: Path, tokens: list[int]) -> Tensor:
    return transformers_model(path)(torch.tensor([tokens])).logits[0]


@torch.inference_mode()
def openai_logits(path: Path, tokens: list[int]) -> Tensor:
    """OpenAI's reference: its windows alternate, its YaRN never truncates, attention has biases."""
    from gpt_oss.torch.model import ModelConfig, Transformer

    raw, tensors = read_json(path / "config.json"), stored_tensors(path)
    yarn = raw["rope_scaling"] or {"factor": 1.0}  # factor 1 means plain rope
    same = (
        *("num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "head_dim"),
        *("num_attention_heads", "num_key_value_heads", "sliding_window", "rope_theta"),
    )
    config = ModelConfig(
        **{name: raw[name] for name in same},
        num_experts=raw["num_local_experts"],
        experts_per_token=raw["num_experts_per_tok"],
        swiglu_limit=raw["swiglu_limit"],
        initial_context_length=yarn.get("original_max_position_embeddings", 0),
        rope_scaling_factor=yarn["factor"],
        rope_ntk_alpha=yarn.get("beta_slow", 0),
        rope_ntk_beta=yarn.get("beta_fast", 0),
    )
    model = Transformer(config).float()
    model.load_state_dict(_openai_names(tensors, raw["num_hidden_layers"]))
    return model(torch.tensor(tokens))


def _openai_names(tensors: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    state = {
        "embedding.weight": tensors["model.embed_tokens.weight"],
        "norm.scale": tensors["model.norm.weight"],
        "unembedding.weight": tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]),
    }
    for i in range(num_layers):
        layer = {
            name.removeprefix(f"model.layers.{i}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"model.layers.{i}.")
        }
        qkv = [[layer[f"self_attn.{p}_proj.{kind}"] for p in "qkv"] for kind in ("weight", "bias")]
        experts = "mlp.experts"
        named = {
            "attn.norm.scale": layer["input_layernorm.weight"],
            "attn.sinks": layer["self_attn.sinks"],
            "attn.qkv.weight": torch.cat(qkv[0]),
            "attn.qkv.bias": torch.cat(qkv[1]),
            "attn.out.weight": layer["self_attn.o_proj.weight"],
            "attn.out.bias": layer["self_attn.o_proj.bias"],
            "mlp.norm.scale": layer["post_attention_layernorm.weight"],
            "mlp.gate.weight": layer["mlp.router.weight"],
            "mlp.gate.bias": layer["mlp.router.bias"],
            "mlp.mlp1_weight": layer[f"{experts}.gate_up_proj"].transpose(1, 2),
            "mlp.mlp1_bias": layer[f"{experts}.gate_up_proj_bias"],
            "mlp.mlp2_weight": layer[f"{experts}.down_proj"].transpose(1, 2),
            "mlp.mlp2_bias": layer[f"{experts}.down_proj_bias"],
        }
        state |= {f"block.{i}.{name}": tensor for name, tensor in named.items()}
    return state
