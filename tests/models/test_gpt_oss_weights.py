from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from headrace.config import ConfigError
from headrace.files import read_json
from headrace.models import load_model
from headrace.models.config import parse_config, read_config
from headrace.models.file_reader import FileReader
from headrace.models.gpt_oss_weights import (
    blank_gpt_oss,
    check_gpt_oss,
    load_gpt_oss,
    tensor_shapes,
)
from headrace.models.weights import Checkpoint, quantize_experts, write_checkpoint
from headrace.ops.experts import Experts
from headrace.ops.experts_kernel import DenseWeight
from headrace.ops.moe import moe_layer, own_buffers
from headrace.ops.moe_kernel import moe_layer_kernel
from headrace.ops.mxfp4 import MXFP4Weight
from headrace.ops.mxfp4_kernel import PreparedMXFP4, RowOrder, restore
from tests.checkpoints import random_checkpoint, random_tensors, tiny_config
from tests.oracles import stored_tensors
from tests.paged import logits_of

EXPERTS = "model.layers.1.mlp.experts"
PROMPT = list(range(50))


def rewrite(path: Path, change: dict[str, Tensor | None]) -> Path:
    """Replace tensors of a checkpoint of one file; None drops one."""
    file = path / "model.safetensors"
    tensors = load_file(file) | change
    save_file({name: t for name, t in tensors.items() if t is not None}, file)
    return path


