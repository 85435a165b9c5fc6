"""Random gpt-oss checkpoints in the public layout, for sizes whose weights can't be had.

Activations stay finite and routing spreads over the experts; the text is noise. A tensor is drawn
in chunks with a seed each, so that a file is the same whatever the number of threads.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import resources
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headrace.bench.synth_tokenizer import special_ids, write_tokenizer
from headrace.config import ConfigError
from headrace.models.config import GptOssConfig, parse_config
from headrace.models.gpt_oss_weights import tensor_shapes
from headrace.models.weights import INDEX_NAME

CHUNK_BYTES = 2**24  # drawn and written at once by a thread
SHARD_BYTES = 5_000_000_000  # as in the public checkpoints
ROUTER_STD = 0.05

Progress = Callable[[int, int], None]  # (bytes written, bytes in all)
Table = np.ndarray[Any, np.dtype[Any]]  # [65536] or [256]: random bits -> stored value


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


@dataclass(frozen=True)
class Chunk:
    """A piece of one tensor: where it goes and what it is drawn from."""

    path: Path
    offset: int  # bytes from the start of the file
    num_bytes: int
    seed: tuple[int, int, int]  # of the checkpoint; tensor; piece
    table: Table


def write_synthetic(
    path: Path, config: dict[str, Any], seed: int, progress: Progress | None = None
) -> None:
    """Write a checkpoint directory: config, tokenizer, chat template, sharded safetensors.

    Raises ConfigError when the directory has safetensors already, or the disk has too little room.
    """
    shapes = tensor_shapes(parse_config(config), is_mxfp4=True)
    path.mkdir(parents=True, exist_ok=True)
    if any(path.glob("*.safetensors")):
        raise ConfigError(f"{path} holds a checkpoint already; delete it or name another directory")
    total = sum(_num_bytes(name, shape) for name, shape in shapes.items())
    free = shutil.disk_usage(path).free
    if free < total * 1.01:
        raise ConfigError(f"{path} has {free / 1e9:.1f} GB of room; this needs {total / 1e9:.1f}")
    _write_json(path / "config.json", config)
    _write_json(path / "generation_config.json", _generation_config(config["vocab_size"]))
    write_tokenizer(path, config["vocab_size"])
    template = resources.files("headrace") / "data" / "harmony.jinja"
    (path / "chat_template.jinja").write_text(template.read_text(encoding="utf-8"))
    _write_tensors(path, shapes, parse_config(config), seed, progress)


def _write_tensors(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    config: GptOssConfig,
    seed: int,
    progress: Progress | None,
) -> None:
    chunks = list(_chunks(path, shapes, config, seed))
    total, done = sum(c.num_bytes for c in chunks), 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for future in as_completed([pool.submit(_write_chunk, chunk) for chunk in chunks]):
            done += future.result()
            if progress:
                progress(done, total)


def _chunks(
    path: Path, shapes: dict[str, tuple[int, ...]], config: GptOssConfig, seed: int
) -> Iterator[Chunk]:
    """Lay out the shards, write their headers and the index, and cut the tensors into pieces."""
    shards = _split(shapes)
    index = {name: i for i, name in enumerate(shapes)}
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = path / f"model-{number:05}-of-{len(shards) - 1:05}.safetensors"
        weight_map |= dict.fromkeys(names, file.name)
        start = _write_header(file, {name: shapes[name] for name in names})
        for name in names:
            table, end = _table(name, config), start + _num_bytes(name, shapes[name])
            for piece, offset in enumerate(range(start, end, CHUNK_BYTES)):
                size = min(CHUNK_BYTES, end - offset)
                yield Chunk(file, offset, size, (seed, index[name], piece), table)
            start = end
    size = sum(_num_bytes(name, shape) for name, shape in shapes.items())
    _write_json(path / INDEX_NAME, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _split(shapes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        num_bytes = _num_bytes(name, shape)
        if shards[-1] and size + num_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    return shards


def _write_header(file: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    """Start a safetensors file of its full size; returns where the data begins."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + _num_bytes(name, shape)
        dtype = "U8" if _is_packed(name) else "BF16"
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        out.truncate(8 + len(header) + end)
    return 8 + len(header)


def _write_chunk(chunk: Chunk) -> int:
    """Random bits, through the table, to the file; numpy leaves the other threads alone."""
    bits = np.random.SFC64(chunk.seed).random_raw(-(-chunk.num_bytes // 8))
    values = chunk.table.take(bits.view(np.uint8 if len(chunk.table) == 256 else np.uint16))
    with chunk.path.open("r+b") as out:
        os.pwrite(out.fileno(), values.view(np.uint8)[: chunk.num_bytes].data, chunk.offset)
    return chunk.num_bytes


def _table(name: str, config: GptOssConfig) -> Table:
    """What the bits of a tensor stand for: all bytes, scales 119 to 121, or a normal in bf16."""
    if name.endswith("_blocks"):
        return np.arange(256, dtype=np.uint8)
    if name.endswith("_scales"):
        return (119 + np.arange(256) * 3 // 256).astype(np.uint8)
    if "norm" in name:
        return _normal_table(std=0.1, mean=1.0)
    if name.endswith("embed_tokens.weight") or name.endswith("sinks"):
        return _normal_table(std=1.0)
    if "router" in name or name.endswith("bias"):
        return _normal_table(std=ROUTER_STD)
    in_features = config.hidden_size
    if "o_proj" in name:
        in_features = config.num_attention_heads * config.head_dim
    return _normal_table(std=in_features**-0.5)


def _normal_table(std: float, mean: float = 0.0) -> Table:
    """The 65536 quantiles of a normal, as the bits of bf16: 16 random bits choose one."""
    quantiles = torch.special.ndtri((torch.arange(65536, dtype=torch.float64) + 0.5) / 65536)
    return (quantiles * std + mean).bfloat16().view(torch.int16).numpy()


def _num_bytes(name: str, shape: tuple[int, ...]) -> int:
    return prod(shape) * (1 if _is_packed(name) else 2)


def _is_packed(name: str) -> bool:
    return name.endswith(("_blocks", "_scales"))


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
