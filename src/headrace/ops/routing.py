"""The router: which experts a token goes to, and with what weights."""

from __future__ import annotations

from torch import Tensor

from headrace.ops.linear import linear


def route(
    x: Tensor,  # [num_tokens, hidden]
    weight: Tensor,  # [num_experts, hidden]
    bias: Tensor,  # [num_experts]
    top_k: int,
) -> tuple[Tensor, Tensor]:
    """logits = x W^T + b; the top_k largest, a tie going to the lower expert; softmax over them.

    Returns expert ids [num_tokens, top_k] int64 by falling logit, and weights float32.
    """
    assert top_k <= len(weight), f"{top_k=} {weight.shape=}"
    logits = linear(x, weight, bias).float()
    # topk promises nothing about ties; a stable sort keeps the lower expert first
    values, experts = logits.sort(dim=-1, descending=True, stable=True)
    return experts[:, :top_k], values[:, :top_k].softmax(-1)
