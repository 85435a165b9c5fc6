"""Choosing tokens for a batch of unlike requests, some of whose tokens the host does not know."""

from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from headrace.engine.messages import SamplingParams, TokenLogprobs
from headrace.engine.request import Request
from headrace.engine.sampler import Sampler, uniform
from headrace.engine.sampling_inputs import SamplingInputs
from tests.fake_gpu import run_script

CPU = torch.device("cpu")
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


def choose_tokens(logits: Tensor, requests: list[Request]) -> list[int]:
    """The next token of each, of which the host knows everything."""
    sampler = Sampler(logits.shape[1], len(requests), CPU)
    sampled = sampler.sample(logits.clone(), sampler.prepare(requests))
    return [token for token, _ in sampled.read()]


def score_tokens(logits: Tensor, tokens: list[int], num_top: list[int]) -> list[TokenLogprobs]:
    return Sampler(logits.shape[1], len(tokens), CPU).score(logits, tokens, num_top).read()


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
    together = choose_tokens(logits, UNLIKE)
    alone = [choose_tokens(logits[i : i + 1], [r])[0] for i, r in enumerate(UNLIKE)]
    assert together == alone
    assert len(set(together)) > 3


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


PENALTIES = {"frequency_penalty": 1.5, "presence_penalty": 0.7, "repetition_penalty": 1.3}


def unread(requests: list[Request], sampler: Sampler, logits: Tensor) -> list[int]:
    """Sample as the engine does, which reads the tokens a step later."""
    sampled = sampler.sample(logits.clone(), sampler.prepare(requests))
    for r in requests:
        r.num_in_flight += 1
    return [token for token, _ in sampled.read()]


def test_penalties_see_tokens_that_the_host_has_not_read() -> None:
    def fresh() -> list[Request]:
        plain = request([4, 5], [], seed=1)
        first = request([1, 2], [3], seed=2, **PENALTIES)
        second = request([6], [], temperature=0.0, frequency_penalty=0.9)
        return [first, plain, second]

    generator = torch.Generator().manual_seed(1)
    steps = [torch.randn(3, VOCAB, generator=generator) for _ in range(12)]
    known, late = fresh(), fresh()
    sampler = Sampler(VOCAB, 3, CPU)
    differs = False
    for logits in steps:
        expected = choose_tokens(logits, known)
        differs |= expected[2] != logits[2].argmax()
        assert unread(late, sampler, logits) == expected
        for r, token in zip(known, expected, strict=True):
            r.token_ids.append(token)
    assert differs, "the penalty changed nothing"
    # one goes, and its row of counts goes to another
    sampler.release(late[0])
    newcomer = request([9] * 40, [9, 8], seed=3, **PENALTIES)
    logits = steps[0][:2]
    expected = choose_tokens(logits, [known[2], newcomer])
    assert unread([late[2], newcomer], sampler, logits) == expected
    assert len(sampler._counts.counts) == 8


def test_a_released_request_is_counted_anew() -> None:
    sampler = Sampler(VOCAB, 1, CPU)
    r = request([1], [2, 2], temperature=0.0, frequency_penalty=1.0)
    logits = torch.zeros(1, VOCAB)
    logits[0, 2] = 1.5
    assert unread([r], sampler, logits) == [0]
    sampler.release(r)
    r.num_in_flight = 0
    r.token_ids.pop()
    assert unread([r], sampler, logits) == [2]
    sampler.release(r)
    with pytest.raises(AssertionError, match="not known to the host"):
        sampler.prepare([r])


def test_more_requests_with_penalties_than_slots() -> None:
    requests = [request([i % VOCAB], [], temperature=0.0, presence_penalty=9.0) for i in range(20)]
    sampler = Sampler(VOCAB, 20, CPU)
    logits = logits_of(20)
    first = unread(requests, sampler, logits)
    second = unread(requests, sampler, logits)
    assert first == logits.argmax(-1).tolist()
    assert second == logits.topk(2).indices[:, 1].tolist()


def test_plain_greedy_rows_send_nothing_and_equal_batches_send_numbers_only() -> None:
    sampler = Sampler(VOCAB, 4, CPU)
    assert sampler.prepare([greedy(), greedy()]) == SamplingInputs()
    batch = [greedy(), request([1], [], seed=1), request([1], [], seed=2, top_k=2)]
    before = sampler.prepare(batch)
    assert before.drawn == [2, 1], "rows with filters come first"
    batch[1].num_in_flight += 1
    after = sampler.prepare(batch)
    assert after.draws is before.draws
    assert after.uniform is not None
    assert after.uniform.tolist() == [uniform(2, 0), uniform(1, 1)]
    assert sampler.prepare(batch[1:]).draws is not before.draws


