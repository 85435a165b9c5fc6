"""One mixture-of-experts layer, from hidden states to hidden states."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.ops import dispatch
from headrace.ops.arena import Take, fresh
from headrace.ops.experts import Experts, moe
from headrace.ops.lora import MoELora
from headrace.ops.norm import NextNorm, rms_norm
from headrace.ops.routing import RoutingBuffers, route, routing_buffers, routing_counters
from headrace.ops.tiles import MoETiles


@dataclass(frozen=True)
class MoEWeights:
    """What one layer holds."""

    norm: Tensor  # [hidden]
    eps: float
    router: Tensor  # [num_experts, hidden]
    router_bias: Tensor | None  # [num_experts]
    experts: Experts
    top_k: int
    renormalize: bool = True  # the weights of the chosen experts sum to one

    @property
    def num_experts(self) -> int:
        """Experts to choose from."""
        return len(self.router)


@dataclass(frozen=True)
class MoEBuffers:
    """What a layer writes on its way, on the GPU; all layers of a step may share it."""

    tiles: MoETiles
    routing: RoutingBuffers
    activated: Tensor  # [num_slots, inter]: the first matmul's result, rows sorted by expert
    weighted: Tensor  # [num_slots, hidden]: the second's, row token * top_k + k


def moe_buffers(
    take: Take,
    num_tokens: int,
    weights: MoEWeights,
    counters: Tensor,  # from `routing_counters`, for num_tokens or more
    tiles: MoETiles | None = None,  # None: the table's choice
) -> MoEBuffers:
    """Buffers of `moe_layer` on the GPU for so many tokens."""
    from headrace.ops.moe_kernel import choose_tiles

    hidden, dtype = weights.norm.shape[0], weights.norm.dtype
    num_slots = num_tokens * weights.top_k
    tiles = tiles or choose_tiles(num_slots, weights)
    inter = weights.experts.gate_up_bias.shape[1] // 2
    return MoEBuffers(
        tiles,
        routing_buffers(
            take, counters, num_tokens, hidden, weights.num_experts, weights.top_k,
            tiles.gate_up.block_m, dtype,
        ),
        take((num_slots, inter), dtype),
        take((num_slots, hidden), dtype),
    )  # fmt: skip


def moe_layer(
    h: Tensor,  # [num_tokens, hidden]
    weights: MoEWeights,
    buffers: MoEBuffers | None = None,
    out: Tensor | None = None,  # [num_tokens, hidden]
    lora: MoELora | None = None,
    next_norm: NextNorm | None = None,
) -> Tensor:
    """h + sum_k weight_k expert_k(rms_norm(h)), over the top_k experts of each token.

    next_norm, that of the layer that follows, is computed along with the sum.
    Adapters change the router's logits, gate_up before the activation and down before the weight.

    On the GPU the experts' weights are PreparedMXFP4 or DenseWeight. Without buffers and out it
    allocates its own. Raises ValueError for wrong shapes, dtypes and layouts.
    """
    if next_norm is not None:
        next_norm.check(h)
    if dispatch.takes_kernel(h):
        from headrace.ops.moe_kernel import moe_layer_kernel

        if buffers is None:
            buffers = own_buffers(len(h), weights, h.device)
        out = torch.empty_like(h) if out is None else out
        return moe_layer_kernel(h, weights, buffers, out, lora, next_norm)
    x = rms_norm(h, weights.norm, weights.eps)
    ids, routing_weights = route(
        x, weights.router, weights.router_bias, weights.top_k, weights.renormalize, lora
    )
    out = torch.add(h, moe(x, ids, routing_weights, weights.experts, lora), out=out)
    if next_norm is not None:
        rms_norm(out, next_norm.weight, next_norm.eps, out=next_norm.out)
    return out


def own_buffers(
    num_tokens: int,
    weights: MoEWeights,
    device: torch.device | str,
    tiles: MoETiles | None = None,
) -> MoEBuffers:
    """Buffers outside any arena."""
    counters = routing_counters(num_tokens, device)
    return moe_buffers(fresh(device), num_tokens, weights, counters, tiles)