def test_the_table_of_shapes_fits_the_published_20b_model() -> None:
    config = parse_config(
        tiny_config(
            **{"hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 32},
            **{"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64},
            **{"vocab_size": 201088, "num_hidden_layers": 24},
        )
    )
    shapes = tensor_shapes(config, is_mxfp4=True)
    assert len(shapes) == 3 + 24 * 19
    assert shapes[f"{EXPERTS}.gate_up_proj_blocks"] == (32, 5760, 90, 16)
    assert shapes[f"{EXPERTS}.down_proj_scales"] == (32, 2880, 90)
    assert shapes["model.layers.23.self_attn.q_proj.weight"] == (4096, 2880)
    assert shapes["model.layers.23.self_attn.o_proj.bias"] == (2880,)
    assert tensor_shapes(config, is_mxfp4=False)[f"{EXPERTS}.gate_up_proj"] == (32, 2880, 5760)


def test_packed_and_dequantized_checkpoints_give_the_same_logits(tmp_path: Path) -> None:
    packed = random_checkpoint(tmp_path / "packed", seed=0)
    dense = {name: t.bfloat16() for name, t in stored_tensors(packed).items()}
    write_checkpoint(tmp_path / "dense", tiny_config(), dense, max_shard_bytes=20_000)
    logits = [logits_of(load_model(tmp_path / d), PROMPT) for d in ("packed", "dense")]
    assert torch.equal(*logits)


@pytest.mark.parametrize("quantization", [None, {"quant_method": "gptq"}])
def test_packed_experts_are_known_by_their_names(
    tmp_path: Path, quantization: dict[str, Any] | None
) -> None:
    tensors = quantize_experts(random_tensors(tiny_config(), seed=0))
    config = tiny_config(quantization_config=quantization)
    write_checkpoint(tmp_path / "renamed", config, tensors)
    expected = logits_of(load_model(random_checkpoint(tmp_path / "plain", seed=0)), PROMPT)
    assert torch.equal(logits_of(load_model(tmp_path / "renamed"), PROMPT), expected)


def test_packed_experts_stay_packed_in_bfloat16(tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path, seed=0)
    experts = [
        load_model(path, dtype=d).weights.layers[0].moe.experts for d in ("bfloat16", "float32")
    ]
    assert isinstance(experts[0].gate_up, MXFP4Weight)
    assert isinstance(experts[1].gate_up, Tensor)
    assert torch.equal(experts[0].gate_up.dequantize(torch.float32), experts[1].gate_up)
    assert torch.equal(experts[0].down.dequantize(torch.float32), experts[1].down)


def test_swapped_scales_change_the_logits(tmp_path: Path) -> None:
    right = logits_of(load_model(random_checkpoint(tmp_path, seed=0)), PROMPT)
    name = f"{EXPERTS}.gate_up_proj_scales"
    scales = load_file(tmp_path / "model.safetensors")[name]
    wrong = logits_of(load_model(rewrite(tmp_path, {name: scales.flip(1).contiguous()})), PROMPT)
    assert (wrong - right).abs().max() > 0.1


WRONG: list[tuple[str, Tensor | None, str]] = [
    ("model.norm.weight", None, "missing tensor model.norm.weight [64]"),
    (f"{EXPERTS}.down_proj_scales", None, f"missing tensor {EXPERTS}.down_proj_scales [5, 64, 2]"),
    ("model.layers.0.self_attn.sinks", torch.zeros(5), "sinks has shape [5], expected [4]"),
    ("model.layers.2.self_attn.sinks", torch.zeros(4), "unknown tensor model.layers.2"),
    (f"{EXPERTS}.gate_up_proj", torch.zeros(5, 64, 128), f"unknown tensor {EXPERTS}.gate_up_proj"),
    (f"{EXPERTS}.gate_up_proj_blocks", torch.zeros(5, 128, 2, 16), "has dtype F32, expected U8"),
    (
        f"{EXPERTS}.down_proj_scales",
        torch.full((5, 64, 2), 255, dtype=torch.uint8),
        f"tensor {EXPERTS}.down_proj_scales holds 0xFF",
    ),
]


@pytest.mark.parametrize(("name", "tensor", "message"), WRONG, ids=[m for _, _, m in WRONG])
def test_a_wrong_tensor_is_named(
    tmp_path: Path, name: str, tensor: Tensor | None, message: str
) -> None:
    path = rewrite(random_checkpoint(tmp_path, seed=0), {name: tensor})
    with pytest.raises(ConfigError) as error:
        load_model(path)
    assert message in str(error.value)


@pytest.mark.parametrize("field", ["hidden_size", "intermediate_size"])
def test_packed_sizes_must_be_multiples_of_32(tmp_path: Path, field: str) -> None:
    """A file cannot hold such experts, so the names alone must be enough to refuse it."""
    path = random_checkpoint(tmp_path, seed=0)
    tensors = load_file(path / "model.safetensors")
    write_checkpoint(path, read_json(path / "config.json") | {field: 48}, tensors)
    with pytest.raises(ConfigError, match=f"{field} is 48; MXFP4 experts need a multiple of 32"):
        load_model(path)


def test_tied_embeddings_bring_no_head(tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=True)
    write_checkpoint(tmp_path, config, random_tensors(tiny_config(), seed=0))
    with pytest.raises(ConfigError, match=r"unknown tensor lm_head\.weight"):
        load_model(tmp_path)


@pytest.fixture
def reader() -> Iterator[FileReader]:
    with closing(FileReader(torch.device("cpu"))) as reader:
        yield reader


def gpu_experts(path: Path, reader: FileReader) -> Experts:
    """The first layer's experts, as they are made for the GPU, read as they are for it."""
    config = read_config(path)
    checkpoint = Checkpoint(path, reader)
    return load_gpt_oss(config, checkpoint, torch.bfloat16, True).layers[0].moe.experts


def in_half(experts: Experts) -> Experts:
    """For Triton's interpreter, which has no bfloat16 arithmetic."""
    if isinstance(experts.gate_up, PreparedMXFP4):
        return experts
    dense = {n: getattr(experts, n) for n in ("gate_up", "down")}
    return replace(experts, **{n: replace(w, values=w.values.half()) for n, w in dense.items()})


@pytest.mark.parametrize("max_shard_bytes", [30_000, 5_000_000])
def test_read_in_pieces_or_mapped_gives_the_same(
    tmp_path: Path, reader: FileReader, max_shard_bytes: int
) -> None:
    path = random_checkpoint(tmp_path, seed=0, max_shard_bytes=max_shard_bytes)
    seen: list[tuple[int, int]] = []
    mapped = Checkpoint(path)
    read = Checkpoint(path, reader, lambda done, total: seen.append((done, total)))
    read.prefetch(list(mapped)[:7])
    assert list(mapped) == list(read)
    for name in mapped:
        assert torch.equal(mapped.read(name), read.read(name)), name
    assert seen[-1] == (read.num_bytes, mapped.num_bytes)


def test_prepared_experts_hold_the_numbers_of_the_checkpoint(
    tmp_path: Path, reader: FileReader
) -> None:
    path = random_checkpoint(tmp_path, seed=0, hidden_size=96, intermediate_size=160)
    experts = gpu_experts(path, reader)
    stored = load_file(path / "model.safetensors")
    for proj, order in (("gate_up", RowOrder.INTERLEAVED), ("down", RowOrder.PLAIN)):
        prepared = getattr(experts, proj)
        assert isinstance(prepared, PreparedMXFP4)
        assert prepared.row_order == order
        blocks, scales = restore(prepared)
        name = f"model.layers.0.mlp.experts.{proj}_proj"
        assert torch.equal(blocks, stored[f"{name}_blocks"])
        assert torch.equal(scales, stored[f"{name}_scales"])


def like(value: Any) -> Any:
    """What launches depend on: shapes, strides and dtypes instead of tensors."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, tuple):
        return [like(item) for item in value]
    if is_dataclass(value):
        return {f.name: like(getattr(value, f.name)) for f in fields(value)}
    return value


@pytest.mark.parametrize("experts", ["mxfp4", "dense"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_blank_weights_are_like_those_of_the_checkpoint(
    tmp_path: Path, reader: FileReader, experts: str, is_tied: bool
) -> None:
    path = random_checkpoint(tmp_path, seed=0, experts=experts, tie_word_embeddings=is_tied)
    config, checkpoint = read_config(path), Checkpoint(path, reader)
    blank = blank_gpt_oss(config, check_gpt_oss(config, checkpoint), torch.device("cpu"))
    read = load_gpt_oss(config, checkpoint, torch.bfloat16, gpu_layout=True)
    assert like(blank) == like(read)


def test_dense_experts_are_transposed_for_the_gpu(tmp_path: Path, reader: FileReader) -> None:
    path = random_checkpoint(tmp_path, seed=0, experts="dense")
    experts = gpu_experts(path, reader)
    stored = load_file(path / "model.safetensors")
    for proj, order in (("gate_up", RowOrder.INTERLEAVED), ("down", RowOrder.PLAIN)):
        dense = getattr(experts, proj)
        assert isinstance(dense, DenseWeight)
        assert dense.row_order == order
        assert dense.values.is_contiguous()
        expected = stored[f"model.layers.0.mlp.experts.{proj}_proj"].transpose(1, 2)
        assert torch.equal(dense.values, expected)


@pytest.mark.parametrize("experts", ["mxfp4", "dense"])
def test_the_kernels_compute_what_the_reference_does(
    tmp_path: Path, reader: FileReader, experts: str
) -> None:
    """One layer of experts through the GPU's kernels, against the same checkpoint on the CPU."""
    path = random_checkpoint(tmp_path, seed=0, experts=experts, num_local_experts=2)
    layer = load_model(path).weights.layers[0].moe
    for_gpu = replace(
        layer,
        norm=layer.norm.half(),
        router=layer.router.half(),
        router_bias=layer.router_bias.half(),
        experts=in_half(gpu_experts(path, reader)),
    )
    h = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).half()
    out = moe_layer_kernel(h, for_gpu, own_buffers(3, for_gpu, "cpu"), torch.empty_like(h))
    expected = moe_layer(h.float(), layer)
    assert (out.float() - expected).norm() < 0.01 * (expected - h.float()).norm()
    swapped = replace(layer.experts, gate_up=layer.experts.gate_up.flip(1))
    wrong = moe_layer(h.float(), replace(layer, experts=swapped))
    assert (out.float() - wrong).norm() > 0.1 * (expected - h.float()).norm()


def test_a_damaged_file_is_named_by_the_reader(tmp_path: Path, reader: FileReader) -> None:
    """The file shrinks after its header was read."""
    path = random_checkpoint(tmp_path, seed=0)
    checkpoint = Checkpoint(path, reader)
    file = path / "model.safetensors"
    os.truncate(file, 5000)
    with pytest.raises(
        ConfigError, match=r"tensor lm_head\.weight of .* cannot be read: .* ends at"
    ):
        checkpoint.read("lm_head.weight")


@pytest.mark.gpu
def test_a_checkpoint_on_the_gpu_is_the_one_on_the_cpu(tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path, seed=0, hidden_size=128, intermediate_size=256)
    on_gpu, on_cpu = (load_model(path, device, "bfloat16").weights for device in ("cuda", "cpu"))
    assert torch.equal(on_gpu.embedding.cpu(), on_cpu.embedding)
    assert torch.equal(on_gpu.lm_head.cpu(), on_cpu.lm_head)
    for a, b in zip(on_gpu.layers, on_cpu.layers, strict=True):
        assert torch.equal(a.qkv.cpu(), b.qkv)
        assert torch.equal(a.moe.router.cpu(), b.moe.router)
        for proj in ("gate_up", "down"):
            blocks, scales = restore(getattr(a.moe.experts, proj))
            weight = getattr(b.moe.experts, proj)
            assert torch.equal(blocks.cpu(), weight.blocks)
            assert torch.equal(scales.cpu(), weight.scales)


def test_no_weight_is_put_into_the_memory_of_a_larger_tensor(tmp_path: Path) -> None:
    """What is left of it would fit no other layer's: the allocator does not move anything."""
    path = random_checkpoint(tmp_path, seed=0)
    names: list[str] = []

    class Watched(Checkpoint):
        def read(self, name: str) -> Tensor:
            names.append(name)
            return super().read(name)

    load_gpt_oss(read_config(path), Watched(path), torch.bfloat16, gpu_layout=True)
    down, gate_up = (names.index(f"{EXPERTS}.{p}_proj_blocks") for p in ("down", "gate_up"))
    assert down < gate_up
