"""Choosing tokens from the logits of gpt-oss: greedy, random, from the most likely ones, scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.bench.case import NUM_INPUTS, Case
from headrace.bench.exact_sampling import draws_are_right
from headrace.ops.arena import fresh
from headrace.ops.sampling import Draws, SamplingBuffers, sample, sampling_buffers, top_logprobs

OPS = ("sample", "top_logprobs")
VOCAB_SIZE = 201_088
MOST_ROWS = 256
NUM_TOP = 20
KINDS = {  # temperature, top_p, top_k
    "greedy": None,
    "temperature": (1.0, 1.0, 0),
    "top_p": (1.0, 0.95, 0),
    "top_k_top_p": (0.8, 0.95, 50),
}


@dataclass(frozen=True)
class Rows:
    """What the calls of one case read and write: call i takes logits i % 8."""

    logits: Sequence[Tensor]  # [8] of [num_rows, vocab] fp32
    draws: Draws | None
    uniform: Tensor | None  # [num_rows] fp64
    rows: Tensor  # [num_rows] int64: 0, 1, 2 ...
    out: Tensor  # [num_rows] int64
    buffers: SamplingBuffers

    def sample(self, i: int) -> Tensor:
        """The public op."""
        logits = self.logits[i % len(self.logits)]
        return sample(logits, self.draws, self.uniform, self.out, self.buffers)

    def check_sample(self) -> None:
        """Greedy tokens against argmax, random ones against float64."""
        self.out.fill_(-1)
        self.check_tokens(self.sample(0))

    def check_tokens(self, tokens: Tensor) -> None:
        """Whether these are call 0's."""
        if self.draws is None or self.uniform is None:
            assert torch.equal(tokens, self.logits[0].argmax(-1))
        else:
            assert draws_are_right(self.logits[0], self.draws, self.uniform, tokens).all()

    def score(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of the most likely tokens, and of one chosen before."""
        logits = self.logits[i % len(self.logits)]
        return top_logprobs(logits, self.rows, self.out, NUM_TOP)

    def check_score(self) -> None:
        """Against float64."""
        ids, logprobs, _ = self.score(0)
        self.check_logprobs(ids, logprobs)

    def check_logprobs(self, ids: Tensor, logprobs: Tensor) -> None:
        """Whether these are call 0's."""
        exact = self.logits[0].double().log_softmax(-1)
        expected = torch.cat([exact.gather(1, self.out[:, None]), exact.topk(NUM_TOP).values], 1)
        for found in (logprobs.double(), exact.gather(1, ids)):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6)


def cases(sizes: Sequence[int], device: torch.device) -> Iterator[Case]:
    """Every kind of choice at every size of a batch."""
    for num_rows in (size for size in sizes if size <= MOST_ROWS):
        logits = random_logits(num_rows, VOCAB_SIZE, device)
        for kind in KINDS:
            yield sample_case(kind, random_rows(kind, logits))
        yield score_case(random_rows("greedy", logits))


def sample_case(kind: str, rows: Rows) -> Case:
    """The logits are read once, at least."""
    return Case(
        "sample",
        {"kind": kind},
        len(rows.out),
        run=rows.sample,
        check=rows.check_sample,
        num_bytes=rows.logits[0].nbytes,
        num_flops=0.0,
    )


def score_case(rows: Rows) -> Case:
    """The logits are read once."""
    return Case(
        "top_logprobs",
        {},
        len(rows.out),
        run=rows.score,
        check=rows.check_score,
        num_bytes=rows.logits[0].nbytes,
        num_flops=0.0,
    )


def random_logits(num_rows: int, vocab_size: int, device: torch.device) -> list[Tensor]:
    """Peaked as a language model's: the most likely of 201,088 tokens has a few per cent.

    Those of a small batch stay in L2 between two calls, as they come from the LM head in a step.
    """
    shape = (num_rows, vocab_size)
    return [torch.randn(shape, device=device) * 4 for _ in range(NUM_INPUTS)]


def random_rows(kind: str, logits: Sequence[Tensor]) -> Rows:
    """Calls that choose one token of each row."""
    num_rows, vocab_size = logits[0].shape
    device = logits[0].device
    buffers = sampling_buffers(fresh(device), num_rows, vocab_size)
    rows = torch.arange(num_rows, device=device)
    params = KINDS[kind]
    if params is None:
        return Rows(logits, None, None, rows, rows.clone(), buffers)
    temperature, top_p, top_k = params

    def column(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((num_rows,), value, dtype=dtype, device=device)

    draws = Draws(
        rows=rows,
        num_filtered=num_rows if top_p < 1 or top_k else 0,
        temperature=column(temperature),
        log_min_p=column(-torch.inf),
        top_p=column(top_p),
        top_k=column(top_k, torch.int32),
    )
    uniform = torch.rand(num_rows, dtype=torch.float64, device=device)
    return Rows(logits, draws, uniform, rows, rows.clone(), buffers)
