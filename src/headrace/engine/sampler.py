"""The next token of each request, by its sampling parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from headrace.engine.messages import SamplingParams, TokenLogprobs
from headrace.engine.request import GREEDY_BELOW, Request, digest
from headrace.ops import sampling


def uniform(seed: int, index: int) -> float:
    """The random number in [0, 1) of a request's output token: a hash, so no batch matters."""
    return int.from_bytes(digest(f"{seed}:{index}".encode())[:4], "little") / 2**32


def is_greedy(params: SamplingParams) -> bool:
    """Whether the most likely token is taken."""
    return params.temperature < GREEDY_BELOW


def has_penalties(params: SamplingParams) -> bool:
    """Whether earlier tokens change the logits."""
    penalties = params.presence_penalty, params.frequency_penalty, params.repetition_penalty
    return penalties != (0.0, 0.0, 1.0)


def has_filters(params: SamplingParams) -> bool:
    """Whether a sort is needed."""
    return params.top_k > 0 or params.top_p < 1.0


def choose_tokens(
    logits: Tensor,  # [num_rows, vocab] fp32, kept as it is
    requests: Sequence[Request],  # [num_rows]
) -> list[int]:
    """One token a row: masks and biases, penalties, temperature, min_p, top_k and top_p, draw."""
    logits = apply_edits(logits, requests)
    logits = apply_penalties(logits, requests)
    tokens = logits.argmax(-1)
    rows = [i for i, request in enumerate(requests) if not is_greedy(request.params)]
    if rows:
        at = torch.tensor(rows, device=logits.device)
        drawn = [requests[i] for i in rows]
        draws = [uniform(request.seed, request.num_outputs) for request in drawn]
        numbers = torch.tensor(draws, dtype=torch.float64, device=logits.device)
        tokens[at] = sampling.sample(filter_rows(logits[at], drawn), numbers)
    return tokens.tolist()


def apply_edits(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """allowed_token_ids, logit_bias, and no stop token before min_tokens."""
    copied = False
    for i, request in enumerate(requests):
        params = request.params
        early = params.stop_token_ids if request.num_outputs < params.min_tokens else []
        if params.allowed_token_ids is None and not params.logit_bias and not early:
            continue
        if not copied:
            logits, copied = logits.clone(), True
        row = logits[i]
        if params.allowed_token_ids is not None:
            allowed = torch.tensor(params.allowed_token_ids, device=row.device)
            kept = row[allowed]
            row.fill_(-torch.inf)[allowed] = kept
        if params.logit_bias:
            biased = torch.tensor(list(params.logit_bias), device=row.device)
            row[biased] += torch.tensor(list(params.logit_bias.values()), device=row.device)
        if early:
            row[torch.tensor(early, device=row.device)] = -torch.inf
    return logits


def apply_penalties(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """Repetition, frequency and presence penalties of the rows that have any."""
    rows = [i for i, request in enumerate(requests) if has_penalties(request.params)]
    if not rows:
        return logits
    chosen = [requests[i] for i in rows]
    vocab = logits.shape[-1]
    prompts = [list(r.token_ids[: r.prompt_len]) for r in chosen]
    outputs = [list(r.token_ids[r.prompt_len :]) for r in chosen]
    at = torch.tensor(rows, device=logits.device)
    penalized = sampling.apply_penalties(
        logits[at],
        sampling.count_tokens(pad(prompts, vocab, logits.device), vocab),
        sampling.count_tokens(pad(outputs, vocab, logits.device), vocab),
        column(chosen, lambda params: params.repetition_penalty, logits),
        column(chosen, lambda params: params.frequency_penalty, logits),
        column(chosen, lambda params: params.presence_penalty, logits),
    )
    return logits.index_copy(0, at, penalized)


def filter_rows(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """Temperature, then min_p, then top_k and top_p, each only where a row asks for it."""
    logits = logits / column(requests, lambda params: params.temperature, logits)[:, None]
    if any(request.params.min_p > 0 for request in requests):
        logits = sampling.filter_min_p(logits, column(requests, lambda p: p.min_p, logits))
    rows = [i for i, request in enumerate(requests) if has_filters(request.params)]
    if rows:
        at = torch.tensor(rows, device=logits.device)
        chosen = [requests[i] for i in rows]
        top_k = column(chosen, lambda params: params.top_k, logits).long()
        top_p = column(chosen, lambda params: params.top_p, logits)
        filtered = sampling.filter_top_k_top_p(logits[at], top_k, top_p)
        logits = logits.index_copy(0, at, filtered)
    return logits


def column(
    requests: Sequence[Request], value: Callable[[SamplingParams], float], like: Tensor
) -> Tensor:  # [num_rows] fp32
    """One parameter of every request."""
    return torch.tensor(
        [value(r.params) for r in requests], dtype=torch.float32, device=like.device
    )


def pad(rows: list[list[int]], fill: int, device: torch.device) -> Tensor:
    """Rows of unequal length as one tensor [num_rows, max_len] int64."""
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], device=device).long()


def score_tokens(
    logits: Tensor,  # [num_rows, vocab] fp32, the model's own
    tokens: Sequence[int],  # [num_rows]
    num_top: Sequence[int],  # [num_rows] alternatives wanted
) -> list[TokenLogprobs]:
    """Log-probabilities of given tokens and of the most likely ones beside them."""
    if not tokens:
        return []
    chosen = torch.tensor(tokens, device=logits.device)
    ids, logprobs, ranks = sampling.top_logprobs(logits, chosen, max(num_top))
    return [
        TokenLogprobs(row_ids[: 1 + n], row_logprobs[: 1 + n], rank)
        for row_ids, row_logprobs, rank, n in zip(
            ids.tolist(), logprobs.tolist(), ranks.tolist(), num_top, strict=True
        )
    ]
