"""The router: which experts a token goes to, with what weights, and its rows sorted by expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.ops.arena import Take
from headrace.ops.linear import linear
from headrace.ops.lora import MoELora, add_lora

BLOCK_T = 16  # tokens of a router program
SLICE_K = 256  # columns of a router program
GROUP_CHUNKS = 8  # chunks of BLOCK_T tokens that one program sorts


@dataclass(frozen=True)
class SortedSlots:
    """(token, k) slots in the order of their experts, and the blocks a grouped matmul works on."""

    slots: Tensor  # [num_slots] int32: token * top_k + k; past the last block: undefined
    # [max_blocks, 4] int32: expert (-1: no work), first row, end row, 0 (the matmuls count here)
    blocks: Tensor


@dataclass(frozen=True)
class RoutingBuffers:
    """Everything that routing writes on the GPU."""

    num_experts: int
    counters: Tensor  # from `routing_counters`
    normed: Tensor  # [num_tokens, hidden]
    summed: Tensor  # [num_tokens, hidden]: x + residual
    partials: Tensor  # [slices, num_tokens, padded experts] float32
    ranks: Tensor  # [num_tokens, top_k] int32
    histograms: Tensor  # [chunks, padded experts] int32
    expert_ids: Tensor  # [num_tokens, top_k] int32
    expert_weights: Tensor  # [num_tokens, top_k] float32
    sorted: SortedSlots


def routing_counters(max_num_tokens: int, device: torch.device | str) -> Tensor:
    """Counts of programs that have finished, [blocks + 1] int32.

    Made once and kept: they must be zero before the first use, and each use leaves them zero.
    Calls that may run at the same time need their own.
    """
    return torch.zeros(-(-max_num_tokens // BLOCK_T) + 1, dtype=torch.int32, device=device)


def routing_buffers(
    take: Take,
    counters: Tensor,
    num_tokens: int,
    hidden: int,
    num_experts: int,
    top_k: int,
    block_m: int,  # of the grouped matmuls that follow
    dtype: torch.dtype,
    num_local: int | None = None,  # experts held here, if not all
) -> RoutingBuffers:
    """Buffers for one problem."""
    num_slots = num_tokens * top_k
    padded = padded_experts(num_experts)
    blocks = max_blocks(num_slots, num_local or num_experts, block_m)
    return RoutingBuffers(
        num_experts=num_experts,
        counters=counters,
        normed=take((num_tokens, hidden), dtype),
        summed=take((num_tokens, hidden), dtype),
        partials=take((-(-hidden // SLICE_K), num_tokens, padded), torch.float32),
        ranks=take((num_tokens, top_k), torch.int32),
        histograms=take((-(-num_tokens // BLOCK_T), padded), torch.int32),
        expert_ids=take((num_tokens, top_k), torch.int32),
        expert_weights=take((num_tokens, top_k), torch.float32),
        sorted=SortedSlots(take((num_slots,), torch.int32), take((blocks, 4), torch.int32)),
    )


def max_blocks(num_slots: int, num_experts: int, block_m: int) -> int:
    """Blocks of at most block_m rows that num_slots can fall into."""
    return min(num_slots, (num_slots + num_experts * (block_m - 1)) // block_m)


def padded_experts(num_experts: int) -> int:
    """Experts as the router kernel counts them: a power of two, 16 or more."""
    return max(16, 1 << (num_experts - 1).bit_length())


def route(
    x: Tensor,  # [num_tokens, hidden]
    weight: Tensor,  # [num_experts, hidden]
    bias: Tensor | None,  # [num_experts]
    top_k: int,
    renormalize: bool = True,
    lora: MoELora | None = None,
) -> tuple[Tensor, Tensor]:
    """logits = x W^T + b; the top_k largest, a tie going to the lower expert; softmax over them.

    Without renormalize the softmax is over all experts, and the weights don't sum to one. Adapters
    change the logits.
    Returns expert ids [num_tokens, top_k] int64 by falling logit, and weights float32.
    """
    assert top_k <= len(weight), f"{top_k=} {weight.shape=}"
    logits = linear(x, weight, bias).float()
    if lora is not None:
        add_lora(logits, x, lora.layer.router, lora.memory, lora.rows)
    # topk promises nothing about ties; a stable sort keeps the lower expert first
    values, experts = logits.sort(dim=-1, descending=True, stable=True)
    weights = values[:, :top_k].softmax(-1) if renormalize else values.softmax(-1)[:, :top_k]
    return experts[:, :top_k], weights
