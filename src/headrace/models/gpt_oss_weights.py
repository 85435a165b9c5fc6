"""From the tensors of a gpt-oss checkpoint to the model's weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from headrace.config import ConfigError
from headrace.models.config import GptOssConfig
from headrace.models.gpt_oss import GptOssWeights, LayerWeights
from headrace.models.weights import Checkpoint
from headrace.ops.experts import Experts, ExpertWeight
from headrace.ops.moe import MoEWeights
from headrace.ops.mxfp4 import BLOCK_SIZE, NAN_SCALE, MXFP4Weight

Shapes = dict[str, tuple[int, ...]]


class TensorSource(Protocol):
    """Where tensors come from, by their names in a checkpoint."""

    def prefetch(self, names: Iterable[str]) -> None:
        """These will be read soon, in this order."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor, as stored, on the device."""
        ...


def load_gpt_oss(
    config: GptOssConfig, checkpoint: Checkpoint, dtype: torch.dtype, gpu_layout: bool
) -> GptOssWeights:
    """Check every tensor, then read them. ConfigError names what doesn't fit config.json."""
    is_mxfp4 = check_gpt_oss(config, checkpoint)
    return read_gpt_oss(config, checkpoint, is_mxfp4, dtype, gpu_layout)


def check_gpt_oss(config: GptOssConfig, checkpoint: Checkpoint) -> bool:
    """Check every tensor, and tell whether the experts are packed in MXFP4."""
    is_mxfp4 = has_packed_experts(checkpoint)
    checkpoint.check(tensor_shapes(config, is_mxfp4))
    return is_mxfp4


def has_packed_experts(checkpoint: Checkpoint) -> bool:
    """Known by tensor names: re-uploads of MXFP4 checkpoints carry other quantization_configs."""
    return any(name.endswith("_blocks") for name in checkpoint)


def read_gpt_oss(
    config: GptOssConfig,
    source: TensorSource,
    is_mxfp4: bool,
    dtype: torch.dtype,
    gpu_layout: bool,
) -> GptOssWeights:
    """Read layer by layer.

    Experts in MXFP4 stay packed unless dtype is float32. With gpu_layout all experts are in the
    layout of the GPU's kernels, and dtype must be bfloat16.
    """
    names = tensor_shapes(config, is_mxfp4)
    embedding = source.read("model.embed_tokens.weight").to(dtype)
    layers = []
    for i in range(config.num_hidden_layers):
        # the next layer is on its way while this one is prepared
        this_and_next = (_prefix(i), _prefix(i + 1))
        source.prefetch(name for name in names if name.startswith(this_and_next))
        layers.append(_read_layer(config, source, _prefix(i), dtype, is_mxfp4, gpu_layout))
    tied = config.tie_word_embeddings
    return GptOssWeights(
        embedding=embedding,
        layers=tuple(layers),
        norm=source.read("model.norm.weight").to(dtype),
        lm_head=embedding if tied else source.read("lm_head.weight").to(dtype),
    )


class Blank:
    """Zeros of the checkpoint's shapes: for launches that lead to kernels, not to numbers."""

    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        self._shapes = shapes
        self._device = device

    def prefetch(self, names: Iterable[str]) -> None:
        """There is nothing to fetch."""

    def read(self, name: str) -> Tensor:
        """A tensor of the dtype that checkpoints have."""
        is_packed = name.endswith(("_blocks", "_scales"))
        dtype = torch.uint8 if is_packed else torch.bfloat16
        return torch.zeros(self._shapes[name], dtype=dtype, device=self._device)


def blank_gpt_oss(config: GptOssConfig, is_mxfp4: bool, device: torch.device) -> GptOssWeights:
    """What `read_gpt_oss` makes for the GPU, of zeros: one layer is all layers."""
    one = replace(config, num_hidden_layers=1, layer_types=config.layer_types[:1])
    one = replace(one, tie_word_embeddings=True)  # takes the memory once
    source = Blank(tensor_shapes(one, is_mxfp4), device)
    weights = read_gpt_oss(one, source, is_mxfp4, torch.bfloat16, gpu_layout=True)
    return replace(weights, layers=config.num_hidden_layers * weights.layers)


def _prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def tensor_shapes(config: GptOssConfig, is_mxfp4: bool) -> Shapes:
    """Every tensor of the checkpoint by name. ConfigError for sizes that MXFP4 cannot hold."""
    hidden, vocab = config.hidden_size, config.vocab_size
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocab, hidden)
    layer = _attention_shapes(config) | _moe_shapes(config, is_mxfp4)
    for i in range(config.num_hidden_layers):
        shapes |= {_prefix(i) + name: shape for name, shape in layer.items()}
    return shapes


def _attention_shapes(config: GptOssConfig) -> Shapes:
    hidden, head_dim = config.hidden_size, config.head_dim
    q_width, kv_width = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    shapes: Shapes = {
        "input_layernorm.weight": (hidden,),
        "self_attn.sinks": (config.num_attention_heads,),
        "self_attn.q_proj.weight": (q_width, hidden),
        "self_attn.k_proj.weight": (kv_width, hidden),
        "self_attn.v_proj.weight": (kv_width, hidden),
        "self_attn.o_proj.weight": (hidden, q_width),
    }
    if config.attention_bias:
        weights = [name for name in shapes if name.endswith("_proj.weight")]
        shapes |= {name.replace("weight", "bias"): shapes[name][:1] for name in weights}
    return shapes


