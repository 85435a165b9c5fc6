"""The dense matmul against float64, through Triton's interpreter and on a GPU."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from headrace.ops import linear_kernel
from headrace.ops.linear import linear
from headrace.ops.linear_tiles import LinearProblem, LinearTile, tma_fits
from headrace.ops.norm import rms_norm

gpu = pytest.mark.gpu
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton on a CPU")

SHARE = LinearTile(block_m=16, block_n=64, rows=24, block_k=64, num_warps=4, num_stages=2)
FULL = LinearTile(32, 64, 64, 32, num_warps=4, num_stages=2, group_m=2)
TILES = [SHARE, FULL, replace(SHARE, tma=True), replace(FULL, tma=True, programs=2)]
# gpt-oss: out_features, in_features, bias, residual, out's dtype
QKV = (5120, 2880, True, False, torch.bfloat16)
OUTPUT = (2880, 4096, True, True, torch.bfloat16)
LM_HEAD = (201088, 2880, False, False, torch.float32)
ODD = (333, 200, True, True, torch.bfloat16)
UNALIGNED = (50, 77, True, True, torch.float32)  # in_features that 16-byte loads do not divide


class Layer:
    """Random weights and inputs, with the plain computation in float64."""

    def __init__(
        self, num_tokens, out_features, in_features, bias, residual, out_dtype,
        dtype=torch.bfloat16, device="cuda",
    ):  # fmt: skip
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape, std=1.0):
            return (torch.randn(shape, device=device, generator=generator) * std).to(dtype)

        self.x = normal(num_tokens, in_features)
        self.weight = normal(out_features, in_features, std=in_features**-0.5)
        self.bias = normal(out_features) if bias else None
        self.residual = normal(num_tokens, out_features) if residual else None
        self.out_dtype = out_dtype

    def run(self, rows=slice(None), tile=None):
        """The kernel on some rows of x."""
        x = self.x[rows]
        residual = None if self.residual is None else self.residual[rows]
        out = x.new_full((len(x), len(self.weight)), float("nan"), dtype=self.out_dtype)
        return linear_kernel.linear(x, self.weight, self.bias, residual, out, tile)

    def exact(self):
        y = self.x.double() @ self.weight.double().T
        if self.bias is not None:
            y += self.bias
        if self.residual is not None:
            y += self.residual
        return y

    def check(self, out):
        """Rounded once: at most half a unit in the last place beside float32's own error."""
        assert out.dtype == self.out_dtype
        rounding = 2**-8 if self.out_dtype == torch.bfloat16 else 0
        error = (out.double() - (exact := self.exact())).abs()
        assert (error <= exact.abs() * rounding * 1.01 + 5e-4).all(), float(error.max())


@interpreted
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(
    ("num_tokens", "out_features", "in_features", "bias", "residual"),
    [
        (1, 24, 64, False, False),
        (5, 48, 72, True, False),
        (17, 72, 136, True, True),
        (70, 33, 48, False, True),
        (33, 70, 77, True, True),
    ],
)
def test_equals_float64(num_tokens, out_features, in_features, bias, residual, tile):
    problem = LinearProblem(num_tokens, out_features, in_features)
    if tile.tma and not tma_fits(problem, tile.rows, tile.block_n):
        pytest.skip("TMA can't read it")
    layer = Layer(
        num_tokens, out_features, in_features, bias, residual, torch.float32,
        dtype=torch.float32, device="cpu",
    )  # fmt: skip
    out = layer.run(tile=tile)
    assert_close(out.double(), layer.exact(), rtol=1e-5, atol=1e-5)
    for wrong in (out.roll(1, 1), out + 0.01, out * 1.001):
        with pytest.raises(AssertionError):
            assert_close(wrong.double(), layer.exact(), rtol=1e-5, atol=1e-5)


@interpreted
def test_float32_out_keeps_what_float16_would_lose():
    layer = Layer(3, 30, 40, True, True, torch.float32, dtype=torch.float16, device="cpu")
    out = layer.run(tile=SHARE)
    assert_close(out.double(), layer.exact(), rtol=1e-5, atol=1e-5)
    layer.out_dtype = torch.float16
    rounded = layer.run(tile=SHARE)
    assert torch.equal(rounded, out.half())
    assert not torch.equal(rounded.float(), out)


@interpreted
def test_residual_in_place():
    layer = Layer(18, 30, 40, True, True, torch.float32, dtype=torch.float32, device="cpu")
    expected, hidden = layer.exact(), layer.residual
    linear_kernel.linear(layer.x, layer.weight, layer.bias, hidden, hidden, tile=SHARE)
    assert_close(hidden.double(), expected, rtol=1e-5, atol=1e-5)


@interpreted
def test_the_tile_may_be_left_out_and_x_be_empty():
    layer = Layer(2, 20, 24, True, False, torch.float32, dtype=torch.float32, device="cpu")
    assert_close(layer.run().double(), layer.exact(), rtol=1e-5, atol=1e-5)
    assert layer.run(slice(0)).shape == (0, 20)


