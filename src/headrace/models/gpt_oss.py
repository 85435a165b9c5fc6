"""gpt-oss: sparse experts, attention sinks, alternating sliding windows, YaRN."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.models.batch import Batch, KVGroup, KVLayout
from headrace.models.config import GptOssConfig
from headrace.ops.attention import paged_attention
from headrace.ops.experts import Experts, moe
from headrace.ops.kv_write import write_kv
from headrace.ops.linear import linear
from headrace.ops.norm import add_rms_norm, rms_norm
from headrace.ops.rope import (
    apply_rope,
    rope_cos_sin,
    rope_inv_freq,
    yarn_attention_factor,
    yarn_inv_freq,
)
from headrace.ops.routing import route


@dataclass(frozen=True)
class LayerWeights:
    """One layer. Biases of the attention are None in a checkpoint without attention_bias."""

    attention_norm: Tensor  # [hidden]
    qkv: Tensor  # [(num_heads + 2 * num_kv_heads) * head_dim, hidden]: all q, then k, then v
    qkv_bias: Tensor | None
    output: Tensor  # [hidden, num_heads * head_dim]
    output_bias: Tensor | None
    sinks: Tensor  # [num_heads]
    moe_norm: Tensor  # [hidden]
    router: Tensor  # [num_experts, hidden]
    router_bias: Tensor  # [num_experts]
    experts: Experts


@dataclass(frozen=True)
class GptOssWeights:
    """All weights, on one device and (MXFP4 experts apart) in one dtype."""

    embedding: Tensor  # [vocab_size, hidden]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [hidden]
    lm_head: Tensor  # [vocab_size, hidden]


class GptOss:
    """The model: forward(batch) only; what a step needs beside the weights is in the batch."""

    def __init__(self, config: GptOssConfig, weights: GptOssWeights) -> None:
        self.config = config
        self.weights = weights
        self.device = weights.embedding.device
        self.dtype = weights.embedding.dtype
        self.kv_layout = _kv_layout(config)
        inv_freq, self._attention_factor = _rope(config)
        self._inv_freq = inv_freq.to(self.device)

    def forward(self, batch: Batch) -> Tensor:
        """Run one step. Writes the new keys and values into batch.kv_cache.

        Returns the logits of batch.output_rows, [num_outputs, vocab_size] float32.
        """
        residual = self.weights.embedding[batch.token_ids]
        rope = rope_cos_sin(batch.positions, self._inv_freq, self._attention_factor)
        groups = [batch.groups[g] for g in self.kv_layout.group_of_layer]
        eps = self.config.rms_norm_eps
        x = torch.zeros_like(residual)
        for layer, group, cache in zip(self.weights.layers, groups, batch.kv_cache, strict=True):
            x, residual = add_rms_norm(x, residual, layer.attention_norm, eps)
            x = self._attention(layer, x, rope, batch, group, cache)
            x, residual = add_rms_norm(x, residual, layer.moe_norm, eps)
            x = self._moe(layer, x)
        x = (residual + x)[batch.output_rows]
        x = rms_norm(x, self.weights.norm, eps)
        return linear(x, self.weights.lm_head).float()

    def _attention(
        self,
        layer: LayerWeights,
        x: Tensor,  # [num_tokens, hidden]
        rope: tuple[Tensor, Tensor],
        batch: Batch,
        group: KVGroup,
        kv_cache: Tensor,
    ) -> Tensor:
        num_heads, num_kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        head_dim = self.config.head_dim
        qkv = linear(x, layer.qkv, layer.qkv_bias).view(len(x), -1, head_dim)
        # q and k turn together: their heads lie side by side
        qk = apply_rope(qkv[:, : num_heads + num_kv_heads], *rope)
        q, k = qk.split((num_heads, num_kv_heads), dim=1)
        write_kv(kv_cache, k, qkv[:, num_heads + num_kv_heads :], group.slots)
        out = paged_attention(
            q,
            kv_cache,
            group.block_table,
            batch.query_start,
            batch.seq_lens,
            layer.sinks,
            group.window,
            head_dim**-0.5,
        )
        return linear(out.flatten(1), layer.output, layer.output_bias)

    def _moe(
        self,
        layer: LayerWeights,
        x: Tensor,  # [num_tokens, hidden]
    ) -> Tensor:
        top_k = self.config.num_experts_per_tok
        ids, weights = route(x, layer.router, layer.router_bias, top_k)
        return moe(x, ids, weights, layer.experts)


def _kv_layout(config: GptOssConfig) -> KVLayout:
    windows = [config.sliding_window * (k == "sliding_attention") for k in config.layer_types]
    groups = tuple(sorted(set(windows)))
    return KVLayout(
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        windows=groups,
        group_of_layer=tuple(groups.index(w) for w in windows),
    )


def _rope(config: GptOssConfig) -> tuple[Tensor, float]:
    yarn = config.yarn
    if yarn is None:
        return rope_inv_freq(config.head_dim, config.rope_theta).float(), 1.0
    inv_freq = yarn_inv_freq(
        config.head_dim,
        config.rope_theta,
        yarn.factor,
        yarn.original_max_position_embeddings,
        yarn.beta_fast,
        yarn.beta_slow,
        yarn.truncate,
    )
    attention_factor = yarn.attention_factor
    if attention_factor is None:
        attention_factor = yarn_attention_factor(yarn.factor)
    return inv_freq.float(), attention_factor
