"""One mixture-of-experts layer on the GPU: the launches in their order."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from headrace.ops import dispatch, routing_kernel
from headrace.ops.arena import fresh
from headrace.ops.checks import check_tensor
from headrace.ops.experts import ExpertWeight
from headrace.ops.experts_kernel import DenseWeight, KernelWeight, grouped_matmul
from headrace.ops.lora import MoELora
from headrace.ops.lora_kernel import LowRank, pair_parts, shrink_experts
from headrace.ops.moe import MoEBuffers, MoEWeights
from headrace.ops.mxfp4_kernel import PreparedMXFP4
from headrace.ops.norm import NextNorm
from headrace.ops.tiles import MoETiles, Problem, choose
from headrace.ops.weighted_sum_kernel import weighted_sum


def moe_layer_kernel(
    h: Tensor,  # [num_tokens, hidden] bf16
    weights: MoEWeights,
    buffers: MoEBuffers,
    out: Tensor,  # [num_tokens, hidden]
    lora: MoELora | None = None,
    next_norm: NextNorm | None = None,
) -> Tensor:
    """out = h + sum_k weight_k expert_k(rms_norm(h)). Raises ValueError for what does not fit."""
    _check(weights)
    check_tensor("out", out, h.shape, h.dtype)
    _route(h, weights, buffers, lora)
    gate_up_matmul(weights, buffers, lora)
    down_matmul(weights, buffers, lora)
    return weighted_sum(buffers.weighted, buffers.routing.expert_ids, None, h, out, next_norm)


def _route(h: Tensor, weights: MoEWeights, buffers: MoEBuffers, lora: MoELora | None) -> None:
    routing_kernel.route(
        h, None, weights.norm, weights.eps, weights.router, weights.router_bias, buffers.routing,
        buffers.tiles.gate_up.block_m, weights.renormalize, lora=lora,
    )  # fmt: skip


def gate_up_matmul(weights: MoEWeights, buffers: MoEBuffers, lora: MoELora | None = None) -> Tensor:
    """buffers.activated = activation(W_e x + b_e) for each slot, sorted by expert."""
    experts, routing = weights.experts, buffers.routing
    return grouped_matmul(
        routing.normed, _in_gpu_layout(experts.gate_up), experts.gate_up_bias, routing.sorted,
        buffers.tiles.gate_up, buffers.activated, weights.top_k, gather=True,
        activation=experts.activation, alpha=experts.alpha, limit=experts.limit,
        low_rank=_shrink(lora, weights, buffers, first=True),
    )  # fmt: skip


def down_matmul(weights: MoEWeights, buffers: MoEBuffers, lora: MoELora | None = None) -> Tensor:
    """buffers.weighted = routing weight (W_e activated + b_e), a row for each slot."""
    experts, routing = weights.experts, buffers.routing
    return grouped_matmul(
        buffers.activated, _in_gpu_layout(experts.down), experts.down_bias, routing.sorted,
        buffers.tiles.down, buffers.weighted, weights.top_k, gather=False,
        slot_weights=routing.expert_weights.view(-1),
        low_rank=_shrink(lora, weights, buffers, first=False),
    )  # fmt: skip


def _shrink(
    lora: MoELora | None, weights: MoEWeights, buffers: MoEBuffers, first: bool
) -> LowRank | None:
    """What the adapters of the rows make of the first matmul's x, or of the second's."""
    if lora is None:
        return None
    site = lora.layer.gate_up if first else lora.layer.down
    x = buffers.routing.normed if first else buffers.activated
    parts = lora.buffers.pairs
    if parts is None:
        parts = pair_parts(fresh(x.device), len(buffers.activated), int(site.rank.max()))
    return shrink_experts(
        x, site, lora.memory, lora.rows.slot_of_row, buffers.routing.sorted,
        buffers.tiles.gate_up.block_m, weights.top_k, first, parts,
    )  # fmt: skip


def choose_tiles(num_slots: int, weights: MoEWeights) -> MoETiles:
    """The table's tiles for this layer, as far as this GPU's shared memory goes."""
    mxfp4 = isinstance(weights.experts.gate_up, PreparedMXFP4)
    problem = Problem(num_slots, weights.num_experts, mxfp4)
    device = weights.norm.device
    if device.type == "cuda":
        limits = dispatch.gpu_limits(device.index)
        problem = replace(
            problem,
            shared_memory=limits.shared_memory,
            memory_tb_per_s=limits.memory_tb_per_s,
        )
    return choose(problem)


def _check(weights: MoEWeights) -> None:
    for name in ("gate_up", "down"):
        held = _in_gpu_layout(getattr(weights.experts, name)).num_experts
        if held != weights.num_experts:
            raise ValueError(f"{name} has {held} experts; the router has {weights.num_experts}")


def _in_gpu_layout(weight: ExpertWeight) -> KernelWeight:
    if not isinstance(weight, PreparedMXFP4 | DenseWeight):
        raise ValueError(
            f"the experts are a {type(weight).__name__}; make a PreparedMXFP4 of them with "
            "headrace.ops.mxfp4_kernel.prepare, or a DenseWeight"
        )
    return weight
