"""Routing against float64, on the GPU and at small sizes through Triton's interpreter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from headrace.ops import routing_cuda, routing_kernel
from headrace.ops.routing import RoutingBuffers, routing_counters
from headrace.ops.routing_kernel import route, router_gemm
from tests.fake_gpu import run_script
from tests.ops.test_sort_kernel import check_sorted

gpu = pytest.mark.gpu
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton on a CPU")


class Router:
    """Random norm and router, with the plain computation in float64."""

    def __init__(self, num_experts, hidden, device="cuda", dtype=torch.bfloat16):
        self.norm = (torch.rand(hidden, device=device) + 0.5).to(dtype)
        self.weight = (torch.randn(num_experts, hidden, device=device) * 0.05).to(dtype)
        self.bias = torch.randn(num_experts, device=device).to(dtype)

    def normed(self, summed: Tensor) -> Tensor:
        x = summed.double()
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return x * scale * self.norm.double()

    def logits(self, normed: Tensor) -> Tensor:
        bias = 0 if self.bias is None else self.bias.double()
        return normed.double() @ self.weight.double().T + bias

    def buffers(self, x, top_k, block_m=16, local=None) -> RoutingBuffers:
        """All of them full of what must not be read."""
        buffers = routing_kernel.allocate(
            *x.shape, len(self.weight), top_k, block_m, x.dtype, x.device,
            num_local=len(local) if local else None,
        )  # fmt: skip
        for name in ("normed", "summed", "partials", "expert_weights"):
            getattr(buffers, name).fill_(float("nan"))
        written = (buffers.sorted.slots, buffers.sorted.blocks, buffers.ranks, buffers.histograms)
        for part in (*written, buffers.expert_ids):
            part.fill_(-7)
        return buffers

    def run(self, x, residual, top_k, block_m=16, **options) -> tuple[Tensor, RoutingBuffers]:
        buffers = self.buffers(x, top_k, block_m, options.get("local"))
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


def check(
    router, num_tokens, hidden, top_k, block_m=16, device="cuda", dtype=torch.bfloat16, **options
):
    x, residual = (torch.randn(num_tokens, hidden, device=device).to(dtype) for _ in range(2))
    residual = residual if options.pop("add", True) else None
    summed, buffers = router.run(x, residual, top_k, block_m, **options)
    assert torch.equal(summed, x if residual is None else x + residual)
    rtol = 2**-7 if dtype == torch.bfloat16 else 1e-5  # twice a rounding
    torch.testing.assert_close(buffers.normed.double(), router.normed(summed), rtol=rtol, atol=1e-5)
    check_top_k(router, buffers, options.get("renormalize", True))
    local = options.get("local") or range(len(router.weight))
    check_sorted(buffers, buffers.expert_ids, block_m, local)
    assert not buffers.counters.any()


CPU = {"device": "cpu", "dtype": torch.float32}


@interpreted
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "options"),
    [
        (1, 4, {"add": False}),
        (16, 8, {"local": range(5, 11)}),
        (35, 3, {"renormalize": False}),  # more than one chunk of tokens
        (100, 2, {"local": range(5)}),
        (145, 1, {}),  # more than one launch
        (130, 4, {"local": range(5), "add": False}),
    ],
)
def test_interpreted_routing(num_tokens, top_k, options):
    check(Router(12, 300, **CPU), num_tokens, 300, top_k, **CPU, **options)


@interpreted
def test_interpreted_ties_and_empty_batch():
    router = Router(12, 200, **CPU)
    router.weight.zero_()
    router.bias = None
    _, buffers = router.run(torch.randn(3, 200), None, 4)
    assert buffers.expert_ids.tolist() == [[0, 1, 2, 3]] * 3
    assert buffers.expert_weights.tolist() == [[0.25] * 4] * 3
    summed, _ = router.run(torch.zeros(0, 200), None, 4)
    assert summed.shape == (0, 200)


@interpreted
def test_interpreted_router_gemm():
    router, x = Router(12, 300, **CPU), torch.randn(18, 300)
    buffers = router.buffers(x, 4)
    out = torch.full((18, 12), float("nan"))
    assert router_gemm(x, router.weight, router.bias, buffers, out) is out
    torch.testing.assert_close(out.double(), router.logits(x), rtol=1e-5, atol=1e-5)


@interpreted
def test_interpreted_a_row_of_nan_does_no_harm():
    rows_of_nan_do_no_harm(Router(12, 300, **CPU), torch.randn(20, 300))


def rows_of_nan_do_no_harm(router: Router, x: Tensor) -> None:
    """Every token keeps top_k different experts that exist; the others keep their bits."""
    _, good = router.run(x, None, 4)
    x = x.clone()
    x[7, 100] = float("nan")
    _, buffers = router.run(x, None, 4)
    check_sorted(buffers, buffers.expert_ids, 16, range(len(router.weight)))
    for row in buffers.expert_ids.tolist():
        assert len(set(row)) == 4
        assert 0 <= min(row) <= max(row) < len(router.weight)
    others = [token for token in range(len(x)) if token != 7]
    assert torch.equal(buffers.expert_weights[others], good.expert_weights[others])
    assert torch.equal(buffers.expert_ids[others], good.expert_ids[others])


# What orders the terms of a row's sum of floats is the layout of the tensor, so each width (the
# hidden size, the experts) needs one layout in all kernels. Sums of zeros have three dimensions.
LAYOUTS = r"""
import json, re
import torch
from triton.compiler.compiler import CompiledKernel
from headrace.ops import routing_kernel
from tests import fake_gpu

