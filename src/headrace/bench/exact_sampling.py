"""Random draws in float64, which sampling is checked against."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.ops.sampling import Draws

TOLERANCE = 1e-5  # of a cumulative probability: exp in float32


def draws_are_right(
    logits: Tensor,  # [num_rows, vocab] fp32
    draws: Draws,
    uniform: Tensor,  # [num_draws] fp64
    tokens: Tensor,  # [num_draws] int64
) -> Tensor:  # [num_draws] bool
    """Whether each token is the one that float64 finds, or one a rounding away from it.

    A rounding may also add a token to those that top_p keeps, or take one away.
    """
    y = logits[draws.rows] / draws.temperature[:, None]
    best = y.amax(-1, keepdim=True)
    y = y.masked_fill(y < best + draws.log_min_p[:, None], -torch.inf)
    ordered, order = y.sort(stable=True, dim=-1, descending=True)
    rank = torch.arange(y.shape[1], device=y.device)
    limit = torch.where(draws.top_k > 0, draws.top_k, y.shape[1])[:, None]
    mass = (ordered.double() - best.double()).exp().masked_fill_(rank >= limit, 0)
    before = (mass.cumsum(-1) - mass) / mass.sum(-1, keepdim=True)
    right = torch.zeros_like(tokens, dtype=torch.bool)
    for slack in (-TOLERANCE, 0, TOLERANCE):
        top_p = torch.where(draws.top_p < 1, draws.top_p + slack, 2.0)[:, None]
        kept = mass.masked_fill((before >= top_p) & (rank > 0), 0)
        by_id = torch.empty_like(kept).scatter_(1, order, kept / kept.sum(-1, keepdim=True))
        end = by_id.cumsum(-1).gather(1, tokens[:, None]).squeeze(1)
        p = by_id.gather(1, tokens[:, None]).squeeze(1)
        right |= (p > 0) & (end - p - TOLERANCE <= uniform) & (uniform < end + TOLERANCE)
    return right
