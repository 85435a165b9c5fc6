"""The trained parameters as a checkpoint: MXFP4 experts, bfloat16 for the rest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from model import Params, Shape, is_expert_weight
from safetensors.torch import load_file
from text import TEMPLATE
from tokenizers import Tokenizer

from headrace.models.weights import quantize_experts, write_checkpoint
from headrace.ops import mxfp4


def rounded(params: Params) -> Params:
    """bfloat16 on the CPU."""
    return {n: p.detach().to("cpu", torch.bfloat16) for n, p in params.items()}


def dequantized(params: Params) -> Params:
    """What a reader of the checkpoint gets back, in float32."""

    def read(weight: torch.Tensor) -> torch.Tensor:
        stored = mxfp4.quantize(weight.transpose(1, 2))
        return mxfp4.dequantize(*stored, torch.float32).transpose(1, 2).contiguous()

    return {n: read(p) if is_expert_weight(n) else p.float() for n, p in rounded(params).items()}


def read_model(path: Path) -> Params:
    """The parameters of a written model, in float32."""
    stored = load_file(path / "model.safetensors")

    def read(name: str) -> torch.Tensor:
        blocks, scales = stored[f"{name}_blocks"], stored[f"{name}_scales"]
        return mxfp4.dequantize(blocks, scales, torch.float32).transpose(1, 2).contiguous()

    packed = [n.removesuffix("_blocks") for n in stored if n.endswith("_blocks")]
    plain = {n: t.float() for n, t in stored.items() if not n.endswith(("_blocks", "_scales"))}
    return plain | {n: read(n) for n in packed}


def write_model(path: Path, shape: Shape, params: Params, tokenizer: Tokenizer) -> None:
    """A directory that any reader of gpt-oss checkpoints opens."""
    write_checkpoint(path, shape.config(), quantize_experts(rounded(params)))
    end, pad, _ = shape.eos
    generation = {"do_sample": False, "eos_token_id": shape.eos, "pad_token_id": pad}
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|return|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.config()["max_position_embeddings"],
    }
    assert tokenizer.token_to_id("<|return|>") == end
    for file, content in (("generation_config", generation), ("tokenizer_config", names)):
        (path / f"{file}.json").write_text(json.dumps(content, indent=2) + "\n")
    tokenizer.save(str(path / "tokenizer.json"))
    shutil.copy(TEMPLATE, path / "chat_template.jinja")
