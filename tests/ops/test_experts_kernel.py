"""The expert matmuls against float64 on the dequantized weights, here and on a GPU."""

import pytest
import torch

from headrace.ops import dispatch, experts_kernel, mxfp4, routing_kernel, sort_kernel
from headrace.ops.experts import Activation
from headrace.ops.experts_kernel import DenseWeight, grouped_matmul
from headrace.ops.mxfp4_kernel import RowOrder, prepare
from headrace.ops.tiles import MoETiles, Problem, Tile, choose
from headrace.ops.weighted_sum_kernel import weighted_sum

gpu = pytest.mark.gpu
SIZES = (1, 2, 3, 7, 16, 17, 127, 128, 129, 1000, 4096)


class Weights:
    """Random MXFP4 experts of one layer, as checkpoint, as kernel layout and as float64."""

    def __init__(self, num_experts, hidden, inter, device="cuda", order=RowOrder.INTERLEAVED):
        generator = torch.Generator(device).manual_seed(1)
        self.num_experts, self.hidden, self.inter = num_experts, hidden, inter
        self.order = order

        def packed(rows, columns):
            shape = (num_experts, rows, columns // 32)
            options = {"dtype": torch.uint8, "device": device, "generator": generator}
            return (
                torch.randint(0, 256, (*shape, 16), **options),
                torch.randint(118, 122, shape, **options),
            )

        self.gate_up, self.down = packed(2 * inter, hidden), packed(hidden, inter)
        self.gate_up_bias = torch.randn(
            num_experts, 2 * inter, device=device, generator=generator
        ).bfloat16()
        self.down_bias = torch.randn(
            num_experts, hidden, device=device, generator=generator
        ).bfloat16()

    def kernel_weights(self):
        return prepare(*self.gate_up, self.order), prepare(*self.down)

    def reference(self, x, ids, weights, low_rank=None):
        """[num_tokens, hidden] float64; ids outside [0, num_experts) add nothing.

        low_rank(matmul, x, token, expert) is added to the first (0) and the second (1) matmul.
        """
        out = torch.zeros(len(x), self.hidden, dtype=torch.float64, device=x.device)
        for expert in range(self.num_experts):
            token, k = (ids == expert).nonzero(as_tuple=True)
            if len(token) == 0:
                continue
            gate_up, down = (
                mxfp4.dequantize(b[expert], s[expert], torch.float32).double()
                for b, s in (self.gate_up, self.down)
            )
            both = x[token].double() @ gate_up.T + self.gate_up_bias[expert].double()
            if low_rank:
                both += low_rank(0, x[token], token, expert)
            if self.order == RowOrder.INTERLEAVED:
                gate, up = both[:, 0::2], both[:, 1::2]
            else:
                gate, up = both.chunk(2, 1)
            gate, up = gate.clamp(max=7), up.clamp(-7, 7)
            h = gate * torch.sigmoid(1.702 * gate) * (up + 1)
            y = h @ down.T + self.down_bias[expert].double()
            if low_rank:
                y += low_rank(1, h, token, expert)
            out.index_add_(0, token, y * weights[token, k].double()[:, None])
        return out


def run_layer(
    x, ids, weights, kernel_weights, biases, tiles, num_experts, residual=None, shrink=None
):
    """The two matmuls and the sum, from given ids; shrink(matmul, x, slots) makes a LowRank."""
    gate_up, down = kernel_weights
    num_tokens, top_k = ids.shape
    local = range(num_experts)
    buffers = routing_kernel.allocate(
        num_tokens, x.shape[1], num_experts, top_k, tiles.gate_up.block_m, x.dtype, x.device
    )
    slots = sort_kernel.sort(ids, local, buffers, tiles.gate_up.block_m)
    h = x.new_full((ids.numel(), gate_up.out_features // 2), float("nan"))
    y = x.new_full((ids.numel(), x.shape[1]), float("nan"))
    out = torch.full_like(x, float("nan"))
    experts_kernel.grouped_matmul(
        x, gate_up, biases[0], slots, tiles.gate_up, h, top_k, True,
        activation=Activation.SWIGLU_OAI, low_rank=shrink and shrink(0, x, slots),
    )  # fmt: skip
    experts_kernel.grouped_matmul(
        h, down, biases[1], slots, tiles.down, y, top_k, False, slot_weights=weights.view(-1),
        low_rank=shrink and shrink(1, h, slots),
    )  # fmt: skip
    return weighted_sum(y, ids, local, residual, out)


def routing(num_tokens, num_experts, top_k, device, kind="spread"):
    scores = torch.rand(num_tokens, num_experts, device=device)
    if kind == "few":  # most experts get no token
        scores[:, top_k + 1 :] = -1
    ids = scores.topk(top_k, 1).indices.int()
    if kind == "one":
        ids[:, 0] = 3
        ids[:, 1:] = -1
    if kind == "remote":
        ids[torch.rand(ids.shape, device=device) < 0.5] = -1
    return ids, torch.rand(num_tokens, top_k, device=device).softmax(1)


def errors(out, reference):
    """Largest and RMS error, each relative to the reference's own."""
    difference = out.double() - reference
    scale = reference.pow(2).mean().sqrt().clamp(min=1e-30)
    largest = (difference.abs() / reference.abs().clamp(min=scale)).max()
    return float(largest), float(difference.pow(2).mean().sqrt() / scale)


def check(weights, num_tokens, tiles=None, kind="spread", top_k=4, device="cuda", **limits):
    x = torch.randn(num_tokens, weights.hidden, device=device)
    x = x.bfloat16() if device == "cuda" else x
    ids, routing_weights = routing(num_tokens, weights.num_experts, top_k, device, kind)
    tiles = tiles or choose(Problem(num_tokens * top_k, weights.num_experts))
    biases = (weights.gate_up_bias, weights.down_bias)
    if device == "cpu":
        biases = tuple(b.float() for b in biases)
    out = run_layer(
        x, ids, routing_weights, weights.kernel_weights(), biases, tiles, weights.num_experts
    )
    largest, rms = errors(out, weights.reference(x, ids, routing_weights))
    assert largest < limits.get("largest", 0.025), (largest, rms)
    assert rms < limits.get("rms", 0.005), (largest, rms)


@pytest.fixture(scope="module")
def small():
    return Weights(32, 2880, 2880)


interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton on a CPU")
TIGHT = {"largest": 1e-4, "rms": 1e-5}  # float32 activations there


@interpreted
@pytest.mark.parametrize(
    ("num_tokens", "kind"), [(1, "spread"), (20, "few"), (17, "remote"), (18, "one")]
)
def test_interpreted_layer(num_tokens, kind):
    tile = Tile(16, 64, group_m=2)
    weights = Weights(6, 160, 96, "cpu")
    check(weights, num_tokens, MoETiles(tile, tile), kind, top_k=2, device="cpu", **TIGHT)


@interpreted
@pytest.mark.parametrize("order", [RowOrder.INTERLEAVED, RowOrder.HALVES])
def test_interpreted_wide_tiles(order):
    tile = Tile(32, 128, 256)
    weights = Weights(3, 352, 160, "cpu", order)
    check(weights, 5, MoETiles(tile, tile), top_k=2, device="cpu", **TIGHT)


@interpreted
@pytest.mark.parametrize("narrow", [(16,), (16, 32)])
def test_interpreted_narrow_blocks(narrow):
    """Experts with 1 to 50 rows: every width has some."""
    tile = Tile(64, 64, narrow=narrow)
    weights = Weights(4, 160, 96, "cpu")
    check(weights, 60, MoETiles(tile, tile), "few", top_k=2, device="cpu", **TIGHT)


@interpreted
def test_interpreted_dense_weights_without_activation():
    weights = Weights(3, 96, 64, "cpu")
    dense = DenseWeight(mxfp4.dequantize(*weights.gate_up, torch.float32), RowOrder.INTERLEAVED)
    x, (ids, _) = torch.randn(9, 96), routing(9, 3, 2, "cpu")
    buffers = routing_kernel.allocate(9, 96, 3, 2, 16, torch.float32, "cpu")
    slots = sort_kernel.sort(ids, range(3), buffers, 16)
    bias = weights.gate_up_bias.float()
    for weight in (dense, weights.kernel_weights()[0]):
        out = torch.full((18, 128), float("nan"))
        grouped_matmul(x, weight, bias, slots, Tile(16, 64), out, 2, gather=True)
        for row, slot in enumerate(slots.slots.tolist()):
            expert = int(ids.flatten()[slot])
            expected = dense.values[expert] @ x[slot // 2] + bias[expert]
            torch.testing.assert_close(out[row], expected, rtol=1e-4, atol=1e-4)


@interpreted
def test_an_empty_batch_returns_early():
    check_shapes = Weights(3, 96, 64, "cpu")
    tile = Tile(16, 64)
    ids = torch.zeros(0, 2, dtype=torch.int32)
    out = run_layer(
        torch.zeros(0, 96), ids, torch.zeros(0, 2), check_shapes.kernel_weights(),
        (check_shapes.gate_up_bias, check_shapes.down_bias), MoETiles(tile, tile), 3,
    )  # fmt: skip
    assert out.shape == (0, 96)


@interpreted
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 64)}, "x has shape"),
        ({"x": torch.zeros(96, 4).T}, "x has shape"),
        ({"bias": torch.zeros(3, 127)}, "bias has shape"),
        ({"out": torch.zeros(8, 64)}, "out has shape"),
        ({"out": torch.zeros(7, 128)}, "out has shape"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    weights = Weights(3, 96, 64, "cpu")
    buffers = routing_kernel.allocate(4, 96, 3, 2, 16, torch.float32, "cpu")
    arguments = {
        "x": torch.zeros(4, 96),
        "weight": weights.kernel_weights()[0],
        "bias": torch.zeros(3, 128),
        "slots": buffers.sorted,
        "tile": Tile(16, 64),
        "out": torch.zeros(8, 128),
        "top_k": 2,
        "gather": True,
    }
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**(arguments | change))


@gpu
@pytest.mark.parametrize("num_tokens", SIZES)
def test_layer_of_32_experts(small, num_tokens):
    check(small, num_tokens)


@gpu
@pytest.mark.parametrize("num_tokens", [1, 16, 129, 1000])
def test_layer_of_128_experts(num_tokens):
    check(Weights(128, 2880, 2880), num_tokens)


@gpu
@pytest.mark.parametrize("kind", ["one", "few", "remote"])
@pytest.mark.parametrize("num_tokens", [1, 33, 500])
def test_uneven_routing(small, kind, num_tokens):
    check(small, num_tokens, kind=kind)


@gpu
@pytest.mark.parametrize(("hidden", "inter"), [(352, 96), (512, 384), (160, 1440), (2880, 360 - 8)])
@pytest.mark.parametrize("order", [RowOrder.INTERLEAVED, RowOrder.HALVES])
def test_ragged_sizes(hidden, inter, order):
    check(Weights(8, hidden, inter, order=order), 37, top_k=3)


@gpu
@pytest.mark.parametrize(
    "tile",
    [
        Tile(16, 64, 256, 4, 3),
        Tile(16, 128, 128, 8, 4),
        Tile(32, 128, 128, 4, 4),
        Tile(64, 128, 128, 8, 3, 2),
        Tile(128, 128, 128, 8, 3, 4),
        Tile(256, 128, 128, 8, 3, 4),
        Tile(64, 128, 128, 4, 3, 1, (16, 32)),
        Tile(128, 128, 128, 4, 3, 4, (32, 64)),
    ],
    ids=str,
)
def test_every_tile_gives_the_same_bits(small, tile):
    x = torch.randn(300, 2880, device="cuda").bfloat16()
    ids, weights = routing(300, 32, 4, "cuda")
    kernel_weights, biases = small.kernel_weights(), (small.gate_up_bias, small.down_bias)

    def run(tile):
        return run_layer(x, ids, weights, kernel_weights, biases, MoETiles(tile, tile), 32)

    torch.testing.assert_close(run(tile), run(Tile(16, 64)), rtol=0, atol=0)


@gpu
def test_a_token_has_the_same_bits_in_every_batch(small):
    kernel_weights, biases = small.kernel_weights(), (small.gate_up_bias, small.down_bias)
    x = torch.randn(8192, 2880, device="cuda").bfloat16()
    ids, weights = routing(8192, 32, 4, "cuda")

    def run(rows):
        tiles = choose(Problem(len(rows) * 4, 32))
        return run_layer(x[rows], ids[rows], weights[rows], kernel_weights, biases, tiles, 32)

    alone = run(torch.tensor([4321], device="cuda"))[0]
    sizes = (2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 65, 100, 128, 200, 256, 500, 777, 1024, 3000, 5000)
    for size in (*sizes, 8192):
        rows = torch.randperm(8192, device="cuda")[:size]
        rows[size // 2] = 4321
        assert torch.equal(run(rows)[size // 2], alone), size


@gpu
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 16, 33])
def test_overlapping_launches_give_the_same_bits(small, num_tokens, monkeypatch):
    """Launched before the end of the one before, and after it."""
    x, residual = (torch.randn(num_tokens, 2880, device="cuda").bfloat16() for _ in "12")
    ids, weights = routing(num_tokens, 32, 4, "cuda", "remote" if num_tokens == 33 else "spread")
    biases = (small.gate_up_bias, small.down_bias)
    call = (x, ids, weights, small.kernel_weights(), biases)
    tiles = choose(Problem(4 * num_tokens, 32))
    overlapping = [run_layer(*call, tiles, 32, residual) for _ in range(5)]
    monkeypatch.setattr(dispatch, "is_hopper", lambda x: False)
    apart = run_layer(*call, tiles, 32, residual)
    assert all(torch.equal(out, apart) for out in overlapping)


@gpu
def test_a_wrong_scale_is_rejected(small):
    wrong = Weights(32, 2880, 2880)
    wrong.down[1][:, ::7, 3] += 1
    x = torch.randn(16, 2880, device="cuda").bfloat16()
    ids, weights = routing(16, 32, 4, "cuda")
    biases = (small.gate_up_bias, small.down_bias)
    out = run_layer(x, ids, weights, wrong.kernel_weights(), biases, choose(Problem(64, 32)), 32)
    largest, rms = errors(out, small.reference(x, ids, weights))
    assert largest > 0.025
    assert rms > 0.005


@gpu
def test_dense_weights(small):
    x = torch.randn(50, 2880, device="cuda").bfloat16()
    ids, weights = routing(50, 32, 4, "cuda")
    dense = (
        DenseWeight(mxfp4.dequantize(*small.gate_up, torch.bfloat16), RowOrder.INTERLEAVED),
        DenseWeight(mxfp4.dequantize(*small.down, torch.bfloat16), RowOrder.PLAIN),
    )
    tiles = MoETiles(Tile(16, 64, 64), Tile(16, 64, 64))
    biases = (small.gate_up_bias, small.down_bias)
    out = run_layer(x, ids, weights, dense, biases, tiles, 32)
    largest, rms = errors(out, small.reference(x, ids, weights))
    assert largest < 0.025
    assert rms < 0.005


@gpu
def test_nothing_is_allocated_and_a_graph_replays(small):
    x = torch.randn(24, 2880, device="cuda").bfloat16()
    kernel_weights, tiles = small.kernel_weights(), choose(Problem(96, 32))
    buffers = routing_kernel.allocate(
        24, 2880, 32, 4, tiles.gate_up.block_m, torch.bfloat16, "cuda"
    )
    norm, router = torch.ones_like(x[0]), torch.randn(32, 2880, device="cuda").bfloat16() * 0.05
    h, y, out = torch.empty_like(x.repeat(4, 1)), torch.empty_like(x.repeat(4, 1)), x.clone()

    def step():
        summed = routing_kernel.route(
            x, x, norm, 1e-5, router, bias, buffers,
            tiles.gate_up.block_m,
        )  # fmt: skip
        experts_kernel.grouped_matmul(
            buffers.normed, kernel_weights[0], small.gate_up_bias, buffers.sorted, tiles.gate_up,
            h, 4, True, activation=Activation.SWIGLU_OAI,
        )  # fmt: skip
        experts_kernel.grouped_matmul(
            h, kernel_weights[1], small.down_bias, buffers.sorted, tiles.down, y, 4, False,
            slot_weights=buffers.expert_weights.view(-1),
        )  # fmt: skip
        weighted_sum(y, buffers.expert_ids, range(32), summed, out)

    bias = router[:, 0].contiguous()
    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    step()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        replayed = out.clone()
        out.zero_()
        step()
        assert torch.equal(out, replayed)
        expected = small.reference(buffers.normed, buffers.expert_ids, buffers.expert_weights)
        largest, rms = errors(out, expected + 2 * x.double())
        assert largest < 0.025
        assert rms < 0.005
