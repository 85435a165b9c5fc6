"""The next token of each request, by its sampling parameters, without waiting for the device."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from headrace.engine.messages import SamplingParams, TokenLogprobs
from headrace.engine.request import Request, digest
from headrace.engine.sampling_inputs import SamplingInputs, is_early, sampling_inputs
from headrace.engine.token_counts import TokenCounts
from headrace.engine.transfer import Download, upload
from headrace.ops import sampling
from headrace.ops.arena import fresh


def uniform(seed: int, index: int) -> float:
    """The random number in [0, 1) of a request's output token: a hash, so no batch matters."""
    return int.from_bytes(digest(f"{seed}:{index}".encode())[:4], "little") / 2**32


class Sampler:
    """Chooses the tokens of a step's rows; holds what it needs of earlier tokens on the device.

    Nothing here waits for the device, but `read` of the results.
    """

    def __init__(self, vocab_size: int, max_num_seqs: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._counts = TokenCounts(vocab_size, device)
        self._batch: tuple[list[Request], list[bool]] = [], []
        self._inputs = SamplingInputs()  # of that batch, without its random numbers
        self._last = Download([])  # tokens sampled last
        self._copies: torch.cuda.Stream | None = None
        self._buffers = None
        if device.type == "cuda":
            self._copies = torch.cuda.Stream(device)
            self._buffers = sampling.sampling_buffers(fresh(device), max_num_seqs, vocab_size)

    @torch.inference_mode()
    def prepare(self, requests: Sequence[Request]) -> SamplingInputs:
        """The inputs of `sample` for rows of these requests, before num_in_flight is counted up.

        A batch of the same requests as the last one sends its random numbers only.
        """
        batch = list(requests), [is_early(request) for request in requests]
        if batch != self._batch:
            self._inputs = sampling_inputs(requests, self._counts.slot, self._device)
            self._batch = batch
        if self._inputs.draws is None:
            return self._inputs
        drawn = [requests[row] for row in self._inputs.drawn]
        numbers = np.array([uniform(request.seed, request.num_outputs) for request in drawn])
        return replace(self._inputs, uniform=upload([numbers], self._device)[0])

    @torch.inference_mode()
    def sample(
        self,
        logits: Tensor,  # [num_rows, vocab] fp32; rows with biases or penalties are overwritten
        inputs: SamplingInputs,
        out: Tensor | None = None,  # [num_rows] int64
    ) -> Sampled:
        """One token a row: masks and biases, penalties, temperature, min_p, top_k, top_p, draw."""
        scored, penalties = inputs.scored, inputs.penalties
        of_model = logits  # what log-probabilities are about
        if scored and (inputs.edits or penalties):
            of_model = logits.index_select(0, scored.rows)
        if inputs.edits:
            inputs.edits.apply(logits)
        if penalties:
            sampling.apply_penalties(
                logits, penalties.rows, self._counts.counts, penalties.slots,
                penalties.repetition, penalties.frequency, penalties.presence,
            )  # fmt: skip
        self._last.hold()  # the next tokens are written where they are
        tokens = sampling.sample(logits, inputs.draws, inputs.uniform, out, self._buffers)
        if penalties:
            self._counts.add(penalties.slots, tokens[penalties.rows])
        self._last = Download([tokens], self._copies)
        if scored is None:
            return Sampled(self._last)
        rows = scored.rows
        if of_model is not logits:
            rows = torch.arange(len(rows), device=logits.device)
        scores = compute_scores(of_model, rows, tokens[scored.rows], scored.num_top)
        return Sampled(self._last, scored.host_rows, scores)

    @torch.inference_mode()
    def score(
        self,
        logits: Tensor,  # [num_rows, vocab] fp32
        tokens: Sequence[int],  # [num_rows]
        num_top: Sequence[int],  # [num_rows] alternatives wanted
    ) -> Scores:
        """Log-probabilities of given tokens and of the most likely ones beside them."""
        [chosen] = upload([np.array(tokens, dtype=np.int64)], self._device)
        rows = torch.arange(len(tokens), device=self._device)
        return compute_scores(logits, rows, chosen, num_top)

    def dry_run(self) -> None:
        """Launch every kernel there is, for a warm-up: nothing depends on what they write."""
        params = SamplingParams(max_tokens=1, top_k=1, frequency_penalty=1.0, logprobs=0)
        request = Request("", 1, params, None, (0.0, 0), seed=0, token_ids=array("q", [0]), limit=2)
        logits = torch.zeros(1, self._vocab_size, device=self._device)
        out = torch.zeros(1, dtype=torch.int64, device=self._device)
        self.sample(logits, self.prepare([request]), out)
        self.release(request)

    def release(self, request: Request) -> None:
        """Forget a request that ended; one that goes on later is read again from its tokens."""
        self._counts.release(request)
        self._batch = [], []


class Scores:
    """Log-probabilities of given tokens and of the most likely ones, on their way to the host."""

    def __init__(self, num_top: Sequence[int], tensors: Sequence[Tensor]) -> None:
        self._num_top = num_top  # alternatives wanted, of each row
        self._download = Download(tensors)  # ids, logprobs, ranks

    def read(self) -> list[TokenLogprobs]:
        """Wait for the device; one score a row."""
        ids, logprobs, ranks = (tensor.tolist() for tensor in self._download.read())
        return [
            TokenLogprobs(row_ids[: 1 + n], row_logprobs[: 1 + n], rank)
            for row_ids, row_logprobs, rank, n in zip(
                ids, logprobs, ranks, self._num_top, strict=True
            )
        ]


def compute_scores(
    logits: Tensor,  # [num_rows, vocab] fp32, the model's own
    rows: Tensor,  # [num_scores] int64
    tokens: Tensor,  # [num_scores] int64
    num_top: Sequence[int],  # [num_scores] alternatives wanted
) -> Scores:
    """Log-probabilities of a token of each row, and of as many others as any row wants."""
    return Scores(num_top, sampling.top_logprobs(logits, rows, tokens, max(num_top)))


class Sampled:
    """The tokens of a batch on their way to the host, and their scores."""

    def __init__(
        self,
        token_ids: Download,  # [num_rows] int64
        scored: Sequence[int] = (),  # rows that have scores
        scores: Scores | None = None,
    ) -> None:
        self._token_ids = token_ids
        self._scored = scored
        self._scores = scores

    def read(self) -> list[tuple[int, TokenLogprobs | None]]:
        """Wait for the device; a token a row, and its log-probabilities where they are wanted."""
        [tokens] = self._token_ids.read()
        scores = self._scores.read() if self._scores else []
        of_row = dict(zip(self._scored, scores, strict=True))
        return [(token, of_row.get(row)) for row, token in enumerate(tokens.tolist())]
