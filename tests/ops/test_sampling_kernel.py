"""Sampling kernels against float64, on the GPU and at small sizes through Triton's interpreter."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from headrace.bench.exact_sampling import draws_are_right
from headrace.ops import sampling, sampling_kernel
from headrace.ops.sampling import CHUNK, MAX_CANDIDATES, Draws, sampling_buffers

gpu = pytest.mark.gpu
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton on a CPU")

REAL_VOCAB = 201_088
# elsewhere two chunks, the second one not full; one vocabulary on the GPU saves compiles
VOCAB = REAL_VOCAB if torch.cuda.is_available() else 5003

# temperature, min_p, top_p, top_k
PLAIN = [(1.0, 0, 1, 0), (0.7, 0, 1, 0), (1.3, 0.02, 1, 0), (5.0, 0, 1, 0)]
FILTERED = [
    (1.0, 0, 0.9, 0),
    (1.0, 0, 1, 50),
    (0.8, 0, 0.95, 40),
    (1.5, 0.05, 0.5, 1000),
    (1.0, 0, 1e-6, 0),
    (3.0, 0, 1, 1),
    (2.0, 0, 0.99, 0),
    (1.0, 0, 0.3, 10**6),
]


@pytest.fixture(params=[pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def make_draws(params, rows, device) -> Draws:
    """Rows that ask for top_k or top_p must come first."""
    filtered = sum(top_p < 1 or top_k > 0 for *_, top_p, top_k in params)
    assert all(top_p < 1 or top_k > 0 for *_, top_p, top_k in params[:filtered])
    temperature, min_p, top_p, top_k = (
        torch.tensor(p, device=device) for p in zip(*params, strict=True)
    )
    rows = torch.tensor(rows, device=device)
    log_min_p = min_p.float().log()
    return Draws(rows, filtered, temperature, log_min_p, top_p.float(), top_k.int())


def normal(seed: int, rows: int, vocab: int = VOCAB) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def random_uniform(num: int, device="cpu") -> Tensor:
    return torch.randint(2**32, (num,), device=device).double() / 2**32


def run(logits: Tensor, draws: Draws | None, uniform: Tensor | None) -> Tensor:
    """The kernels' tokens, with nothing left over from before in what they write."""
    num_rows, vocab = logits.shape

    def poisoned(shape, dtype):
        return torch.full(tuple(shape), 0x55555555, dtype=dtype, device=logits.device)

    out = torch.full((num_rows,), -7, device=logits.device)
    buffers = sampling_buffers(poisoned, num_rows, vocab)
    return sampling_kernel.sample(logits, draws, uniform, out, buffers)


def check(logits: Tensor, draws: Draws, uniform: Tensor) -> Tensor:
    """Random rows against float64, the others against argmax."""
    tokens = run(logits, draws, uniform)
    assert draws_are_right(logits, draws, uniform, tokens[draws.rows]).all()
    greedy = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    greedy[draws.rows] = False
    assert torch.equal(tokens[greedy], logits.argmax(-1)[greedy])
    return tokens


@pytest.mark.parametrize("scale", [0.2, 4.0])
def test_draws_and_greedy_rows(device: str, scale: float) -> None:
    torch.manual_seed(0)
    params = [*FILTERED, *PLAIN]
    logits = (normal(0, len(params) + 2) * scale).to(device)
    draws = make_draws(params, torch.randperm(len(logits))[: len(params)].tolist(), device)
    uniform = random_uniform(len(params), device)
    tokens = check(logits, draws, uniform)
    if device == "cpu":  # the same exp, but for the last bits
        assert torch.equal(tokens, sampling.sample(logits, draws, uniform))


def test_wrong_draws_are_found() -> None:
    torch.manual_seed(0)
    params = FILTERED[:4] + PLAIN
    logits = torch.randn(len(params), 5000) * 3
    draws = make_draws(params, list(range(len(params))), "cpu")
    uniform = random_uniform(len(params))
    tokens = sampling.sample(logits, draws, uniform)
    assert draws_are_right(logits, draws, uniform, tokens).all()
    assert not draws_are_right(logits, draws, uniform.roll(1), tokens).any()
    assert not draws_are_right(logits, draws, uniform, tokens - 1).any()
    hot = replace(draws, temperature=draws.temperature * 1.1)
    assert not draws_are_right(logits, hot, uniform, tokens).all()


