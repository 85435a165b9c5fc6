"""Choosing tokens from logits: penalties, filters, one random number a row, and log-probabilities.

Every function works row by row, so that a row's result does not depend on the others.
"""

from __future__ import annotations

import torch
from torch import Tensor


def count_tokens(
    token_ids: Tensor,  # [num_rows, max_len] int64, padded with vocab_size
    vocab_size: int,
) -> Tensor:  # [num_rows, vocab] fp32
    """How often each token occurs in each row."""
    counts = torch.zeros(token_ids.shape[0], vocab_size + 1, device=token_ids.device)
    counts.scatter_add_(1, token_ids, torch.ones_like(token_ids, dtype=torch.float32))
    return counts[:, :vocab_size]


def apply_penalties(
    logits: Tensor,  # [num_rows, vocab] fp32
    prompt_counts: Tensor,  # [num_rows, vocab] fp32
    output_counts: Tensor,  # [num_rows, vocab] fp32
    repetition: Tensor,  # [num_rows] fp32
    frequency: Tensor,  # [num_rows] fp32
    presence: Tensor,  # [num_rows] fp32
) -> Tensor:  # [num_rows, vocab] fp32
    """z' = (z > 0 ? z / rep : z * rep) - freq * count(output) - pres * [count(output) > 0].

    The repetition penalty touches tokens of prompt and output, the others tokens of the output.
    """
    seen = (prompt_counts + output_counts) > 0
    factor = torch.where(seen, repetition[:, None], 1.0)
    logits = torch.where(logits > 0, logits / factor, logits * factor)
    logits = logits - frequency[:, None] * output_counts
    return logits - presence[:, None] * (output_counts > 0)


def filter_min_p(
    logits: Tensor,  # [num_rows, vocab] fp32
    min_p: Tensor,  # [num_rows] fp32, 0 = off
) -> Tensor:  # [num_rows, vocab] fp32
    """Drop (-inf) tokens with p < min_p * max(p)."""
    # p / max(p) = exp(z - max(z)): compared in logits, where nothing underflows
    floor = logits.amax(-1, keepdim=True) + min_p[:, None].log()
    return logits.masked_fill(logits < floor, -torch.inf)


def filter_top_k_top_p(
    logits: Tensor,  # [num_rows, vocab] fp32
    top_k: Tensor,  # [num_rows] int64, 0 = off
    top_p: Tensor,  # [num_rows] fp32, 1 = off
) -> Tensor:  # [num_rows, vocab] fp32
    """Keep the top_k most likely tokens, and of these the fewest whose sum reaches top_p.

    Equal logits rank by token id. The most likely token always stays.
    """
    ordered, order = logits.sort(stable=True, dim=-1, descending=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    limit = torch.where(top_k > 0, top_k, logits.shape[-1])
    ordered = ordered.masked_fill(rank >= limit[:, None], -torch.inf)
    probs = ordered.softmax(-1)
    before = probs.cumsum(-1) - probs  # mass of the tokens that are more likely
    drop = (before >= top_p[:, None]) & (top_p < 1)[:, None] & (rank > 0)
    ordered = ordered.masked_fill(drop, -torch.inf)
    return torch.empty_like(logits).scatter_(1, order, ordered)


def sample(
    logits: Tensor,  # [num_rows, vocab] fp32
    uniform: Tensor,  # [num_rows] fp64 in [0, 1)
) -> Tensor:  # [num_rows] int64
    """The first token t with p(0) + ... + p(t) > u: draws from softmax(logits)."""
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    threshold = uniform[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    return tokens.clamp_(max=logits.shape[-1] - 1)  # NaN logits must not make an invalid id


def top_logprobs(
    logits: Tensor,  # [num_rows, vocab] fp32
    chosen: Tensor,  # [num_rows] int64
    num_top: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """log softmax(logits) of the chosen token and of the num_top most likely ones.

    Returns:
        token ids [num_rows, 1 + num_top] int64 (the chosen one first), their log-probabilities
        fp32, and the chosen tokens' ranks [num_rows] int64, 1 = most likely.
    """
    logprobs = logits.log_softmax(-1)
    of_chosen = logprobs.gather(1, chosen[:, None])
    top, ids = logprobs.topk(min(num_top, logits.shape[-1]), dim=-1)
    rank = (logprobs > of_chosen).sum(-1) + 1
    return torch.cat([chosen[:, None], ids], 1), torch.cat([of_chosen, top], 1), rank
