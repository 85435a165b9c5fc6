"""The sampling parameters of a batch's requests as tensors on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headrace.engine.messages import SamplingParams
from headrace.engine.request import GREEDY_BELOW, Request
from headrace.engine.transfer import upload
from headrace.ops.sampling import Draws


def is_greedy(params: SamplingParams) -> bool:
    """Whether the most likely token is taken."""
    return params.temperature < GREEDY_BELOW


def has_penalties(params: SamplingParams) -> bool:
    """Whether earlier tokens change the logits."""
    penalties = params.presence_penalty, params.frequency_penalty, params.repetition_penalty
    return penalties != (0.0, 0.0, 1.0)


def has_filters(params: SamplingParams) -> bool:
    """Whether the most likely tokens must be found."""
    return params.top_k > 0 or params.top_p < 1.0


@dataclass(frozen=True)
class Edits:
    """Single logits to change, a row and a token each; int64, but for the biases."""

    closed_rows: Tensor  # rows with allowed_token_ids
    allowed_rows: Tensor  # what is left in these
    allowed_tokens: Tensor
    biased_rows: Tensor  # all different
    biased_tokens: Tensor
    biases: Tensor  # fp32
    banned_rows: Tensor  # stop tokens before min_tokens
    banned_tokens: Tensor

    def apply(self, logits: Tensor) -> None:
        """Change the logits in place."""
        allowed = self.allowed_rows, self.allowed_tokens
        biased = self.biased_rows, self.biased_tokens
        kept = logits[allowed]
        logits.index_fill_(0, self.closed_rows, -torch.inf)
        logits.index_put_(allowed, kept)
        logits.index_put_(biased, logits[biased] + self.biases)
        nothing = logits.new_full((), -torch.inf)
        logits.index_put_((self.banned_rows, self.banned_tokens), nothing)


@dataclass(frozen=True)
class Penalties:
    """Rows whose earlier tokens change the logits; all [num_penalized]."""

    rows: Tensor  # int64
    slots: Tensor  # int64, rows of the token counts
    repetition: Tensor  # fp32
    frequency: Tensor  # fp32
    presence: Tensor  # fp32


@dataclass(frozen=True)
class Scored:
    """Rows whose log-probabilities are wanted."""

    rows: Tensor  # [num_scores] int64
    host_rows: list[int]  # the same
    num_top: list[int]  # alternatives wanted


@dataclass(frozen=True)
class SamplingInputs:
    """What the parameters of a batch come to. None: no row asks for it."""

    edits: Edits | None = None
    penalties: Penalties | None = None
    draws: Draws | None = None
    drawn: Sequence[int] = ()  # draws.rows on the host
    uniform: Tensor | None = None  # [num_draws] fp64
    scored: Scored | None = None


def sampling_inputs(
    requests: Sequence[Request],
    slot: Callable[[Request], int],  # of the token counts
    device: torch.device,
) -> SamplingInputs:
    """All but `uniform`, in one copy to the device; in none if every row is greedy and plain."""
    params = [request.params for request in requests]
    rows = range(len(params))
    penalized = [i for i in rows if has_penalties(params[i])]
    drawn = [i for i in rows if not is_greedy(params[i])]
    drawn.sort(key=lambda i: not has_filters(params[i]))
    scored = [i for i in rows if params[i].logprobs is not None]
    parts = [
        _edits(requests),
        _penalties(params, penalized, [slot(requests[i]) for i in penalized]),
        _draws(params, drawn),
        [_ints(scored)] if scored else [],
    ]
    arrays = [array for part in parts for array in part]
    if not arrays:
        return SamplingInputs()
    tensors = iter(upload(arrays, device))
    edits, penalties, draws, scores = ([next(tensors) for _ in part] for part in parts)
    num_filtered = sum(has_filters(params[i]) for i in drawn)
    return SamplingInputs(
        edits=Edits(*edits) if edits else None,
        penalties=Penalties(*penalties) if penalties else None,
        draws=Draws(draws[0], num_filtered, *draws[1:]) if draws else None,
        drawn=drawn,
        scored=Scored(scores[0], scored, [params[i].logprobs or 0 for i in scored])
        if scores
        else None,
    )


def is_early(request: Request) -> bool:
    """Whether the next token may not be a stop token."""
    return request.num_outputs < request.params.min_tokens


def _edits(requests: Sequence[Request]) -> list[np.ndarray]:
    """The arrays of Edits, or none."""
    allowed, biased, banned = [], [], []  # (row, its tokens)
    biases: list[float] = []
    for row, request in enumerate(requests):
        params = request.params
        if params.allowed_token_ids is not None:
            allowed.append((row, params.allowed_token_ids))
        if params.logit_bias:
            biased.append((row, list(params.logit_bias)))
            biases += params.logit_bias.values()
        if params.stop_token_ids and is_early(request):
            banned.append((row, params.stop_token_ids))
    if not (allowed or biased or banned):
        return []
    closed = _ints([row for row, _ in allowed])
    return [closed, *_places(allowed), *_places(biased), _floats(biases), *_places(banned)]


def _penalties(
    params: Sequence[SamplingParams], rows: list[int], slots: list[int]
) -> list[np.ndarray]:
    """The arrays of Penalties, or none."""
    if not rows:
        return []
    chosen = [params[i] for i in rows]
    return [
        _ints(rows),
        _ints(slots),
        _floats([p.repetition_penalty for p in chosen]),
        _floats([p.frequency_penalty for p in chosen]),
        _floats([p.presence_penalty for p in chosen]),
    ]


def _draws(params: Sequence[SamplingParams], rows: list[int]) -> list[np.ndarray]:
    """The arrays of Draws, or none."""
    if not rows:
        return []
    chosen = [params[i] for i in rows]
    with np.errstate(divide="ignore"):
        log_min_p = np.log(_floats([p.min_p for p in chosen]))
    return [
        _ints(rows),
        _floats([p.temperature for p in chosen]),
        log_min_p,
        _floats([p.top_p for p in chosen]),
        np.array([p.top_k for p in chosen], dtype=np.int32),
    ]


def _ints(values: Sequence[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def _floats(values: Sequence[float]) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def _places(tokens_of_rows: Sequence[tuple[int, list[int]]]) -> tuple[np.ndarray, np.ndarray]:
    """Row and token of each token."""
    rows = _ints([row for row, _ in tokens_of_rows])
    counts = _ints([len(tokens) for _, tokens in tokens_of_rows])
    tokens = [_ints(tokens) for _, tokens in tokens_of_rows]
    return np.repeat(rows, counts), np.concatenate([_ints([]), *tokens])
