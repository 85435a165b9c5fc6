"""The one argument of every model's forward: a flat batch of rows of many requests."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from headrace.ops.attention_plan import AttentionPlan
from headrace.ops.lora import LoraBatch


@dataclass(frozen=True)
class KVGroup:
    """The pages of one kind of layer (full attention, or one sliding window).

    Worked example with block_size 4 and a sequence of 10 tokens on pages 7, 2, 5:
    block_table row = [7, 2, 5], token 9 has slot 5 * 4 + 1 = 21. Once a window of 4 has
    passed page 7, its entry is -1: attention must never read an entry outside the window.
    """

    block_table: Tensor  # [num_seqs, max_blocks] int32: page of block i of the sequence, or -1
    slots: Tensor  # [num_tokens] int64: page * block_size + offset, where this token's k, v go
    window: int  # tokens a query sees including itself; 0 means all
    plan: AttentionPlan | None = None  # who computes what of the attention; the CPU needs none


@dataclass(frozen=True)
class Batch:
    """Prefill chunks and decode rows of many requests, one after the other.

    Sequence s owns rows query_start[s]:query_start[s+1]; they are its tokens at positions
    seq_lens[s] - num_rows .. seq_lens[s] - 1. Keys and values of earlier positions are in the
    cache. The tensors may be the static buffers of a captured CUDA graph.
    """

    token_ids: Tensor  # [num_tokens] int64; -1 - i: what row i of the step before sampled
    positions: Tensor  # [num_tokens] int64
    query_start: Tensor  # [num_seqs + 1] int32
    seq_lens: Tensor  # [num_seqs] int32: tokens in the cache after this step
    groups: tuple[KVGroup, ...]  # layer i of the model uses groups[kv_layout.group_of_layer[i]]
    output_rows: Tensor  # [num_outputs] int64: rows whose logits are wanted
    # [num_layers] of [2 (k, v), num_pages, block_size, num_kv_heads, head_dim], written in place
    kv_cache: tuple[Tensor, ...]
    # [max_num_seqs] int64: what the step before sampled; None if every token id is known
    sampled: Tensor | None = None
    lora: LoraBatch | None = None  # None: no row has an adapter


@dataclass(frozen=True)
class KVLayout:
    """What a model tells the engine about its cache, so that the engine can size and lay it out."""

    num_layers: int
    num_heads: int  # of the queries
    num_kv_heads: int
    head_dim: int
    windows: tuple[int, ...]  # one entry a group, 0 = full attention
    group_of_layer: tuple[int, ...]  # [num_layers] index into windows
