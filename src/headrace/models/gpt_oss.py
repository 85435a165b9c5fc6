"""gpt-oss: sparse experts, attention sinks, alternating sliding windows, YaRN."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from headrace.models.batch import Batch, KVLayout
from headrace.models.config import GptOssConfig
from headrace.ops import dispatch
from headrace.ops.arena import Arena, ArenaSize, Take, fresh
from headrace.ops.attention import paged_attention
from headrace.ops.embedding import embed
from headrace.ops.linear import linear
from headrace.ops.lora import LoraBuffers, LoraStep, lora_buffers, most_in_parts
from headrace.ops.moe import MoEBuffers, MoEWeights, moe_buffers, moe_layer
from headrace.ops.norm import NextNorm, rms_norm
from headrace.ops.rope import (
    rope_and_cache,
    rope_cos_sin,
    rope_inv_freq,
    yarn_attention_factor,
    yarn_inv_freq,
)
from headrace.ops.routing import routing_counters


@dataclass(frozen=True)
class LayerWeights:
    """One layer. Biases of the attention are None in a checkpoint without attention_bias."""

    attention_norm: Tensor  # [hidden]
    qkv: Tensor  # [(num_heads + 2 * num_kv_heads) * head_dim, hidden]: all q, then k, then v
    qkv_bias: Tensor | None
    output: Tensor  # [hidden, num_heads * head_dim]
    output_bias: Tensor | None
    sinks: Tensor  # [num_heads]
    moe: MoEWeights


@dataclass(frozen=True)
class GptOssWeights:
    """All weights, on one device and (MXFP4 experts apart) in one dtype."""

    embedding: Tensor  # [vocab_size, hidden]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [hidden]
    lm_head: Tensor  # [vocab_size, hidden]


@dataclass(frozen=True)
class StepBuffers:
    """What a step writes on its way; the layers share it."""

    hidden: Tensor  # [num_tokens, hidden]: the residual stream
    normed: Tensor  # [num_tokens, hidden]: the norm of hidden that a layer's attention reads
    cos: Tensor  # [num_tokens, 1, head_dim / 2] float32
    sin: Tensor
    qkv: Tensor  # [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]
    q: Tensor  # [num_tokens, num_heads, head_dim]
    attended: Tensor  # [num_tokens, num_heads, head_dim]
    moe: MoEBuffers | None  # on the GPU
    outputs: Tensor  # [num_outputs, hidden]
    logits: Tensor  # [num_outputs, vocab_size] float32
    lora: LoraBuffers


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
        self._arena: Arena | None = None
        self._counters = routing_counters(0, self.device)
        self._max_lora_rank = 0

    def reserve(self, max_num_tokens: int, max_num_outputs: int, max_lora_rank: int = 0) -> None:
        """Take the memory of the largest step; steps don't allocate from now on."""
        self._max_lora_rank = max_lora_rank
        self._counters = routing_counters(max_num_tokens, self.device)
        # fewer rows may take more in places: other tiles, and x A^T in parts
        tokens = {max_num_tokens, *(1 << i for i in range(max_num_tokens.bit_length()))}
        outputs = {max_num_outputs}
        if self._on_gpu and max_lora_rank:
            few_tokens, few_outputs = most_in_parts(self.weights.layers[0].moe.top_k)
            tokens.add(min(few_tokens, max_num_tokens))
            outputs.add(min(few_outputs, max_num_outputs))
        num_bytes = 0
        for num_tokens, num_outputs in product(tokens, outputs):
            size = ArenaSize()
            self._buffers(size.take, num_tokens, num_outputs)
            num_bytes = max(num_bytes, size.num_bytes)
        self._arena = Arena(num_bytes, self.device)

    def base_tensor(self, name: str) -> Tensor:
        """The embedding or the LM head, by the checkpoint's name."""
        weights = self.weights
        tensors = {
            "model.embed_tokens.weight": weights.embedding,
            "lm_head.weight": weights.lm_head,
        }
        return tensors[name]

    def first_layers(self) -> GptOss:
        """The same with one layer of each kind, and one more: only the last has no next norm."""
        of_layer, short = self.kv_layout.group_of_layer, copy(self)
        num_layers = 2 + max(of_layer.index(group) for group in set(of_layer))
        short.weights = replace(self.weights, layers=self.weights.layers[:num_layers])
        return short

    def forward(self, batch: Batch) -> Tensor:
        """Run one step. Writes the new keys and values into batch.kv_cache.

        Returns the logits of batch.output_rows, [num_outputs, vocab_size] float32, which the
        next step may overwrite.
        """
        eps = self.config.rms_norm_eps
        buffers = self._step_buffers(len(batch.token_ids), len(batch.output_rows))
        h = embed(batch.token_ids, self.weights.embedding, batch.sampled, out=buffers.hidden)
        lora = LoraStep(batch.lora, buffers.lora) if batch.lora else None
        if lora:
            lora.add_to_embedding(h, batch.token_ids, batch.sampled)
        rope = buffers.cos, buffers.sin
        rope_cos_sin(batch.positions, self._inv_freq, self._attention_factor, out=rope)
        rms_norm(h, self.weights.layers[0].attention_norm, eps, out=buffers.normed)
        for i, layer in enumerate(self.weights.layers):
            self._attention(i, layer, h, batch, buffers, lora)
            next_norm = self._next_norm(i, buffers)
            moe_lora = lora.moe(i) if lora else None
            moe_layer(h, layer.moe, buffers.moe, out=h, lora=moe_lora, next_norm=next_norm)
        x = rms_norm(h, self.weights.norm, eps, out=buffers.outputs, rows=batch.output_rows)
        logits = linear(x, self.weights.lm_head, out=buffers.logits)
        if lora:
            lora.add_to_lm_head(logits, x)
        return logits

    def _attention(
        self,
        i: int,
        layer: LayerWeights,
        h: Tensor,  # [num_tokens, hidden], changed in place
        batch: Batch,
        buffers: StepBuffers,
        lora: LoraStep | None,
    ) -> None:
        """h += attention(x) W_o^T + b_o, for x = rms_norm(h) in buffers.normed."""
        config, kv_cache, x = self.config, batch.kv_cache[i], buffers.normed
        group = batch.groups[self.kv_layout.group_of_layer[i]]
        qkv = linear(x, layer.qkv, layer.qkv_bias, out=buffers.qkv)
        if lora:
            lora.add_to_qkv(i, qkv, x)
        q = rope_and_cache(
            qkv,
            buffers.cos,
            buffers.sin,
            kv_cache,
            group.slots,
            config.num_attention_heads,
            config.num_key_value_heads,
            out=buffers.q,
        )
        attended = paged_attention(
            q,
            kv_cache,
            group.block_table,
            batch.query_start,
            batch.seq_lens,
            layer.sinks,
            group.window,
            config.head_dim**-0.5,
            plan=group.plan,
            out=buffers.attended,
        )
        x = attended.flatten(1)
        linear(x, layer.output, layer.output_bias, residual=h, out=h)
        if lora:
            lora.add_to_output(i, h, x)

    def _next_norm(self, i: int, buffers: StepBuffers) -> NextNorm | None:
        """The norm after layer i: the next layer's. That before the LM head has fewer rows."""
        if i + 1 == len(self.weights.layers):
            return None
        norm = self.weights.layers[i + 1].attention_norm
        return NextNorm(norm, self.config.rms_norm_eps, buffers.normed)

    def _step_buffers(self, num_tokens: int, num_outputs: int) -> StepBuffers:
        if self._arena is None:
            self._counters = routing_counters(num_tokens, self.device)
            return self._buffers(fresh(self.device), num_tokens, num_outputs)
        self._arena.reset()
        return self._buffers(self._arena.take, num_tokens, num_outputs)

    def _buffers(self, take: Take, num_tokens: int, num_outputs: int) -> StepBuffers:
        config, dtype = self.config, self.dtype
        num_heads, head_dim = config.num_attention_heads, config.head_dim
        qkv_heads = num_heads + 2 * config.num_key_value_heads
        moe = self.weights.layers[0].moe
        rope = num_tokens, 1, head_dim // 2
        lora = LoraBuffers()
        if self._on_gpu and self._max_lora_rank:
            lora = lora_buffers(take, num_tokens, num_outputs, moe.top_k, self._max_lora_rank)
        return StepBuffers(
            hidden=take((num_tokens, config.hidden_size), dtype),
            normed=take((num_tokens, config.hidden_size), dtype),
            cos=take(rope, torch.float32),
            sin=take(rope, torch.float32),
            qkv=take((num_tokens, qkv_heads * head_dim), dtype),
            q=take((num_tokens, num_heads, head_dim), dtype),
            attended=take((num_tokens, num_heads, head_dim), dtype),
            moe=moe_buffers(take, num_tokens, moe, self._counters) if self._on_gpu else None,
            outputs=take((num_outputs, config.hidden_size), dtype),
            logits=take((num_outputs, config.vocab_size), torch.float32),
            lora=lora,
        )

    @property
    def _on_gpu(self) -> bool:
        return dispatch.takes_kernel(self.weights.embedding)


def _kv_layout(config: GptOssConfig) -> KVLayout:
    windows = [config.sliding_window * (k == "sliding_attention") for k in config.layer_types]
    groups = tuple(sorted(set(windows)))
    return KVLayout(
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
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