def test_more_candidates_than_there_is_room_for(device: str) -> None:
    vocab = max(VOCAB, MAX_CANDIDATES + CHUNK + 5)
    logits = torch.rand(3, vocab, generator=torch.Generator().manual_seed(1))
    logits[2] = 0.0
    logits[2, 12_345] = 5.0
    params = [
        (1.0, 0, 0.9, 0),  # a finer bracket may have room
        (1.0, 0, 0.8, 18_000),  # the candidates alone have none
        (1.0, 0, 0.6, 0),  # nor have equal ones
    ]
    draws = make_draws(params, [1, 0, 2], device)
    uniform = torch.full((3,), 0.7, dtype=torch.float64, device=device)
    assert check(logits.to(device), draws, uniform)[2] != 12_345


def test_equal_logits_rank_by_token_id(device: str) -> None:
    logits = (normal(2, 4) * 2).round().to(device)
    logits[3] = 0.0
    params = [(1.0, 0, 1, 40), (1.0, 0, 0.3, 0), (0.5, 0, 0.7, 3), (1.0, 0, 1, 3)]
    draws = make_draws(params, [0, 1, 2, 3], device)
    for u in (0.0, 0.5, 1 - 2**-32):
        uniform = torch.full((4,), u, dtype=torch.float64, device=device)
        assert check(logits, draws, uniform)[3] == int(3 * u)
    logits[:, 4700] = logits[:, 11] = 99.0
    assert run(logits, None, None).tolist() == [11] * 4
    logits[0, :] = -torch.inf
    logits[1, 0], logits[2, 5000] = 99.0, 99.5
    assert run(logits, None, None).tolist() == [0, 0, 5000, 11]


def test_the_negative_zero_is_a_zero(device: str) -> None:
    logits = torch.full((1, VOCAB), -1.0, device=device)
    logits[0, 7], logits[0, 9] = -0.0, 0.0
    assert run(logits, None, None).tolist() == [7]


def test_rows_with_little_to_choose_from(device: str) -> None:
    inf = torch.inf
    logits = normal(3, 6)
    logits[0] = -inf
    logits[0, 4999] = -3.0  # one token left
    logits[1] = -inf
    logits[1, [5, 4998]] = torch.tensor([2.0, 2.0])
    logits[2] *= 1e37
    logits[3, 17] = logits[3, 4444] = 3e38
    logits[4] = -1e30
    logits[4, 100] = 0.0
    params = [(1.0, 0.1, 0.5, 7), (1.0, 0, 0.9, 50), (1.0, 0, 0.0, 0), (2.0, 0, 1.0, 2)]
    draws = make_draws([*params, (0.1, 0, 1, 0), (1.0, 0, 1, 0)], [0, 1, 2, 3, 4, 5], device)
    for u in (0.3, 1 - 2**-32):
        uniform = torch.full((6,), u, dtype=torch.float64, device=device)
        tokens = check(logits.to(device), draws, uniform).tolist()
        assert tokens[0] == 4999
        assert tokens[1] == (5 if u < 0.5 else 4998)
        assert tokens[2] == logits[2].argmax()
        assert tokens[3] == (17 if u < 0.5 else 4444)
        assert tokens[4] == 100


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_broken_logits_still_give_a_valid_token(device: str, value: float) -> None:
    logits = normal(4, 5).to(device)
    logits[:4] = value
    logits[4, 4321] = value
    params = [(1.0, 0, 0.9, 50), (1.0, 0.1, 0.9, 0), (1.0, 0, 1, 0), (1.0, 0, 1, 0)]
    draws = make_draws(params, [0, 1, 2, 4], device)
    tokens = run(logits, draws, random_uniform(4, device))
    assert 0 <= tokens.min() <= tokens.max() < VOCAB
    assert tokens[3] == 0
    if value > 0:
        assert tokens[4] == 4321


def test_draws_are_the_inverse_of_the_cumulative_distribution(device: str) -> None:
    count = 48
    logits = torch.full((1, VOCAB), -torch.inf)
    logits[0, 1:12] = normal(5, 11, 1)[:, 0] * 2
    logits[0, 6] = -torch.inf
    draws = make_draws([(1.5, 0, 1, 0)] * count, list(range(count)), device)
    uniform = (torch.arange(count, device=device).double() + 0.5) / count
    tokens = run(logits.to(device).expand(count, -1), draws, uniform).cpu()
    counts = torch.bincount(tokens, minlength=VOCAB)
    assert (counts - count * (logits[0] / 1.5).softmax(-1)).abs().max() <= 1
    assert torch.equal(tokens, tokens.sort().values)
    assert counts[[0, 6, 12]].tolist() == [0, 0, 0]


