"""Sampling ops against plain references and, for draws, against analytic probabilities."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace.ops import sampling

VOCAB = 12


def random_logits(seed: int, rows: int = 3, vocab: int = VOCAB) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def softmax(row: list[float]) -> list[float]:
    weights = [math.exp(x - max(row)) for x in row]
    return [w / sum(weights) for w in weights]


def kept(logits: Tensor) -> list[set[int]]:
    return [{i for i, x in enumerate(row) if x > -math.inf} for row in logits.tolist()]


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 1000),
    prompt=st.lists(st.integers(0, VOCAB - 1), max_size=8),
    output=st.lists(st.integers(0, VOCAB - 1), max_size=8),
    repetition=st.floats(0.5, 2),
    frequency=st.floats(-2, 2),
    presence=st.floats(-2, 2),
)
def test_penalties(
    seed: int,
    prompt: list[int],
    output: list[int],
    repetition: float,
    frequency: float,
    presence: float,
) -> None:
    logits = random_logits(seed, rows=1)
    expected = logits[0].tolist()
    for t in range(VOCAB):
        if t in prompt or t in output:
            expected[t] *= 1 / repetition if expected[t] > 0 else repetition
        expected[t] -= frequency * output.count(t) + presence * (t in output)

    counts = torch.tensor(
        [[0] * VOCAB, [2 * output.count(t) + (t in prompt) for t in range(VOCAB)]]
    )
    strangers = random_logits(seed + 1)
    rows = torch.cat([strangers, logits])
    sampling.apply_penalties(
        rows,
        torch.tensor([3]),
        counts.int(),
        torch.tensor([1]),
        torch.tensor([repetition]),
        torch.tensor([frequency]),
        torch.tensor([presence]),
    )
    torch.testing.assert_close(rows[3], torch.tensor(expected))
    assert torch.equal(rows[:3], strangers)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.5, 1.0])
def test_min_p(seed: int, min_p: float) -> None:
    logits = random_logits(seed)
    got = sampling.filter_min_p(logits, torch.tensor([min_p, 0.0, min_p]).log())
    for row in (0, 2):
        probs = softmax(logits[row].tolist())
        assert kept(got)[row] == {t for t, p in enumerate(probs) if p >= min_p * max(probs)}
    assert torch.equal(got[1], logits[1])


def nucleus(row: list[float], top_k: int, top_p: float) -> set[int]:
    """top_k first, then the fewest of these whose renormalised sum reaches top_p."""
    order = sorted(range(len(row)), key=lambda t: -row[t])[: top_k or None]
    probs = softmax([row[t] for t in order])
    found, mass = set(), 0.0
    for token, p in zip(order, probs, strict=True):
        found.add(token)
        mass += p
        if mass >= top_p and top_p < 1:
            break
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("top_k", [0, 1, 3, VOCAB, 1000])
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.9, 1.0])
def test_top_k_and_top_p(seed: int, top_k: int, top_p: float) -> None:
    logits = random_logits(seed)
    got = sampling.filter_top_k_top_p(
        logits, torch.tensor([top_k, 0, 2]), torch.tensor([top_p, top_p, 1.0])
    )
    rows = logits.tolist()
    assert kept(got) == [nucleus(rows[0], top_k, top_p), nucleus(rows[1], 0, top_p), kept(got)[2]]
    assert len(kept(got)[2]) == 2
    assert torch.equal(got[got > -math.inf], logits[got > -math.inf])


def test_equal_logits_rank_by_token_id() -> None:
    logits = torch.zeros(1, VOCAB)
    got = sampling.filter_top_k_top_p(logits, torch.tensor([3]), torch.tensor([1.0]))
    assert kept(got) == [{0, 1, 2}]


def chi_square(counts: Tensor, probs: Tensor) -> float:
    expected = probs.double() * counts.sum()
    return float(((counts - expected) ** 2 / expected)[probs > 0].sum())


# 99.9 % quantile of the chi-square distribution with 11 degrees of freedom
QUANTILE = 31.26


def drawn(logits: Tensor, count: int = 20_000) -> Tensor:  # [vocab] counts
    numbers = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    tokens = sampling.draw(logits.expand(count, -1), numbers)
    return torch.bincount(tokens, minlength=logits.shape[-1])


@pytest.mark.parametrize("seed", range(3))
def test_draws_follow_the_softmax(seed: int) -> None:
    logits = random_logits(seed, rows=1)
    counts = drawn(logits)
    assert chi_square(counts, logits[0].softmax(-1)) < QUANTILE
    assert chi_square(counts, (logits[0] * 0.9).softmax(-1)) > QUANTILE


def test_dropped_tokens_are_never_drawn() -> None:
    logits = random_logits(0, rows=1)
    logits[0, [0, 5, VOCAB - 1]] = -math.inf
    counts = drawn(logits)
    assert counts[[0, 5, VOCAB - 1]].tolist() == [0, 0, 0]
    assert chi_square(counts, logits[0].softmax(-1)) < QUANTILE
    ends = torch.tensor([0.0, 1 - 2**-32], dtype=torch.float64)
    assert sampling.draw(logits.expand(2, -1), ends).tolist() == [1, VOCAB - 2]


def test_a_draw_does_not_depend_on_the_batch() -> None:
    logits = random_logits(1, rows=50, vocab=1000)
    numbers = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    together = sampling.draw(logits, numbers)
    alone = [sampling.draw(logits[i : i + 1], numbers[i : i + 1]).item() for i in range(50)]
    assert together.tolist() == alone
    assert len(set(alone)) > 20


def test_broken_logits_still_give_a_valid_token() -> None:
    numbers = torch.tensor([0.5], dtype=torch.float64)
    token = sampling.draw(torch.full((1, VOCAB), math.nan), numbers)
    assert 0 <= token.item() < VOCAB


def test_greedy_and_random_rows_in_one_batch() -> None:
    logits = random_logits(2, rows=6)
    draws = sampling.Draws(
        rows=torch.tensor([4, 1, 2]),
        num_filtered=2,
        temperature=torch.tensor([0.5, 2.0, 1.5]),
        log_min_p=torch.tensor([0.0, 0.1, 0.2]).log(),
        top_p=torch.tensor([0.9, 1.0, 1.0]),
        top_k=torch.tensor([0, 5, 0], dtype=torch.int32),
    )
    numbers = torch.tensor([0.1, 0.6, 0.9], dtype=torch.float64)
    out = torch.full((6,), -1)
    assert sampling.sample(logits, draws, numbers, out) is out
    expected = logits.argmax(-1)
    for i, (top_k, top_p, min_p) in enumerate([(0, 0.9, 0), (5, 1.0, 0.1), (0, 1.0, 0.2)]):
        row = (logits[draws.rows[i]] / draws.temperature[i]).tolist()
        best = max(softmax(row))
        pairs = zip(row, softmax(row), strict=True)
        likely = [x if p >= min_p * best else -math.inf for x, p in pairs]
        kept = nucleus(likely, top_k, top_p)
        total = sum(softmax(likely)[t] for t in kept)
        mass, token = 0.0, -1
        while mass <= numbers[i] * total:
            token += 1
            mass += softmax(likely)[token] * (token in kept)
        expected[draws.rows[i]] = token
    assert out.tolist() == expected.tolist()
    assert out.tolist() != logits.argmax(-1).tolist()


@pytest.mark.parametrize("num_top", [0, 1, 4, 100])
def test_logprobs_and_ranks(num_top: int) -> None:
    logits = random_logits(3, rows=5)
    rows, chosen = torch.tensor([4, 0, 2]), torch.tensor([0, 5, 11])
    ids, logprobs, ranks = sampling.top_logprobs(logits, rows, chosen, num_top)
    for i, row in enumerate(logits[rows].tolist()):
        expected = [math.log(p) for p in softmax(row)]
        order = sorted(range(VOCAB), key=lambda t: -row[t])
        assert ids[i].tolist() == [chosen[i], *order[:num_top]]
        assert logprobs[i].tolist() == pytest.approx([expected[t] for t in ids[i]], abs=1e-5)
        assert ranks[i] == order.index(int(chosen[i])) + 1


def test_alternatives_with_equal_logits_are_those_of_the_lowest_ids() -> None:
    logits = random_logits(4, rows=2, vocab=1000).round()
    logits[0, ::3] = -0.0
    rows, chosen = torch.tensor([0, 1]), torch.tensor([0, 5])
    for i, row in enumerate(logits.tolist()):
        order = sorted(range(1000), key=lambda t: -row[t])
        for num_top in (1, 5, 20, 1000):  # what others in the batch want changes nothing
            ids, _, _ = sampling.top_logprobs(logits, rows, chosen, num_top)
            assert ids[i].tolist() == [chosen[i], *order[:num_top]]
