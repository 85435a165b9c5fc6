"""One mixture-of-experts layer in float64, expert by expert: what results are compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headrace.ops.experts import Activation, ExpertWeight
from headrace.ops.moe import MoEWeights
from headrace.ops.mxfp4 import MXFP4Weight

Delta = Callable[[int, Tensor, Tensor, int], Tensor]


def exact_logits(h: Tensor, weights: MoEWeights) -> tuple[Tensor, Tensor]:
    """rms_norm(h), rounded to h's dtype as the layer rounds it, and the router's logits of it.

    Both in float64. A softmax over logits that spread wide would amplify that rounding.
    """
    exact = h.double()
    scale = torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + weights.eps)
    x = (exact * scale * weights.norm.double()).to(h.dtype).double()
    logits = x @ weights.router.double().T
    if weights.router_bias is not None:
        logits += weights.router_bias.double()
    return x, logits


def exact_layer(
    h: Tensor,  # [num_tokens, hidden]
    weights: MoEWeights,  # in any layout
    expert_ids: Tensor | None = None,  # [num_tokens, top_k], instead of the router's own choice
    delta: Delta | None = None,
) -> Tensor:
    """h + sum_k weight_k expert_k(rms_norm(h)), [num_tokens, hidden] float64.

    delta(matmul, x, token, expert) is added to an expert's first (0) and second (1) matmul of x.
    """
    x, logits = exact_logits(h, weights)
    ids = logits.topk(weights.top_k).indices if expert_ids is None else expert_ids.long()
    scale = logits.softmax(-1).gather(1, ids)
    if weights.renormalize:
        scale /= scale.sum(-1, keepdim=True)
    out = h.double()
    for expert in ids.unique().tolist():
        token, k = (ids == expert).nonzero(as_tuple=True)
        y = _expert(x[token], token, weights, expert, delta)
        out.index_add_(0, token, y * scale[token, k, None])
    return out


def relative_errors(got: Tensor, expected: Tensor) -> tuple[float, float]:
    """Largest and RMS error, each relative to the expected values' own; a NaN errs infinitely."""
    difference = (got.double() - expected).nan_to_num(nan=torch.inf)
    scale = expected.pow(2).mean().sqrt()
    largest = (difference.abs() / expected.abs().clamp(min=scale)).max()
    return float(largest), float(difference.pow(2).mean().sqrt() / scale)


def _expert(
    x: Tensor, token: Tensor, weights: MoEWeights, expert: int, delta: Delta | None
) -> Tensor:
    experts = weights.experts
    gate_up = x @ _dense(experts.gate_up, expert).T + experts.gate_up_bias[expert].double()
    if delta:
        gate_up += delta(0, x, token, expert)
    gate, up = gate_up[:, 0::2], gate_up[:, 1::2]
    if experts.activation == Activation.SWIGLU_OAI:
        gate, up = gate.clamp(max=experts.limit), up.clamp(-experts.limit, experts.limit) + 1
        gate = gate * torch.sigmoid(experts.alpha * gate)
    else:
        gate = gate * torch.sigmoid(gate)
    y = (gate * up) @ _dense(experts.down, expert).T + experts.down_bias[expert].double()
    return y + delta(1, gate * up, token, expert) if delta else y


def _dense(weight: ExpertWeight, expert: int) -> Tensor:  # [out_features, in_features] float64
    if isinstance(weight, Tensor):
        return weight[expert].double()
    if isinstance(weight, MXFP4Weight):
        return weight.rows(expert).dequantize(torch.float32).double()
    from headrace.ops.mxfp4_kernel import PreparedMXFP4
    from headrace.ops.weight_formats import dequantized

    if isinstance(weight, PreparedMXFP4):
        return dequantized(weight.expert(expert), torch.float32)[0].double()
    return weight.values[expert].double()