@interpreted
def test_a_row_does_not_depend_on_the_others() -> None:
    params = [FILTERED[0], FILTERED[2], PLAIN[0]]
    logits = normal(6, 4)
    uniform = random_uniform(3)
    together = run(logits, make_draws(params, [2, 0, 3], "cpu"), uniform)
    for i, row in enumerate([2, 0, 3]):
        alone = make_draws(params[i : i + 1], [0], "cpu")
        found = run(logits[row : row + 1], alone, uniform[i : i + 1])
        assert found.item() == together[row]
    assert run(logits[1:2], None, None).item() == together[1]


def penalty_case(rows: int, vocab: int, device: str):
    generator = torch.Generator(device).manual_seed(7)

    def rand(*shape, low=0.0, high=1.0):
        uniform = torch.rand(*shape, generator=generator, device=device)
        return uniform * (high - low) + low

    logits = rand(rows + 1, vocab, low=-5, high=5)
    counts = (rand(rows + 2, vocab) ** 8 * 9).int()  # most are zero
    order = torch.randperm(rows + 1, generator=generator, device=device)[:rows]
    slots = torch.randperm(rows + 2, generator=generator, device=device)[:rows]
    repetition, frequency, presence = rand(3, rows, low=0.5, high=1.7)
    return logits, order, counts, slots, repetition, frequency, presence


def check_penalties(rows: int, vocab: int, device: str) -> None:
    logits, *others = penalty_case(rows, vocab, device)
    expected = logits.cpu().clone()
    sampling.apply_penalties(expected, *(t.cpu() for t in others))
    before = logits.clone()
    sampling_kernel.apply_penalties(logits, *others)
    assert torch.equal(logits.cpu(), expected)
    changed = (logits != before).any(-1)
    assert changed.sum() == rows
    assert changed[others[0]].all()


@interpreted
def test_penalties_have_the_bits_of_the_reference() -> None:
    check_penalties(3, VOCAB, "cpu")


def check_scores(logits: Tensor, rows: Tensor, chosen: Tensor, num_top: int) -> None:
    ids, logprobs, ranks = sampling_kernel.top_logprobs(logits, rows, chosen, num_top)
    exact = logits[rows].double().log_softmax(-1)
    order = exact.argsort(dim=-1, descending=True, stable=True)
    assert torch.equal(ids, torch.cat([chosen[:, None], order[:, :num_top]], 1))
    torch.testing.assert_close(logprobs.double(), exact.gather(1, ids), rtol=2e-7, atol=1e-6)
    of_chosen = exact.gather(1, chosen[:, None])
    assert torch.equal(ranks, (exact > of_chosen).sum(-1) + 1)


@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_logprobs_ranks_and_alternatives(device: str, num_top: int) -> None:
    logits = normal(8, 4, max(VOCAB, CHUNK + 3)).to(device) * 3
    logits[1] = (logits[1] * 2).round() / 2  # ties
    logits[2, 10:] = -torch.inf
    logits[3] += 1e4
    rows, chosen = torch.tensor([[3, 0, 1, 2], [CHUNK + 2, 5, 7, 9]], device=device)
    check_scores(logits, rows, chosen, num_top)
    assert sampling_kernel.top_logprobs(logits, rows[:0], chosen[:0], num_top)[0].numel() == 0


def test_wrong_arguments_are_refused() -> None:
    logits, uniform = torch.zeros(2, 20), random_uniform(2)
    draws = make_draws([(1.0, 0, 1, 0)] * 2, [0, 1], "cpu")
    with pytest.raises(ValueError, match="logits must be float32"):
        run(logits.half(), None, None)
    with pytest.raises(ValueError, match="logits must be float32"):
        run(torch.zeros(20, 2).T, None, None)
    with pytest.raises(ValueError, match="2\\*\\*18"):
        run(torch.zeros(1, 2**18 + 1), None, None)
    with pytest.raises(ValueError, match="uniform is None"):
        run(logits, draws, None)
    with pytest.raises(ValueError, match="uniform must be contiguous"):
        run(logits, draws, uniform.float())
    with pytest.raises(ValueError, match="top_k must be contiguous"):
        run(logits, replace(draws, top_k=draws.top_k.long()), uniform)
    with pytest.raises(ValueError, match="2 draws, 3 filtered"):
        run(logits, replace(draws, num_filtered=3), uniform)
    buffers = sampling_buffers(lambda shape, dtype: torch.empty(shape, dtype=dtype), 1, 20)
    with pytest.raises(ValueError, match="buffers are for 1 rows"):
        sampling_kernel.sample(logits, None, None, torch.empty(2).long(), buffers)
    with pytest.raises(ValueError, match="num_top is 33"):
        sampling_kernel.top_logprobs(logits, torch.tensor([0]), torch.tensor([0]), 33)
    arguments = list(penalty_case(1, 20, "cpu"))
    arguments[2] = arguments[2].long()
    with pytest.raises(ValueError, match="counts must be contiguous int32"):
        sampling_kernel.apply_penalties(*arguments)