def _moe_shapes(config: GptOssConfig, is_mxfp4: bool) -> Shapes:
    hidden, inter = config.hidden_size, config.intermediate_size
    num_experts = config.num_local_experts
    shapes: Shapes = {
        "post_attention_layernorm.weight": (hidden,),
        "mlp.router.weight": (num_experts, hidden),
        "mlp.router.bias": (num_experts,),
    }
    sizes = {"gate_up_proj": (hidden, 2 * inter), "down_proj": (inter, hidden)}
    for proj, (in_features, out_features) in sizes.items():
        name = f"mlp.experts.{proj}"
        shapes[f"{name}_bias"] = (num_experts, out_features)
        if is_mxfp4:
            if in_features % BLOCK_SIZE:
                field = "hidden_size" if proj == "gate_up_proj" else "intermediate_size"
                raise ConfigError(
                    f"config.json: {field} is {in_features}; MXFP4 experts need a multiple of 32"
                )
            shapes[f"{name}_scales"] = (num_experts, out_features, in_features // BLOCK_SIZE)
            shapes[f"{name}_blocks"] = (*shapes[f"{name}_scales"], BLOCK_SIZE // 2)
        else:
            shapes[name] = (num_experts, in_features, out_features)
    return shapes


def _read_layer(
    config: GptOssConfig,
    source: TensorSource,
    prefix: str,
    dtype: torch.dtype,
    is_mxfp4: bool,
    gpu_layout: bool,
) -> LayerWeights:
    def read(name: str) -> Tensor:
        return source.read(prefix + name).to(dtype)

    def read_bias(*projections: str) -> Tensor | None:
        if not config.attention_bias:
            return None
        return torch.cat([read(f"self_attn.{p}_proj.bias") for p in projections])

    def read_experts(projection: str) -> ExpertWeight:
        name = f"{prefix}mlp.experts.{projection}_proj"
        weight: Tensor | MXFP4Weight
        if is_mxfp4:
            weight = _read_mxfp4(source, name)
        else:
            weight = source.read(name).to(dtype).transpose(1, 2)
        if gpu_layout:
            return _in_gpu_layout(weight, has_pairs=projection == "gate_up")
        if isinstance(weight, MXFP4Weight) and dtype == torch.float32:
            return _dequantize(weight)
        return weight

    return LayerWeights(
        attention_norm=read("input_layernorm.weight"),
        qkv=torch.cat([read(f"self_attn.{p}_proj.weight") for p in "qkv"]),
        qkv_bias=read_bias("q", "k", "v"),
        output=read("self_attn.o_proj.weight"),
        output_bias=read_bias("o"),
        sinks=read("self_attn.sinks"),
        moe=MoEWeights(
            norm=read("post_attention_layernorm.weight"),
            eps=config.rms_norm_eps,
            router=read("mlp.router.weight"),
            router_bias=read("mlp.router.bias"),
            # down first: it would be put into the memory that gate_up came in, and what is left
            # of that fits no other layer's (13 GB of gpt-oss-120b on a GPU)
            experts=Experts(
                down=read_experts("down"),
                down_bias=read("mlp.experts.down_proj_bias"),
                gate_up=read_experts("gate_up"),
                gate_up_bias=read("mlp.experts.gate_up_proj_bias"),
                alpha=config.swiglu_alpha,
                limit=config.swiglu_limit,
            ),
            top_k=config.num_experts_per_tok,
        ),
    )


def _read_mxfp4(source: TensorSource, name: str) -> MXFP4Weight:
    packed = MXFP4Weight(source.read(f"{name}_blocks"), source.read(f"{name}_scales"))
    if (packed.scales == NAN_SCALE).any():
        raise ConfigError(f"tensor {name}_scales holds 0xFF, which means NaN: the file is damaged")
    return packed


def _in_gpu_layout(weight: Tensor | MXFP4Weight, has_pairs: bool) -> ExpertWeight:
    """has_pairs: gates and ups, which the checkpoint interleaves."""
    from headrace.ops.mxfp4_kernel import RowOrder
    from headrace.ops.weight_formats import in_gpu_layout

    return in_gpu_layout(weight, RowOrder.INTERLEAVED if has_pairs else RowOrder.PLAIN)


def _dequantize(packed: MXFP4Weight) -> Tensor:
    """Dense [num_experts, out, in] in memory order [.., in, out], as dense checkpoints are.

    For a few rows the CPU's matmul reads that order 30 % faster than the other one.
    """
    num_experts, out_features, in_features = packed.shape
    dense = torch.empty(num_experts, in_features, out_features, device=packed.scales.device)
    for expert, matrix in enumerate(dense):  # one at a time: the temporaries stay small
        matrix.copy_(packed.rows(expert).dequantize(torch.float32).T)
    return dense.transpose(1, 2)
