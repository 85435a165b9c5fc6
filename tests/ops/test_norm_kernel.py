"""The normalisation kernel against float64, through Triton's interpreter and on a GPU."""

import pytest
import torch

from headrace.ops import norm, norm_kernel

gpu = pytest.mark.gpu
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton on a CPU")


def exact(x, weight, eps):
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@interpreted
@pytest.mark.parametrize(("num_tokens", "hidden"), [(0, 8), (1, 7), (3, 64), (2, 2880)])
def test_equals_float64(num_tokens, hidden):
    x = torch.randn(num_tokens, hidden) * 0.01  # so small that eps counts
    weight = torch.randn(hidden)
    out = torch.full_like(x, float("nan"))
    norm_kernel.rms_norm(x, weight, 1e-5, out)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(out.double(), exact(x, weight, 1e-5), **close)
    if num_tokens:
        for wrong in (exact(x, weight, 1e-6), exact(x, weight.roll(1), 1e-5)):
            with pytest.raises(AssertionError):
                torch.testing.assert_close(out.double(), wrong, **close)


@interpreted
def test_in_place():
    x, weight = torch.randn(3, 48), torch.randn(48)
    expected = exact(x, weight, 1e-5)
    norm_kernel.rms_norm(x, weight, 1e-5, x)
    torch.testing.assert_close(x.double(), expected, rtol=1e-5, atol=1e-5)


@interpreted
def test_of_some_rows():
    x, weight, rows = torch.randn(5, 48), torch.randn(48), torch.tensor([4, 0, 4])
    out = torch.full((3, 48), float("nan"))
    norm_kernel.rms_norm(x, weight, 1e-5, out, rows)
    torch.testing.assert_close(out.double(), exact(x[rows], weight, 1e-5), rtol=1e-5, atol=1e-5)


def test_wrong_arguments_are_named():
    x, weight = torch.randn(2, 8), torch.randn(8)
    for bad, message in (
        ((x[0], weight, x), r"x has shape \(8,\)"),
        ((x.T, weight, x.T), "strides"),
        ((x, weight[:7], x), r"weight has shape \(7,\); x needs \(8,\)"),
        ((x, weight, x[:1]), r"out has shape \(1, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            norm_kernel.rms_norm(bad[0], bad[1], 1e-5, bad[2])
    with pytest.raises(ValueError, match=r"out has shape \(2, 8\).*pass contiguous \(1, 8\)"):
        norm_kernel.rms_norm(x, weight, 1e-5, x, torch.tensor([1]))


@gpu
def test_gpu_equals_float64_and_a_row_its_own_bits():
    weight = (torch.randn(2880, device="cuda") * 0.1 + 1).bfloat16()
    x = (torch.randn(4096, 2880, device="cuda") * 3).bfloat16()
    out = norm.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(out.double(), exact(x, weight, 1e-5), rtol=1.01 * 2**-8, atol=1e-6)
    assert not torch.equal(out, norm.rms_norm(x, weight, 1e-1))
    for num_tokens in (1, 2, 3, 7, 16, 17, 129, 1000):
        rows = slice(5, 5 + num_tokens)
        assert torch.equal(norm.rms_norm(x[rows], weight, 1e-5), out[rows])
    some = torch.tensor([4095, 0, 7], device="cuda")
    assert torch.equal(norm.rms_norm(x, weight, 1e-5, rows=some), out[some])


@gpu
def test_gpu_in_a_graph_without_allocations():
    weight = torch.randn(2880, device="cuda").bfloat16()
    x = torch.randn(5, 2880, device="cuda").bfloat16()
    out = norm.rms_norm(x, weight, 1e-5)
    expected = out.clone()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    norm.rms_norm(x, weight, 1e-5, out)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm.rms_norm(x, weight, 1e-5, out)
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, expected)
