"""The expert layers: grouped matmuls, SwiGLU and the weighted sum over the chosen experts."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from headrace.ops.linear import linear
from headrace.ops.lora import MoELora, add_expert_lora
from headrace.ops.mxfp4 import MXFP4Weight

if TYPE_CHECKING:  # Triton may be missing where there is no GPU
    from headrace.ops.experts_kernel import KernelWeight

# [num_experts, out_features, in_features]; a KernelWeight on the GPU, the others on the CPU
ExpertWeight: TypeAlias = "Tensor | MXFP4Weight | KernelWeight"


class Activation(IntEnum):
    """What becomes of a gate g and an up u."""

    NONE = 0  # both are kept
    SWIGLU_OAI = 1  # g sigmoid(alpha g) (u + 1), g and u clamped to limit
    SILU_AND_MUL = 2  # g sigmoid(g) u


@dataclass(frozen=True)
class Experts:
    """The expert weights of one layer. Rows 2i of gate_up are gates, rows 2i + 1 are ups.

    alpha and limit are of Activation.SWIGLU_OAI.
    """

    gate_up: ExpertWeight  # [num_experts, 2 * inter, hidden]
    gate_up_bias: Tensor  # [num_experts, 2 * inter]
    down: ExpertWeight  # [num_experts, hidden, inter]
    down_bias: Tensor  # [num_experts, hidden]
    alpha: float = 1.702
    limit: float = 7.0
    activation: Activation = Activation.SWIGLU_OAI


def moe(
    x: Tensor,  # [num_tokens, hidden]
    expert_ids: Tensor,  # [num_tokens, top_k] int64
    expert_weights: Tensor,  # [num_tokens, top_k] float32
    experts: Experts,
    lora: MoELora | None = None,
) -> Tensor:
    """y = sum_k weight_k (W_down act(W_gate_up x + b_gate_up) + b_down) over the chosen experts.

    Returns [num_tokens, hidden] in x's dtype; the sum runs in float32, in the order of expert_ids.
    """
    num_tokens, top_k = expert_ids.shape
    flat_ids = expert_ids.flatten()
    order = flat_ids.argsort(stable=True)  # (token, k) slots, those of one expert together
    counts = flat_ids.bincount(minlength=len(experts.down_bias)).tolist()
    x_sorted = x[order // top_k]
    hidden = grouped_linear(x_sorted, counts, experts.gate_up, experts.gate_up_bias)
    if lora is not None:
        owner = flat_ids[order], lora.rows.slot_of_row[order // top_k]
        add_expert_lora(hidden, x_sorted, *owner, lora.layer.gate_up, lora.memory)
    if experts.activation == Activation.SWIGLU_OAI:
        hidden = swiglu(hidden, experts.alpha, experts.limit)
    else:
        hidden = silu_and_mul(hidden)
    sorted_out = grouped_linear(hidden, counts, experts.down, experts.down_bias)
    if lora is not None:
        add_expert_lora(sorted_out, hidden, *owner, lora.layer.down, lora.memory)
    out = torch.empty_like(sorted_out)
    out[order] = sorted_out
    weighted = out.unflatten(0, (num_tokens, top_k)) * expert_weights.unsqueeze(-1)
    return weighted.sum(1).to(x.dtype)


def grouped_linear(
    x: Tensor,  # [num_slots, in_features], sorted by expert
    counts: list[int],  # [num_experts]: rows of each expert
    weight: ExpertWeight,  # [num_experts, out_features, in_features]
    bias: Tensor,  # [num_experts, out_features]
) -> Tensor:
    """y = x W_e^T + b_e for the rows of each expert e; experts without rows are not read."""
    assert sum(counts) == len(x), f"{counts=} {x.shape=}"
    out = x.new_empty(len(x), bias.shape[1])
    end = 0
    for expert, count in enumerate(counts):
        if count:
            rows = slice(end, end + count)
            out[rows] = linear(x[rows], _expert(weight, expert, x.dtype), bias[expert])
            end += count
    return out


def swiglu(
    gate_up: Tensor,  # [num_slots, 2 * inter]: gate and up interleaved
    alpha: float,
    limit: float,
) -> Tensor:
    """g sigmoid(alpha g) (u + 1) with g = min(gate, limit), u = clamp(up, -limit, limit).

    Computes in float32. Returns [num_slots, inter] in gate_up's dtype.
    """
    gate, up = gate_up.float().unflatten(-1, (-1, 2)).unbind(-1)
    gate = gate.clamp(max=limit)
    up = up.clamp(-limit, limit)
    return (gate * torch.sigmoid(alpha * gate) * (up + 1)).to(gate_up.dtype)


def silu_and_mul(
    gate_up: Tensor,  # [num_slots, 2 * inter]: gate and up interleaved
) -> Tensor:
    """g sigmoid(g) u, computed in float32. Returns [num_slots, inter] in gate_up's dtype."""
    gate, up = gate_up.float().unflatten(-1, (-1, 2)).unbind(-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


def _expert(weight: ExpertWeight, expert: int, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, MXFP4Weight):
        return weight.rows(expert).dequantize(dtype)
    assert isinstance(weight, Tensor), f"{type(weight).__name__} is a layout of the GPU"
    return weight[expert]
