"""Choosing tokens from logits: penalties, filters, one random number a row, and log-probabilities.

Every function works row by row, so that a row's result does not depend on the others. A row of NaN
gives some valid token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.ops import dispatch
from headrace.ops.arena import Take

CHUNK = 4096  # tokens that one program of a kernel reads
NUM_LEVELS = 8  # thresholds at which the kernels measure a row, twice if need be
MAX_TOP = 32  # alternatives in top_logprobs; a power of two
MAX_CANDIDATES = 16384  # tokens that top_k and top_p may have to search before it takes a whole row


@dataclass(frozen=True)
class Draws:
    """The rows whose token is drawn at random, and how; rows with top_k or top_p come first."""

    rows: Tensor  # [num_draws] int64, rows of the logits
    num_filtered: int  # so many of them, from the first on, have top_k or top_p
    temperature: Tensor  # [num_draws] fp32, > 0
    log_min_p: Tensor  # [num_draws] fp32, log(min_p), -inf = off
    top_p: Tensor  # [num_draws] fp32, 1 = off
    top_k: Tensor  # [num_draws] int32, 0 = off


@dataclass(frozen=True)
class SamplingBuffers:
    """What the kernels of `sample` write beside the tokens; nothing in it outlives a call."""

    best: Tensor  # [num_rows, num_chunks] int64: the largest logit of a chunk and its token
    largest: Tensor  # [num_rows] fp32: of the row
    masses: Tensor  # [num_rows, num_chunks] int64: probability that may be drawn
    level_counts: Tensor  # [num_rows, 2, NUM_LEVELS, num_chunks] int32: tokens over each level
    level_masses: Tensor  # [num_rows, 2, NUM_LEVELS, num_chunks] int64: their probability
    candidates: Tensor  # [num_rows, MAX_CANDIDATES] int32: tokens between two levels
    cuts: Tensor  # [num_rows, 2] int32: the last logit and the last token that are kept


def sampling_buffers(take: Take, num_rows: int, vocab_size: int) -> SamplingBuffers:
    """Buffers for logits of at most so many rows."""
    num_chunks = -(-vocab_size // CHUNK)
    levels = num_rows, 2, NUM_LEVELS, num_chunks
    return SamplingBuffers(
        best=take((num_rows, num_chunks), torch.int64),
        largest=take((num_rows,), torch.float32),
        masses=take((num_rows, num_chunks), torch.int64),
        level_counts=take(levels, torch.int32),
        level_masses=take(levels, torch.int64),
        candidates=take((num_rows, MAX_CANDIDATES), torch.int32),
        cuts=take((num_rows, 2), torch.int32),
    )


def apply_penalties(
    logits: Tensor,  # [num_rows, vocab] fp32, changed in place
    rows: Tensor,  # [num_penalized] int64, rows of the logits
    counts: Tensor,  # [num_slots, vocab] int32: 2 * times in the output + (1 if in the prompt)
    slots: Tensor,  # [num_penalized] int64, rows of the counts
    repetition: Tensor,  # [num_penalized] fp32
    frequency: Tensor,  # [num_penalized] fp32
    presence: Tensor,  # [num_penalized] fp32
) -> None:
    """z' = (z > 0 ? z / rep : z * rep) - freq * count(output) - pres * [count(output) > 0].

    The repetition penalty touches tokens of prompt and output, the others tokens of the output.
    """
    if dispatch.takes_kernel(logits):
        from headrace.ops import sampling_kernel

        sampling_kernel.apply_penalties(
            logits, rows, counts, slots, repetition, frequency, presence
        )
        return
    z, count = logits[rows], counts[slots]
    output = count >> 1
    factor = torch.where(count > 0, repetition[:, None], 1.0)
    z = torch.where(z > 0, z / factor, z * factor)
    z = z - frequency[:, None] * output
    logits[rows] = z - presence[:, None] * (output > 0)


def sample(
    logits: Tensor,  # [num_rows, vocab] fp32
    draws: Draws | None = None,
    uniform: Tensor | None = None,  # [num_draws] fp64 in [0, 1)
    out: Tensor | None = None,  # [num_rows] int64
    buffers: SamplingBuffers | None = None,
) -> Tensor:  # [num_rows] int64
    """The most likely token of each row, ties to the lowest id; a random one for rows in `draws`.

    These draw from softmax(z / temperature) over the tokens that min_p, then top_k, then top_p
    leave: the first token t with p(0) + ... + p(t) > uniform.
    """
    if out is None:
        out = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    if dispatch.takes_kernel(logits):
        from headrace.ops import sampling_kernel

        return sampling_kernel.sample(logits, draws, uniform, out, buffers)
    out.copy_(logits.argmax(-1))
    if draws is not None:
        assert uniform is not None
        z = logits[draws.rows] / draws.temperature[:, None]
        z = filter_min_p(z, draws.log_min_p)
        n = draws.num_filtered
        filtered = filter_top_k_top_p(z[:n], draws.top_k[:n], draws.top_p[:n])
        out[draws.rows] = draw(torch.cat([filtered, z[n:]]), uniform)
    return out


def filter_min_p(
    logits: Tensor,  # [num_rows, vocab] fp32
    log_min_p: Tensor,  # [num_rows] fp32, -inf = off
) -> Tensor:  # [num_rows, vocab] fp32
    """Drop (-inf) tokens with p < min_p * max(p)."""
    # p / max(p) = exp(z - max(z)): compared in logits, where nothing underflows
    floor = logits.amax(-1, keepdim=True) + log_min_p[:, None]
    return logits.masked_fill(logits < floor, -torch.inf)


def filter_top_k_top_p(
    logits: Tensor,  # [num_rows, vocab] fp32
    top_k: Tensor,  # [num_rows] int, 0 = off
    top_p: Tensor,  # [num_rows] fp32, 1 = off
) -> Tensor:  # [num_rows, vocab] fp32
    """Keep the top_k most likely tokens, and of these the fewest whose sum reaches top_p.

    Equal logits rank by token id. The most likely token always stays.
    """
    ordered, order = logits.sort(stable=True, dim=-1, descending=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    limit = torch.where(top_k > 0, top_k, logits.shape[-1])
    ordered = ordered.masked_fill(rank >= limit[:, None], -torch.inf)
    mass = (ordered - ordered[:, :1]).exp()
    end = mass.cumsum(-1, dtype=torch.float64)
    reached = (end - mass) >= top_p[:, None] * end[:, -1:]  # by the tokens that are more likely
    drop = reached & (top_p < 1)[:, None] & (rank > 0)
    ordered = ordered.masked_fill(drop, -torch.inf)
    return torch.empty_like(logits).scatter_(1, order, ordered)


def draw(
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
    rows: Tensor,  # [num_scores] int64, rows of the logits
    chosen: Tensor,  # [num_scores] int64, a token of each
    num_top: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """log softmax(logits) of the chosen token and of the num_top most likely ones.

    Returns:
        token ids [num_scores, 1 + num_top] int64 (the chosen one first; num_top is at most the
        vocabulary; equal logits rank by token id), their log-probabilities fp32, and the chosen
        tokens' ranks [num_scores] int64, 1 = most likely.
    """
    num_top = min(num_top, logits.shape[-1])
    if dispatch.takes_kernel(logits):
        from headrace.ops import sampling_kernel

        return sampling_kernel.top_logprobs(logits, rows, chosen, num_top)
    logits = logits[rows]
    rank = (logits > logits.gather(1, chosen[:, None])).sum(-1) + 1
    ids = torch.cat([chosen[:, None], most_likely(logits, num_top)], 1)
    shifted = logits - logits.amax(-1, keepdim=True)
    # summed in float32, 201,088 tokens gave an error of 2e-5 (torch 2.13)
    log_total = shifted.exp().sum(-1, keepdim=True, dtype=torch.float64).log()
    return ids, (shifted.gather(1, ids) - log_total).float(), rank


def most_likely(logits: Tensor, num_top: int) -> Tensor:  # [num_rows, num_top] int64
    """The num_top largest logits of each fp32 row, equal ones by token id.

    topk's order of equal values depends on how many are asked for, which is the batch's maximum.
    """
    bits = (logits + 0.0).view(torch.int32)  # + 0.0: there is no -0.0 any more
    ordered = (bits ^ (bits >> 31 & 0x7FFFFFFF)).long()  # compare as the logits do
    before = torch.arange(logits.shape[-1] - 1, -1, -1, device=logits.device)
    return (ordered << 32 | before).topk(num_top, dim=-1).indices