def test_tensors_that_are_not_contiguous_are_refused():
    x, weight, out = torch.randn(4, 8), torch.randn(6, 8), torch.empty(4, 6)
    for name, arguments in {
        "x": (torch.randn(8, 4).T, weight, None, None, out),
        "weight": (x, torch.randn(8, 6).T, None, None, out),
        "residual": (x, weight, None, torch.randn(6, 4).T, out),
        "out": (x, weight, None, None, torch.empty(6, 4).T),
    }.items():
        with pytest.raises(ValueError, match=f"{name} has strides"):
            linear_kernel.linear(*arguments)


@gpu
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        (QKV, (0, 1, 33, 128, 200, 3000)),
        (OUTPUT, (1, 5, 64, 300, 3000)),
        (ODD, (5, 200)),
        (UNALIGNED, (1, 33, 200)),
        (LM_HEAD, (1, 17, 128)),
    ],
)
def test_gpu_equals_float64(kind, sizes):
    for num_tokens in sizes:
        layer = Layer(num_tokens, *kind)
        out = layer.run()
        layer.check(out)
        if num_tokens:
            for wrong in (out.roll(1, 1), out + 0.02, out * 1.02):
                with pytest.raises(AssertionError):
                    layer.check(wrong)


@gpu
@pytest.mark.parametrize("kind", [QKV, OUTPUT, UNALIGNED])
def test_gpu_a_row_has_the_same_bits_in_every_batch(kind):
    layer = Layer(16384, *kind)
    whole = layer.run()
    for num_tokens in (1, 2, 3, 7, 16, 17, 64, 127, 128, 129, 1000, 2048, 4096):
        rows = slice(5, 5 + num_tokens)
        assert torch.equal(layer.run(rows), whole[rows]), num_tokens
    assert not torch.equal(layer.run(slice(0, 64)), whole[1:65])


@gpu
def test_gpu_lm_head_has_the_same_bits_in_every_batch():
    layer = Layer(200, *LM_HEAD)
    whole = layer.run()
    for num_tokens in (1, 2, 16, 17, 64, 65, 128, 129):
        rows = slice(3, 3 + num_tokens)
        assert torch.equal(layer.run(rows), whole[rows]), num_tokens


@gpu
def test_gpu_no_tile_changes_a_bit():
    layer = Layer(300, *OUTPUT)
    whole = layer.run()
    tiles = [
        LinearTile(16, 64, 24, block_k=128, num_warps=4, num_stages=8),
        LinearTile(32, 64, 16, block_k=256, num_warps=4, num_stages=3),
        LinearTile(128, 64, 64, block_k=128, num_warps=4, num_stages=3, group_m=2),
        LinearTile(256, 128, 128, block_k=64, num_warps=8, num_stages=3, group_m=2),
        LinearTile(128, 256, 256, block_k=64, num_warps=8, num_stages=3),
    ]
    if torch.cuda.get_device_capability() >= (9, 0):
        tiles += [replace(tile, tma=True) for tile in tiles]
        tiles += [replace(tile, programs=7) for tile in tiles[5:]]
    for tile in tiles:
        assert torch.equal(layer.run(tile=tile), whole), tile


@gpu
def test_gpu_started_early_it_waits_for_what_it_reads():
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no programmatic dependent launch")
    layer = Layer(16 * 40, *QKV)
    tile = LinearTile(16, 64, 40, 128, num_warps=4, num_stages=8, tma=True)
    norm_weight = torch.ones(2880, device="cuda").bfloat16()
    normed = torch.zeros(16, 2880, device="cuda").bfloat16()
    out = torch.zeros(40, 16, 5120, device="cuda").bfloat16()

    def steps():
        for step, x in enumerate(layer.x.split(16)):
            rms_norm(x, norm_weight, 1e-5, normed)
            linear_kernel.linear(normed, layer.weight, layer.bias, None, out[step], tile=tile)

    steps()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps()
    for _ in range(5):
        layer.x.copy_(torch.randn_like(layer.x))
        graph.replay()
        layer_out = linear(rms_norm(layer.x, norm_weight, 1e-5), layer.weight, layer.bias)
        assert torch.equal(out.view(-1, 5120), layer_out)


@gpu
def test_gpu_in_a_graph_without_allocations():
    layer = Layer(7, *OUTPUT)
    expected = layer.run()
    out = torch.full_like(expected, float("nan"))
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    linear(layer.x, layer.weight, layer.bias, layer.residual, out)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert torch.equal(out, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        linear(layer.x, layer.weight, layer.bias, layer.residual, out)
    for _ in range(2):
        layer.x.copy_(layer.x.flip(0))
        out.fill_(float("nan"))
        graph.replay()
        layer.check(out)


@gpu
def test_gpu_other_dtypes_are_refused():
    x = torch.zeros(2, 8, device="cuda")
    with pytest.raises(ValueError, match=r"x is torch\.float32; pass bfloat16"):
        linear(x, x)