def real_case(num_rows: int) -> tuple[Tensor, Draws, Tensor]:
    """Rows of every kind, from nearly flat to sharply peaked; two thirds of them are random."""
    torch.manual_seed(num_rows)
    logits = torch.randn(num_rows, REAL_VOCAB, device="cuda")
    logits *= torch.linspace(0.2, 4.0, num_rows, device="cuda").flip(0)[:, None]
    num_filtered, num_plain = -(-num_rows // 2), num_rows // 6
    params = [FILTERED[i % len(FILTERED)] for i in range(num_filtered)]
    params += [PLAIN[i % len(PLAIN)] for i in range(num_plain)]
    draws = make_draws(params, torch.randperm(num_rows)[: len(params)].tolist(), "cuda")
    return logits, draws, random_uniform(len(params), "cuda")


def row_of(draws: Draws, i: int) -> Draws:
    """Draw i alone, of the only row."""
    columns = draws.temperature, draws.log_min_p, draws.top_p, draws.top_k
    alone = [column[i : i + 1].clone() for column in columns]
    return Draws(torch.zeros_like(draws.rows[:1]), int(i < draws.num_filtered), *alone)


@gpu
@pytest.mark.parametrize("num_rows", [1, 8, 64, 256])
def test_real_sizes(num_rows: int) -> None:
    logits, draws, uniform = real_case(num_rows)
    tokens = check(logits, draws, uniform)
    for i in range(0, len(draws.rows), max(1, len(draws.rows) // 12)):
        row = logits[draws.rows[i]].clone()[None]
        alone = run(row, row_of(draws, i), uniform[i : i + 1].clone())
        assert alone.item() == tokens[draws.rows[i]], f"draw {i} has other bits alone"


@gpu
@pytest.mark.parametrize("num_rows", [1, 64])
def test_nothing_waits_and_a_graph_has_the_same_tokens(num_rows: int) -> None:
    logits, draws, uniform = real_case(num_rows)
    expected = run(logits, draws, uniform)
    out = torch.full_like(expected, -1)
    buffers = sampling_buffers(
        lambda shape, dtype: torch.empty(tuple(shape), dtype=dtype, device="cuda"), 256, REAL_VOCAB
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampling.sample(logits, draws, uniform, out, buffers)
        sampling.top_logprobs(logits, draws.rows, out[draws.rows], 20)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampling.sample(logits, draws, uniform, out, buffers)
    for _ in range(3):
        logits.copy_(logits.roll(1, 1))
        graph.replay()
        assert torch.equal(out, run(logits, draws, uniform))


@gpu
def test_draws_follow_the_softmax() -> None:
    torch.manual_seed(10)
    likely, count = 100, 20_000
    logits = torch.full((1, REAL_VOCAB), -torch.inf, device="cuda")
    logits[0, :likely] = torch.randn(likely)
    draws = make_draws([(1.2, 0, 1, 0)] * count, list(range(count)), "cuda")
    tokens = run(logits.expand(count, -1), draws, random_uniform(count, "cuda"))
    counts = torch.bincount(tokens, minlength=likely)
    assert len(counts) == likely

    def chi_square(temperature: float) -> float:
        probs = (logits[0, :likely].double() / temperature).softmax(-1) * count
        return ((counts - probs) ** 2 / probs).sum().item()

    assert chi_square(1.2) < 148.2  # 99.9 % quantile for 99 degrees of freedom
    assert chi_square(1.35) > 148.2


@gpu
def test_penalties_at_real_size() -> None:
    check_penalties(64, REAL_VOCAB, "cuda")


@gpu
@pytest.mark.parametrize("num_rows", [1, 64])
def test_scores_at_real_size(num_rows: int) -> None:
    torch.manual_seed(9)
    logits = torch.randn(num_rows + 1, REAL_VOCAB, device="cuda") * 4
    rows = torch.randperm(num_rows + 1, device="cuda")[:num_rows]
    chosen = torch.randint(REAL_VOCAB, (num_rows,), device="cuda")
    check_scores(logits, rows, chosen, 20)
    ids, logprobs, ranks = sampling_kernel.top_logprobs(logits, rows, chosen, 20)
    alone = sampling_kernel.top_logprobs(
        logits[rows[:1]], torch.zeros_like(rows[:1]), chosen[:1], 3
    )
    assert torch.equal(alone[0][0], ids[0, :4])
    assert torch.equal(alone[1][0], logprobs[0, :4])
    assert torch.equal(alone[2], ranks[:1])
