"""Routing against float64, on the GPU and at small sizes through Triton's interpreter."""

import pytest
import torch

from headrace.ops import routing_kernel
from headrace.ops.routing_kernel import route, router_gemm

gpu = pytest.mark.gpu


class Router:
    """Random norm and router, with the plain computation in float64."""

    def __init__(self, num_experts, hidden, device="cuda", dtype=torch.bfloat16):
        self.norm = (torch.rand(hidden, device=device) + 0.5).to(dtype)
        self.weight = (torch.randn(num_experts, hidden, device=device) * 0.05).to(dtype)
        self.bias = torch.randn(num_experts, device=device).to(dtype)

    def normed(self, summed):
        x = summed.double()
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return x * scale * self.norm.double()

    def logits(self, normed):
        return normed.double() @ self.weight.double().T + self.bias.double()

    def run(self, x, residual, top_k, block_m=16, **options):
        local = options.get("local")
        buffers = routing_kernel.allocate(
            *x.shape, len(self.weight), top_k, block_m, x.dtype, x.device,
            num_local=len(local) if local else None,
        )  # fmt: skip
        buffers.sorted.slots.fill_(-7)
        buffers.sorted.blocks.fill_(-7)
        summed = route(
            x, residual, self.norm, 1e-5, self.weight, self.bias, buffers, block_m, **options
        )
        return summed, buffers


def check_top_k(router, buffers, renormalize=True):
    logits = router.logits(buffers.normed)
    ids, top_k = buffers.expert_ids.long(), buffers.expert_ids.shape[1]
    chosen = logits.gather(1, ids)
    best = logits.topk(top_k).values
    torch.testing.assert_close(chosen, best, rtol=0, atol=1e-4)  # near ties may swap
    assert all(len(set(row)) == top_k for row in ids.tolist())
    expected = chosen.softmax(1) if renormalize else logits.softmax(1).gather(1, ids)
    torch.testing.assert_close(buffers.expert_weights.double(), expected, rtol=1e-4, atol=1e-6)


def check_sort(buffers, block_m, local):
    ids = buffers.expert_ids.flatten().tolist()
    held = [s for s in range(len(ids)) if ids[s] in local]
    expected = sorted(held, key=lambda slot: (ids[slot], slot))
    assert buffers.sorted.slots.tolist()[: len(expected)] == expected
    rows = []
    for expert, start, end, _ in buffers.sorted.blocks.tolist():
        if expert >= 0:
            assert 0 < end - start <= block_m
            assert {ids[expected[r]] for r in range(start, end)} == {expert + local.start}
            rows += range(start, end)
    assert rows == list(range(len(expected)))


def check(
    router, num_tokens, hidden, top_k, block_m=16, device="cuda", dtype=torch.bfloat16, **options
):
    x, residual = (torch.randn(num_tokens, hidden, device=device).to(dtype) for _ in range(2))
    summed, buffers = router.run(x, residual, top_k, block_m, **options)
    assert torch.equal(summed, x + residual)
    error = (buffers.normed.double() - router.normed(summed)).abs().max()
    assert error < (0.02 if dtype == torch.bfloat16 else 1e-5)
    check_top_k(router, buffers, options.get("renormalize", True))
    check_sort(buffers, block_m, options.get("local") or range(len(router.weight)))
    assert not buffers.counters.any()


interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton on a CPU")
CPU = {"device": "cpu", "dtype": torch.float32}


@interpreted
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "options"),
    [
        (1, 4, {}),
        (35, 3, {"renormalize": False}),
        (20, 8, {"local": range(5, 11)}),
        (700, 1, {}),  # more slots than one program sorts
        (300, 2, {"local": range(5)}),
    ],
)
def test_interpreted_routing(num_tokens, top_k, options):
    check(Router(12, 200, **CPU), num_tokens, 200, top_k, **CPU, **options)


@interpreted
def test_interpreted_ties_and_empty_batch():
    router = Router(12, 200, **CPU)
    router.weight.zero_()
    router.bias.zero_()
    _, buffers = router.run(torch.randn(3, 200), None, 4)
    assert buffers.expert_ids.tolist() == [[0, 1, 2, 3]] * 3
    summed, _ = router.run(torch.zeros(0, 200), None, 4)
    assert summed.shape == (0, 200)


@interpreted
def test_interpreted_router_gemm():
    router, x = Router(12, 200, **CPU), torch.randn(18, 200)
    buffers = routing_kernel.allocate(18, 200, 12, 4, 16, torch.float32, "cpu")
    out = torch.full((18, 12), float("nan"))
    router_gemm(x, router.weight, router.bias, buffers, out)
    torch.testing.assert_close(out.double(), router.logits(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="out has shape"):
        router_gemm(x, router.weight, router.bias, buffers, out[:17])


@gpu
@pytest.mark.parametrize("num_experts", [32, 128])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 7, 16, 17, 127, 128, 129, 1000, 4096, 8192])
def test_routing(num_experts, num_tokens):
    check(Router(num_experts, 2880), num_tokens, 2880, 4)


@gpu
@pytest.mark.parametrize("top_k", range(1, 9))
@pytest.mark.parametrize("renormalize", [True, False])
def test_top_k(top_k, renormalize):
    check(Router(60, 720), 37, 720, top_k, renormalize=renormalize)


@gpu
@pytest.mark.parametrize("hidden", [360, 720, 1440, 2048, 4100])
@pytest.mark.parametrize("num_experts", [8, 32, 64])
def test_sizes(hidden, num_experts):
    check(Router(num_experts, hidden), 8, hidden, 2)


@gpu
@pytest.mark.parametrize("num_tokens", [5, 300])
@pytest.mark.parametrize("local", [range(8), range(24, 32)])
def test_a_slice_of_the_experts(num_tokens, local):
    check(Router(32, 2880), num_tokens, 2880, 4, local=local)


@gpu
def test_ties_go_to_the_lower_expert():
    router = Router(32, 2880)
    router.weight.zero_()
    router.bias.zero_()
    x = torch.randn(20, 2880, device="cuda").bfloat16()
    _, buffers = router.run(x, None, 4)
    assert buffers.expert_ids.tolist() == [[0, 1, 2, 3]] * 20


@gpu
@pytest.mark.parametrize("num_experts", [32, 128])
def test_a_token_has_the_same_bits_in_every_batch(num_experts):
    router = Router(num_experts, 2880)
    x = torch.randn(8192, 2880, device="cuda").bfloat16()
    _, whole = router.run(x, None, 4)
    for size in (1, 2, 5, 8, 16, 33, 64, 100, 127, 128, 129, 500, 1024, 4000):
        rows = torch.randperm(8192, device="cuda")[:size]
        _, part = router.run(x[rows], None, 4)
        assert torch.equal(part.expert_weights, whole.expert_weights[rows]), size
        assert torch.equal(part.expert_ids, whole.expert_ids[rows]), size


@gpu
def test_router_gemm():
    router = Router(128, 2880)
    x = torch.randn(100, 2880, device="cuda").bfloat16()
    buffers = routing_kernel.allocate(100, 2880, 128, 4, 16, torch.bfloat16, "cuda")
    out = torch.full((100, 128), float("nan"), device="cuda")
    router_gemm(x, router.weight, router.bias, buffers, out)
    torch.testing.assert_close(out.double(), router.logits(x), rtol=1e-4, atol=1e-4)