def test_stop_tokens_are_allowed_after_min_tokens_in_flight() -> None:
    sampler = Sampler(VOCAB, 1, CPU)
    logits = torch.arange(VOCAB).float()[None]
    r = greedy(min_tokens=2, stop_token_ids=[VOCAB - 1])
    tokens = [unread([r], sampler, logits)[0] for _ in range(4)]
    assert tokens == [VOCAB - 2, VOCAB - 2, VOCAB - 1, VOCAB - 1]


def test_logprobs_are_the_models_own() -> None:
    logits = logits_of(5)
    top = logits.argmax(-1).tolist()
    batch = [
        greedy(),
        greedy(logprobs=2, logit_bias={top[1]: -99.0}),
        request([1], [], seed=1, logprobs=0, temperature=9.0),
        greedy(logprobs=3),
        request([top[4]], [], seed=2, repetition_penalty=3.0, temperature=0.01, logprobs=1),
    ]
    sampler = Sampler(VOCAB, 5, CPU)
    out = torch.full((5,), -1)
    sampled = sampler.sample(logits.clone(), sampler.prepare(batch), out)
    found = sampled.read()
    assert [token for token, _ in found] == choose_tokens(logits, batch) == out.tolist()
    expected = score_tokens(logits, out.tolist(), [0, 2, 0, 3, 1])
    assert [score for _, score in found] == [None, *expected[1:]]
    assert found[1][0] != top[1]


USE = """
import torch
from headrace.engine.sampler import Sampler
from headrace.engine.warmup import counted_compiles, warm_up
from tests import fake_gpu
from tests.engine.test_sampler import PENALTIES, UNLIKE, greedy, request

gpu = fake_gpu.install()
fake_gpu.pretend_cuda()
vocab, cpu = 20_480, torch.device("cpu")
sampler = Sampler(vocab, 16, cpu)
warmed = warm_up(sampler.dry_run, cpu)
assert warmed.num_compiled == warmed.num_kernels == 11, warmed
assert not gpu.launched
scored = [greedy(logprobs=n) for n in (0, 1, 20)]
both = request([1], [2], top_k=5, logprobs=3, **PENALTIES)
steps = [[greedy()], UNLIKE, [*scored, *UNLIKE], [both], [request([1], [], 3)], [greedy(), both]]
with counted_compiles() as compiled:
    for batch in steps:
        out = torch.zeros(16, dtype=torch.int64)[: len(batch)]
        sampler.sample(torch.zeros(64, vocab)[: len(batch)], sampler.prepare(batch), out)
        sampler.score(torch.zeros(64, vocab)[3:6], [4, 5, 6], [0, 7, 20])
assert not compiled
print(len(set(gpu.launched)), len(gpu.launched))
"""


def test_nothing_is_compiled_after_the_dry_run(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    process = run_script(USE, tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    kinds, launches = map(int, process.stdout.split())
    assert kinds == 10
    assert launches > 50


@pytest.mark.gpu
def test_the_gpu_agrees_without_waiting() -> None:
    torch.manual_seed(0)
    vocab, device = 201_088, torch.device("cuda")
    extras = [
        request([7], [8], seed=8, top_p=0.9, top_k=50, temperature=0.8, logprobs=20, **PENALTIES),
        greedy(logprobs=5),
        request([7] * 3, [], temperature=0.0, logit_bias={5: 30.0}, frequency_penalty=2.0),
    ]
    batch = [*UNLIKE, *extras]
    host, late = Sampler(vocab, 16, CPU), Sampler(vocab, 16, device)
    steps = [torch.randn(len(batch), vocab) * 8 for _ in range(4)]
    on_device = [logits.to(device) for logits in steps]
    late.sample(on_device[0].clone(), late.prepare(batch)).read()  # compiles; counts a token
    for r in batch:
        late.release(r)
    found = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for logits in on_device:
            found.append(late.sample(logits, late.prepare(batch)))
            scores = late.score(logits, [1, 2], [0, 20])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for logits, sampled in zip(steps, found, strict=True):
        expected = host.sample(logits.clone(), host.prepare(batch)).read()
        for (token, score), (token_, score_) in zip(sampled.read(), expected, strict=True):
            assert token == token_
            assert (score is None) == (score_ is None)
            if score and score_:
                assert score.token_ids == score_.token_ids
                assert score.logprobs == pytest.approx(score_.logprobs, abs=2e-5)
                assert score.rank == score_.rank
    assert [len(s.token_ids) for s in scores.read()] == [1, 21]


def test_a_dry_run_leaves_nothing_behind() -> None:
    sampler = Sampler(VOCAB, 1, CPU)
    sampler.dry_run()
    r = request([1], [], seed=1, **PENALTIES)
    logits = logits_of(1)
    assert unread([r], sampler, logits) == choose_tokens(logits, [request([1], [], 1, **PENALTIES)])
    assert len(sampler._counts.counts) == 8