fake_gpu.install()
fake_gpu.pretend_cuda()
layouts = []

def note(kernel):
    if kernel.module is None:
        code = kernel.asm["ttgir"]
        named = dict(re.findall(r"^(#\w+) = (#ttg.*)$", code, re.M))
        for body, types in re.findall(r'"tt.reduce"\(.*?\({(.*?)}\) : \((.*?)\) ->', code, re.S):
            found = re.fullmatch(r"tensor<\d+x(\d+)xf32, (#\w+)>", types)
            if found and "arith.addf" in body:
                layouts.append((kernel.name, found[1], named[found[2]]))
        kernel.module, kernel._run = "loaded", lambda *args: None

CompiledKernel._init_handles = note
norm, bias = torch.zeros(hidden).bfloat16(), torch.zeros(num_experts).bfloat16()
weight = torch.zeros(num_experts, hidden).bfloat16()
for num_tokens in (1, 2, 4, 8, 20, 129):
    x = torch.zeros(num_tokens, hidden).bfloat16()
    buffers = routing_kernel.allocate(num_tokens, hidden, num_experts, 4, 16, x.dtype, "cpu")
    for renormalize in (True, False):
        routing_kernel.route(x, None, norm, 1e-5, weight, bias, buffers, 16, renormalize)
print(json.dumps(layouts))
"""


@pytest.mark.parametrize(("hidden", "num_experts"), [(256, 8), (2880, 32)])
def test_sums_of_floats_have_one_order(hidden: int, num_experts: int, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    process = run_script(f"{hidden=}; {num_experts=}\n{LAYOUTS}", tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    layouts = json.loads(process.stdout.splitlines()[-1])
    of_width: dict[str, set[str]] = {}
    for _, width, layout in layouts:
        of_width.setdefault(width, set()).add(layout)
    assert of_width
    assert all(len(found) == 1 for found in of_width.values()), of_width


def wrong_calls() -> dict[str, tuple[dict, str]]:
    x = torch.zeros(20, 64)
    buffers = routing_kernel.allocate(20, 64, 8, 4, 16, torch.float32, "cpu")
    other = routing_kernel.allocate(19, 64, 8, 4, 16, torch.float32, "cpu")
    too_many = routing_kernel.allocate(20, 64, 8, 9, 16, torch.float32, "cpu")
    return {
        "rank": ({"x": x[0]}, r"x has shape \(64,\)"),
        "stride": ({"x": torch.zeros(64, 20).T}, r"x has shape \(20, 64\), strides \(1, 20\)"),
        "hidden": ({"router_weight": torch.zeros(8, 60)}, r"router weight has shape \(8, 60\)"),
        "dtype": ({"router_weight": torch.zeros(8, 64).half()}, "router weight is torch.float16"),
        "bias": ({"router_bias": torch.zeros(9)}, r"router bias has shape \(9,\)"),
        "norm": ({"norm_weight": torch.zeros(1, 64)}, r"norm weight has shape \(1, 64\)"),
        "residual": ({"residual": torch.zeros(20, 63)}, r"residual has shape \(20, 63\)"),
        "buffers": ({"buffers": other}, r"buffers.normed has shape \(19, 64\)"),
        "top_k": ({"buffers": too_many}, "buffers are for the 9 best experts; there are 8"),
        "local": ({"local": range(6, 9)}, r"local is range\(6, 9\); pass a range within the 8"),
        "blocks": ({"block_m": 8}, r"buffers have 12 blocks.* need 17"),
        "counters": (
            {"buffers": replace(buffers, counters=routing_counters(16, "cpu"))},
            "counters are for 16 tokens",
        ),
    }


@pytest.mark.parametrize("name", wrong_calls())
def test_what_does_not_fit_is_named(name):
    change, message = wrong_calls()[name]
    arguments = {
        "x": torch.zeros(20, 64),
        "residual": None,
        "norm_weight": torch.zeros(64),
        "eps": 1e-5,
        "router_weight": torch.zeros(8, 64),
        "router_bias": torch.zeros(8),
        "buffers": routing_kernel.allocate(20, 64, 8, 4, 16, torch.float32, "cpu"),
        "block_m": 16,
    }
    with pytest.raises(ValueError, match=message):
        route(**(arguments | change))


def test_wrong_logits_are_named():
    buffers = routing_kernel.allocate(20, 64, 8, 4, 16, torch.float32, "cpu")
    x, weight = torch.zeros(20, 64), torch.zeros(8, 64)
    with pytest.raises(ValueError, match=r"out has shape \(19, 8\)"):
        router_gemm(x, weight, None, buffers, torch.zeros(19, 8))
    with pytest.raises(ValueError, match=r"out is torch.float64; pass torch.float32"):
        router_gemm(x, weight, None, buffers, torch.zeros(20, 8).double())


@pytest.fixture(params=["cuda", "triton"])
def way(request, monkeypatch):
    """Which kernel takes up to 128 tokens where both could."""
    if request.param == "triton":
        monkeypatch.setattr(routing_cuda, "takes", lambda *args: False)


@gpu
@pytest.mark.usefixtures("way")
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
    if num_experts == 64:
        check(Router(num_experts, hidden), 150, hidden, 2, add=False)


@gpu
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("num_tokens", [5, 60, 300])
@pytest.mark.parametrize("local", [range(8), range(24, 32)])
def test_a_slice_of_the_experts(num_tokens, local):
    check(Router(32, 2880), num_tokens, 2880, 4, local=local)


@gpu
@pytest.mark.usefixtures("way")
def test_ties_go_to_the_lower_expert():
    router = Router(32, 2880)
    router.weight.zero_()
    router.bias.zero_()
    for num_tokens in (1, 20, 200):
        x = torch.randn(num_tokens, 2880, device="cuda").bfloat16()
        _, buffers = router.run(x, None, 4)
        assert buffers.expert_ids.tolist() == [[0, 1, 2, 3]] * num_tokens


@gpu
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("num_experts", "hidden"), [(32, 2880), (128, 2880), (8, 256)])
def test_a_token_has_the_same_bits_in_every_batch(num_experts, hidden):
    router = Router(num_experts, hidden)
    x = torch.randn(8192, hidden, device="cuda").bfloat16()
    _, whole = router.run(x, None, 4)
    for size in (1, 2, 5, 8, 15, 16, 17, 33, 64, 100, 127, 128, 129, 145, 500, 1024, 4000):
        rows = torch.randperm(8192, device="cuda")[:size]
        _, part = router.run(x[rows], None, 4)
        assert torch.equal(part.normed, whole.normed[rows]), size
        assert torch.equal(part.expert_weights, whole.expert_weights[rows]), size
        assert torch.equal(part.expert_ids, whole.expert_ids[rows]), size


@gpu
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("num_tokens", [9, 100, 300])
def test_a_row_of_nan_does_no_harm(num_tokens):
    x = torch.randn(num_tokens, 2880, device="cuda").bfloat16()
    rows_of_nan_do_no_harm(Router(32, 2880), x)


@gpu
@pytest.mark.parametrize("hidden", [360, 720, 1440, 2880])
@pytest.mark.parametrize("num_experts", [32, 64, 128])
def test_router_gemm(hidden, num_experts):
    router = Router(num_experts, hidden)
    for num_tokens in (1, 2, 4, 8, 100, 500 if hidden == 2880 else 3):
        x = torch.randn(num_tokens, hidden, device="cuda").bfloat16()
        out = torch.full((num_tokens, num_experts), float("nan"), device="cuda")
        router_gemm(x, router.weight, router.bias, router.buffers(x, 4), out)
        torch.testing.assert_close(out.double(), router.logits(x), rtol=1e-4, atol=1e-4)
