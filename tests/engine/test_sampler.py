"""Choosing tokens for a batch of unlike requests."""

from array import array
from typing import Any

import pytest
import torch
from torch import Tensor

from headrace.engine.messages import SamplingParams
from headrace.engine.request import Request
from headrace.engine.sampler import choose_tokens, score_tokens, uniform

VOCAB = 16


def request(prompt: list[int], output: list[int], seed: int = 0, **params: Any) -> Request:
    return Request(
        request_id="r",
        prompt_len=len(prompt),
        params=SamplingParams(max_tokens=99, **params),
        adapter=None,
        arrival=(0.0, 0),
        seed=seed,
        token_ids=array("q", prompt + output),
        limit=1000,
    )


def greedy(**params: Any) -> Request:
    return request([1], [], temperature=0.0, **params)


def logits_of(rows: int) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(5)) * 2


UNLIKE = [
    greedy(),
    request([1, 2], [3], seed=1),
    request([1, 2], [3, 3, 4], seed=2, frequency_penalty=1.0, presence_penalty=0.5),
    request([1, 2], [3, 3, 4], seed=3, repetition_penalty=1.5, top_k=3),
    request([5], [], seed=4, top_p=0.5, temperature=2.0),
    request([5], [1], seed=5, min_p=0.2, temperature=3.0),
    request([5], [1], seed=6, allowed_token_ids=[2, 9], temperature=3.0),
    request([5], [1], seed=7, logit_bias={3: 4.0, 8: -50.0}),
    greedy(min_tokens=5, stop_token_ids=list(range(10))),
]


def test_a_row_does_not_depend_on_the_others() -> None:
    logits = logits_of(len(UNLIKE))
    before = logits.clone()
    together = choose_tokens(logits, UNLIKE)
    alone = [choose_tokens(logits[i : i + 1], [r])[0] for i, r in enumerate(UNLIKE)]
    assert together == alone
    assert len(set(together)) > 3
    assert torch.equal(logits, before), "logprobs need the raw logits"


def test_a_draw_depends_on_seed_and_output_index_only() -> None:
    logits = logits_of(1).expand(3, -1) / 4
    for seed in range(20):
        prompts = [[1], [2, 3, 4], [5] * 9]
        assert len(set(choose_tokens(logits, [request(p, [7], seed) for p in prompts]))) == 1
    outputs = [[7] * n for n in range(3)]
    draws = [choose_tokens(logits, [request([1], o, seed) for o in outputs]) for seed in range(9)]
    assert any(len(set(row)) > 1 for row in draws)


def test_greedy_takes_the_most_likely() -> None:
    logits = logits_of(4)
    assert choose_tokens(logits, [greedy()] * 4) == logits.argmax(-1).tolist()


def test_allowed_tokens_bias_and_min_tokens() -> None:
    logits = torch.arange(VOCAB).float()[None]
    last = VOCAB - 1
    assert choose_tokens(logits, [greedy()]) == [last]
    assert choose_tokens(logits, [greedy(allowed_token_ids=[3, 7, 5])]) == [7]
    assert choose_tokens(logits, [greedy(logit_bias={4: 20.0})]) == [4]
    assert choose_tokens(logits, [greedy(logit_bias={last: -5.0})]) == [last - 1]
    early = greedy(min_tokens=1, stop_token_ids=[last])
    assert choose_tokens(logits, [early]) == [last - 1]
    early.token_ids.append(0)
    assert choose_tokens(logits, [early]) == [last]


def test_penalties_reach_prompt_and_output() -> None:
    logits = torch.tensor([[1.0, 1.2, 1.1] + [0.0] * (VOCAB - 3)])

    def best(prompt: list[int], output: list[int], **params: float) -> int:
        return choose_tokens(logits, [request(prompt, output, temperature=0.0, **params)])[0]

    assert best([1], [], presence_penalty=0.5) == 1, "prompt tokens are not penalised"
    assert best([9], [1], presence_penalty=0.5) == 2
    assert best([9], [1, 2], frequency_penalty=0.5) == 0
    assert best([1], [2], repetition_penalty=2.0) == 0
    assert best([9], [], repetition_penalty=2.0) == 1


def sampled(logits: Tensor, seeds: range, **params: Any) -> Tensor:  # [vocab] counts
    requests = [request([1], [], seed=seed, **params) for seed in seeds]
    tokens = choose_tokens(logits.expand(len(requests), -1), requests)
    return torch.bincount(torch.tensor(tokens), minlength=VOCAB)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_draws_follow_the_temperature(temperature: float) -> None:
    logits = logits_of(1)
    counts = sampled(logits, range(8000), temperature=temperature)
    expected = (logits[0] / temperature).softmax(-1) * 8000
    # 99.9 % quantile for 15 degrees of freedom; another temperature fails
    assert ((counts - expected) ** 2 / expected).sum() < 37.7
    other = (logits[0] / temperature / 1.2).softmax(-1) * 8000
    assert ((counts - other) ** 2 / other).sum() > 37.7


def test_random_numbers_are_fixed_by_seed_and_index() -> None:
    assert uniform(1, 2) == uniform(1, 2)
    assert len({uniform(seed, index) for seed in range(-20, 20) for index in range(20)}) == 800
    numbers = [uniform(seed, 0) for seed in range(2000)]
    assert 0 <= min(numbers) < 0.01
    assert 0.99 < max(numbers) < 1
    assert abs(sum(numbers) / 2000 - 0.5) < 0.02


def test_scores_have_as_many_alternatives_as_asked() -> None:
    logits = logits_of(3)
    scores = score_tokens(logits, [4, 5, 6], [0, 2, VOCAB + 5])
    assert [len(s.token_ids) for s in scores] == [1, 3, 1 + VOCAB]
    assert [s.token_ids[0] for s in scores] == [4, 5, 6]
    logprobs = logits.log_softmax(-1)
    for row, score in enumerate(scores):
        expected = logprobs[row, score.token_ids].tolist()
        assert score.logprobs == pytest.approx(expected)
        assert score.logprobs[1:] == sorted(score.logprobs[1:], reverse=True)
    assert score_tokens(logits[:0], [], []) == []
