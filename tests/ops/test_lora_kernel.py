"""Low-rank deltas through the kernels against float64, here and on a GPU."""

import math

import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, globaltimer

from headrace.lora.rows import row_arrays
from headrace.ops import dispatch, routing_kernel, sort_kernel
from headrace.ops.experts_kernel import DenseWeight, grouped_matmul
from headrace.ops.linear import linear
from headrace.ops.lora import LoraBuffers, LoraLayer, LoraRows, LoraSite, MoELora
from headrace.ops.lora_kernel import (
    FEW_TOKENS,
    add_expert_lora_kernel,
    add_lora_embedding_kernel,
    add_lora_kernel,
    low_rank_parts,
    pair_parts,
    shrink_experts,
)
from headrace.ops.mxfp4_kernel import RowOrder
from headrace.ops.tiles import MoETiles, Problem, Tile, choose
from tests.ops.test_experts_kernel import Weights, errors, routing, run_layer

gpu = pytest.mark.gpu
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton on a CPU")
ALIGNMENT = 128
QKV, OUTPUT = (5120, 2880), (2880, 5120)  # of weights


class Adapters:
    """Random adapters of one site in the flat memory, with NaN around every factor."""

    def __init__(self, ranks, in_features, widths, num_experts, device, dtype):
        """ranks: [num_segments][num_slots], 0 where an adapter leaves a segment alone."""
        generator = torch.Generator(device).manual_seed(len(ranks[0]))
        chunks = [torch.full((ALIGNMENT,), float("nan"), dtype=dtype, device=device)]
        end = ALIGNMENT

        def place(*shape):
            nonlocal end
            start, size = end, math.prod(shape)
            values = torch.randn(size, device=device, generator=generator)
            gap = torch.full((ALIGNMENT - size % ALIGNMENT,), float("nan"), device=device)
            chunks.extend((values.to(dtype), gap.to(dtype)))
            end += size + len(gap)
            return start

        rank = torch.tensor(ranks, dtype=torch.int32, device=device)
        a, b = (torch.full(rank.shape, -1, device=device) for _ in range(2))
        for segment, slot in rank.nonzero().tolist():
            a[segment, slot] = place(num_experts, ranks[segment][slot], in_features)
            b[segment, slot] = place(num_experts, ranks[segment][slot], widths[segment])
        # a delta's values are of the order of one
        scale = 0.5 + torch.rand(rank.shape, device=device, generator=generator)
        scale /= (in_features * rank.clamp(min=1)).sqrt()
        self.memory = torch.cat(chunks)
        self.site = LoraSite(in_features, tuple(widths), num_experts, a, b, rank, scale)

    def delta(self, x, slot, expert=0):
        """[rows, sum(widths)] float64 for rows of one adapter."""
        site, parts = self.site, []
        for segment, width in enumerate(site.widths):
            rank = int(site.rank[segment, slot])

            def factor(table, columns, rank=rank, segment=segment):
                start = int(table[segment, slot]) + expert * rank * columns
                return self.memory[start:][: rank * columns].double().view(rank, columns)

            if rank:
                u = x.double() @ factor(site.a, site.in_features).T
                parts.append(u * site.scale[segment, slot].double() @ factor(site.b, width))
            else:
                parts.append(x.new_zeros(len(x), width, dtype=torch.float64))
        return torch.cat(parts, 1)


def rows_of(slot_of_row, num_slots):
    arrays = row_arrays(slot_of_row.int().cpu().numpy(), num_slots)
    return LoraRows(*(torch.from_numpy(array).to(slot_of_row.device) for array in arrays))


def take(device):
    return lambda shape, dtype: torch.full(shape, float("nan"), dtype=dtype, device=device)


def check_rows(out, y, x, adapters, slot_of_row, limit, expert_of_row=None):
    """Rows with an adapter have its delta, within limit of the largest; the others their bits.

    Limits are shares of the sum, which is what is rounded: a delta of rank 1 may be small.
    """
    expected = y.double().clone()
    experts = torch.zeros_like(slot_of_row) if expert_of_row is None else expert_of_row
    owners = torch.stack((slot_of_row.long(), experts.long()), 1)
    for slot, expert in owners[slot_of_row >= 0].unique(dim=0).tolist():
        rows = (owners == torch.tensor([slot, expert], device=owners.device)).all(1)
        expected[rows] += adapters.delta(x[rows], slot, expert)
    none = slot_of_row < 0
    assert torch.equal(out[none], y[none])
    error = (out.double() - expected)[~none]
    if len(error):
        assert error.abs().max() < limit * expected[~none].abs().max()
        assert error.pow(2).mean() < (limit / 5) ** 2 * expected[~none].pow(2).mean()


@interpreted
@pytest.mark.parametrize(
    "slot_of_row", [[2, -1, 0, 2, 1], [-1, -1], [1] * 18, [0, 2, -1, 1, 0] * 7]
)
def test_interpreted_dense(slot_of_row, monkeypatch):
    if len(slot_of_row) == 5:
        monkeypatch.setattr("headrace.ops.lora_kernel.MOST_TILES", 1)  # both tiles by one program
    ranks, widths = [[8, 3, 16], [1, 0, 20], [40, 5, 0]], (96, 32, 80)
    adapters = Adapters(ranks, 160, widths, 1, "cpu", torch.float32)
    slots = torch.tensor(slot_of_row)
    x, y = torch.randn(len(slots), 160), torch.randn(len(slots), 208)
    parts = low_rank_parts(take("cpu"), 3, len(slots), 64)
    out = add_lora_kernel(y.clone(), x, adapters.site, adapters.memory, rows_of(slots, 3), parts)
    check_rows(out, y, x, adapters, slots, 1e-5)


@interpreted
def test_interpreted_wrong_factors_are_rejected():
    adapters = Adapters([[8, 3]], 160, [96], 1, "cpu", torch.float32)
    slots = torch.tensor([0, 1, -1])
    x, y = torch.randn(3, 160), torch.randn(3, 96)
    parts = low_rank_parts(take("cpu"), 1, 3, 8)
    wrong = adapters.memory.clone()
    wrong[int(adapters.site.b[0, 1]) + 96 :][:10] += 1
    out = add_lora_kernel(y.clone(), x, adapters.site, wrong, rows_of(slots, 2), parts)
    with pytest.raises(AssertionError):
        check_rows(out, y, x, adapters, slots, 1e-3)


@interpreted
def test_interpreted_experts_on_their_own():
    adapters = Adapters([[8, 0, 20]], 160, [96], 3, "cpu", torch.float32)
    slots, experts = torch.tensor([2, 0, -1, 1, 2, 2, 0]), torch.tensor([0, 2, 1, 1, 2, 0, 2])
    x, y = torch.randn(7, 160), torch.randn(7, 96)
    parts = low_rank_parts(take("cpu"), 1, 7, 20)
    out = add_expert_lora_kernel(
        y.clone(), x, experts, slots.int(), adapters.site, adapters.memory, parts
    )
    check_rows(out, y, x, adapters, slots, 1e-5, experts)


@interpreted
def test_interpreted_embedding():
    adapters = Adapters([[8, 20, 0]], 160, [96], 1, "cpu", torch.float32)
    slots, tokens = torch.tensor([1, -1, 0, 2, 1]), torch.tensor([3, 3, 159, 7, 0])
    y = torch.randn(5, 96)
    parts = low_rank_parts(take("cpu"), 1, 5, 20)
    out = add_lora_embedding_kernel(
        y.clone(), tokens, adapters.site, adapters.memory, rows_of(slots, 3), parts
    )
    one_hot = torch.nn.functional.one_hot(tokens, 160).float()
    check_rows(out, y, one_hot, adapters, slots, 1e-5)
    unread, sampled = tokens.clone(), torch.tensor([9, 0, 159])
    unread[2], unread[4] = -3, -2
    rows = rows_of(slots, 3)
    late = add_lora_embedding_kernel(
        y.clone(), unread, adapters.site, adapters.memory, rows, parts, sampled
    )
    assert torch.equal(late, out)


@interpreted
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float16, 5e-3)])
def test_interpreted_one_part_has_the_bits_of_many(dtype, limit):
    """Above FEW_TOKENS rows, one program sums all slices of K, in the order of the expand."""
    adapters = Adapters([[8, 20]], 1100, [64], 1, "cpu", dtype)
    slots = torch.tensor([1, -1, 0, 0, 1])
    x, y = torch.randn(5, 1100).to(dtype), torch.randn(5, 64)
    many = low_rank_parts(take("cpu"), 1, 5, 20)
    one = low_rank_parts(take("cpu"), 1, FEW_TOKENS + 1, 20)[:, :, :5].contiguous()
    assert (len(many), len(one)) == (4, 1)
    call = (x, adapters.site, adapters.memory, rows_of(slots, 2))
    out = add_lora_kernel(y.clone(), *call, many)
    assert torch.equal(add_lora_kernel(y.clone(), *call, one), out)
    check_rows(out, y, x, adapters, slots, limit)


def check_router(num_tokens, hidden, num_experts, ranks, device, dtype, limit):
    """Rows with an adapter choose by logits + delta; the others have the bits of the base."""
    adapters = Adapters([ranks], hidden, [num_experts], 1, device, dtype)
    site = adapters.site
    slots = (torch.arange(num_tokens, device=device) % (len(ranks) + 1) - 1).int()
    lora = MoELora(
        LoraLayer(site, site, site, site, site), adapters.memory, rows_of(slots, len(ranks)),
        LoraBuffers(),
    )  # fmt: skip
    weight = (torch.randn(num_experts, hidden, device=device) * 0.05).to(dtype)
    norm, x = weight[0] + 1, torch.randn(num_tokens, hidden, device=device).to(dtype)
    both = [
        routing_kernel.allocate(num_tokens, hidden, num_experts, 4, 16, dtype, device) for _ in "12"
    ]
    base, buffers = both
    routing_kernel.route(x, None, norm, 1e-5, weight, None, base, 16)
    routing_kernel.route(x, None, norm, 1e-5, weight, None, buffers, 16, lora=lora)
    assert torch.equal(buffers.normed, base.normed)
    logits = base.normed.double() @ weight.double().T
    none = slots < 0
    assert torch.equal(buffers.expert_ids[none], base.expert_ids[none])
    assert torch.equal(buffers.expert_weights[none], base.expert_weights[none])
    for slot in range(len(ranks)):
        logits[slots == slot] += adapters.delta(buffers.normed[slots == slot], slot)
    chosen = logits.gather(1, buffers.expert_ids.long())
    torch.testing.assert_close(chosen, logits.topk(4).values, rtol=0, atol=limit)
    weights = buffers.expert_weights.double()
    torch.testing.assert_close(weights, chosen.softmax(1), rtol=limit, atol=limit)
    changed = buffers.expert_weights != base.expert_weights
    assert changed[slots == 0].any(1).all()


def router_rows_keep_their_bits(num_experts, hidden, total, sizes, device, dtype):
    """Whatever the number of rows, and so of launches, and whoever else is there."""
    ranks = [64, 0, 20]
    adapters = Adapters([ranks], hidden, [num_experts], 1, device, dtype)
    site = adapters.site
    slots = (torch.arange(total, device=device) % 4 - 1).int()
    weight = (torch.randn(num_experts, hidden, device=device) * 0.05).to(dtype)
    norm, x = weight[0] + 1, torch.randn(total, hidden, device=device).to(dtype)

    def run(rows):
        layer = LoraLayer(site, site, site, site, site)
        lora = MoELora(layer, adapters.memory, rows_of(slots[rows], len(ranks)), LoraBuffers())
        found = routing_kernel.allocate(len(rows), hidden, num_experts, 4, 16, dtype, device)
        routing_kernel.route(x[rows], None, norm, 1e-5, weight, None, found, 16, lora=lora)
        return found.expert_ids, found.expert_weights

    whole = run(torch.arange(total, device=device))
    for size in sizes:
        rows = torch.randperm(total, device=device)[:size]
        for part, of_all in zip(run(rows), whole, strict=True):
            assert torch.equal(part, of_all[rows]), size


@interpreted
def test_interpreted_router_rows_keep_their_bits():
    router_rows_keep_their_bits(12, 300, 130, (1, 20), "cpu", torch.float32)


@gpu
@pytest.mark.parametrize("num_experts", [32, 128])
def test_router_rows_keep_their_bits(num_experts):
    sizes = (1, 2, 7, 16, 17, 100, 128, 129, 500)
    router_rows_keep_their_bits(num_experts, 2880, 1000, sizes, "cuda", torch.bfloat16)


@interpreted
@pytest.mark.parametrize("num_tokens", [19, 130])  # one launch, and more
def test_interpreted_router(num_tokens):
    check_router(num_tokens, 300, 12, [20, 0, 70], "cpu", torch.float32, 1e-4)


class LayerAdapters:
    """Random adapters of both matmuls of one layer of experts."""

    def __init__(self, weights, gate_up_ranks, down_ranks, device, dtype):
        hidden, inter, experts = weights.hidden, weights.inter, weights.num_experts
        self.weights = weights
        self.matmuls = (
            Adapters([gate_up_ranks], hidden, [2 * inter], experts, device, dtype),
            Adapters([down_ranks], inter, [hidden], experts, device, dtype),
        )
        self.max_rank = max(*gate_up_ranks, *down_ranks)

    def run(self, x, ids, weights, slot_of_token, tiles, biases, kernel_weights):
        def shrink(matmul, x, slots):
            adapters = self.matmuls[matmul]
            parts = pair_parts(take(x.device), ids.numel(), self.max_rank)
            return shrink_experts(
                x, adapters.site, adapters.memory, slot_of_token.int(), slots,
                tiles.gate_up.block_m, ids.shape[1], matmul == 0, parts,
            )  # fmt: skip

        return run_layer(
            x, ids, weights, kernel_weights, biases, tiles, self.weights.num_experts,
            shrink=shrink,
        )  # fmt: skip

    def reference(self, x, ids, weights, slot_of_token):
        def low_rank(matmul, x, token, expert):
            adapters = self.matmuls[matmul]
            out = x.new_zeros(len(x), *adapters.site.widths, dtype=torch.float64)
            slots = slot_of_token[token]
            for slot in slots[slots >= 0].unique().tolist():
                out[slots == slot] = adapters.delta(x[slots == slot], slot, expert)
            return out

        return self.weights.reference(x, ids, weights, low_rank)


@interpreted
@pytest.mark.parametrize("slot_of_token", [[2, -1, 0, 1, 2, 1, -1, 0, 2], [-1] * 3])
def test_interpreted_experts(slot_of_token):
    weights = Weights(3, 160, 96, "cpu")
    adapters = LayerAdapters(weights, [8, 0, 40], [16, 3, 0], "cpu", torch.float32)
    slots = torch.tensor(slot_of_token)
    x = torch.randn(len(slots), 160)
    ids, routing_weights = routing(len(slots), 3, 2, "cpu")
    biases = (weights.gate_up_bias.float(), weights.down_bias.float())
    tile = Tile(16, 128)
    call = (MoETiles(tile, tile), biases, weights.kernel_weights())
    out = adapters.run(x, ids, routing_weights, slots, *call)
    expected = adapters.reference(x, ids, routing_weights, slots)
    largest, rms = errors(out, expected)
    assert largest < 1e-4
    assert rms < 1e-5
    base = run_layer(x, ids, routing_weights, call[2], biases, call[0], 3)
    none = slots < 0
    assert torch.equal(out[none], base[none])
    if not none.all():
        assert (out[~none] - base[~none]).abs().amax(1).min() > 0.01  # the adapters do something


def gpu_adapters(ranks, in_features, widths, num_experts=1):
    return Adapters(ranks, in_features, widths, num_experts, "cuda", torch.bfloat16)


def random_slots(num_rows, num_slots):
    """Every slot, and none as often as two slots."""
    return (torch.randint(-2, num_slots, (num_rows,), device="cuda")).clamp(min=-1).int()


@gpu
@pytest.mark.parametrize("num_rows", [1, 2, 33, 128, 129, 1000, 1024, 1025, 4096])
def test_dense(num_rows):
    ranks = [[8, 64, 0, 16, 1, 512, 20], [8, 64, 32, 16, 0, 512, 4], [8, 64, 0, 16, 2, 512, 64]]
    adapters = gpu_adapters(ranks, 2880, (4096, 512, 512))
    slots = random_slots(num_rows, 7)
    x = torch.randn(num_rows, 2880, device="cuda").bfloat16()
    y = torch.randn(num_rows, 5120, device="cuda").bfloat16()
    parts = low_rank_parts(take("cuda"), 3, num_rows, 512)
    out = add_lora_kernel(y.clone(), x, adapters.site, adapters.memory, rows_of(slots, 7), parts)
    check_rows(out, y, x, adapters, slots, 0.02)


@gpu
def test_dense_of_32_adapters_into_float32():
    adapters = gpu_adapters([[16] * 32], 2880, (20108,))
    slots = torch.arange(32, device="cuda", dtype=torch.int32)
    x, y = torch.randn(32, 2880, device="cuda").bfloat16(), torch.randn(32, 20108, device="cuda")
    parts = low_rank_parts(take("cuda"), 1, 32, 16)
    out = add_lora_kernel(y.clone(), x, adapters.site, adapters.memory, rows_of(slots, 32), parts)
    check_rows(out, y, x, adapters, slots, 0.02)


@gpu
def test_a_dense_row_has_the_same_bits_in_every_batch():
    adapters = gpu_adapters([[64, 16, 8]] * 3, 2880, (4096, 512, 512))
    x = torch.randn(4096, 2880, device="cuda").bfloat16()
    y = torch.randn(4096, 5120, device="cuda").bfloat16()
    slots = random_slots(4096, 3)
    slots[123] = 1

    def run(rows):
        parts = low_rank_parts(take("cuda"), 3, len(rows), 64)
        call = adapters.site, adapters.memory, rows_of(slots[rows], 3)
        return add_lora_kernel(y[rows], x[rows], *call, parts)

    alone = run(torch.tensor([123], device="cuda"))[0]
    for size in (2, 5, 16, 17, 32, 33, 100, 128, 129, 500, 1024, 1025, 3000, 4096):
        rows = torch.randperm(4096, device="cuda")[:size]
        rows[size // 2] = 123
        assert torch.equal(run(rows)[size // 2], alone), size


@triton.jit
def copy_late_kernel(x_ptr, out_ptr, num_values, LET_NEXT_START: tl.constexpr, BLOCK: tl.constexpr):
    """out = x, 50 us after the next kernel may start."""
    if LET_NEXT_START:
        gdc_launch_dependents()
    start = globaltimer()
    while globaltimer() - start < 50_000:
        pass
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < num_values
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=mask), mask=mask)


def copy_late(x, out):
    copy_late_kernel[(triton.cdiv(x.numel(), 1 << 14),)](
        x, out, x.numel(), LET_NEXT_START=dispatch.is_hopper(x), BLOCK=1 << 14, num_warps=16
    )


class LinearsWithAdapters:
    """h += W_o qkv' for qkv' = W_qkv x', layer after layer, where ' adds a linear's adapters.

    The layers share their buffers, which are NaN from layer to layer, and x comes late.
    """

    def __init__(self, num_rows, num_layers):
        self.xs = torch.randn(num_layers, num_rows, 2880, device="cuda").bfloat16()
        self.slots = random_slots(num_rows, 3)
        self.slots[0] = 0
        self.rows = rows_of(self.slots, 3)
        self.weights = [
            [torch.randn(*shape, device="cuda").bfloat16() / 64 for shape in (QKV, OUTPUT)]
            for _ in range(num_layers)
        ]
        self.adapters = [gpu_adapters([[16, 64, 8]] * 3, 2880, (4096, 512, 512)),
                         gpu_adapters([[16, 64, 8]], 5120, (2880,))]  # fmt: skip
        self.parts = [low_rank_parts(take("cuda"), n, num_rows, 64) for n in (3, 1)]
        self.x = torch.empty_like(self.xs[0])
        self.qkv = self.x.new_empty(num_rows, 5120)

    def run(self, h, after_linear, then=lambda: None):
        """Change h in place; `then` is called after each launch."""
        for xs, weights in zip(self.xs, self.weights, strict=True):
            for buffer in (self.x, self.qkv, *self.parts):
                buffer.fill_(float("nan"))
            copy_late(xs, self.x)
            then()
            for i, (x, residual, out) in enumerate(((self.x, None, self.qkv), (self.qkv, h, h))):
                linear(x, weights[i], None, residual, out)
                then()
                call = self.adapters[i].site, self.adapters[i].memory, self.rows, self.parts[i]
                add_lora_kernel(out, x, *call, after_linear)
                then()


@gpu
@pytest.mark.parametrize("num_rows", [1, 16, 32, 64, 128, 512, 1500])
def test_early_kernels_read_what_is_there(num_rows):
    """Kernels that start before the one before has ended, against one at a time."""
    layers = LinearsWithAdapters(num_rows, 4)
    start = torch.randn(num_rows, 2880, device="cuda").bfloat16()
    h, expected = start.clone(), start.clone()
    layers.run(expected, False, torch.cuda.synchronize)
    assert expected.isfinite().all()
    layers.run(h, True)
    assert torch.equal(h, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        h.copy_(start)
        layers.run(h, True)
    for replay in range(30):
        graph.replay()
        assert torch.equal(h, expected), replay


@gpu
def test_without_a_linear_before_it_x_must_be_awaited():
    """And a kernel that does not is too early, which the test before would show."""
    adapters = gpu_adapters([[16, 64, 8]], 2880, (2880,))
    source = torch.randn(16, 2880, device="cuda").bfloat16()
    x, slots = torch.empty_like(source), torch.zeros(16, dtype=torch.int32, device="cuda")
    parts = low_rank_parts(take("cuda"), 1, 16, 64)
    call = adapters.site, adapters.memory, rows_of(slots, 3), parts

    def run(after_linear):
        y = torch.zeros_like(source)
        x.fill_(float("nan"))
        copy_late(source, x)
        return add_lora_kernel(y, x, *call, after_linear)

    assert run(False).isfinite().all()  # and the kernels are loaded
    if dispatch.is_hopper(x):  # from a graph: launched one by one, the second would be late
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run(True)
        graph.replay()
        assert y.isnan().any()


@gpu
def test_embedding():
    adapters = gpu_adapters([[8, 64, 0]], 20108, (2880,))
    adapters.site.scale.mul_(20108**0.5)  # the sum of x A^T has one term
    slots = random_slots(300, 3)
    tokens = torch.randint(20108, (300,), device="cuda")
    y = torch.randn(300, 2880, device="cuda").bfloat16()
    parts = low_rank_parts(take("cuda"), 1, 300, 64)
    call = adapters.site, adapters.memory, rows_of(slots, 3), parts
    out = add_lora_embedding_kernel(y.clone(), tokens, *call)
    check_rows(out, y, torch.nn.functional.one_hot(tokens, 20108), adapters, slots, 0.02)


@gpu
@pytest.mark.parametrize("num_tokens", [2, 16, 100, 300])
@pytest.mark.parametrize("num_experts", [32, 128])
def test_router(num_tokens, num_experts):
    check_router(num_tokens, 2880, num_experts, [64, 0, 8, 200], "cuda", torch.bfloat16, 0.03)


@pytest.fixture(scope="module")
def layer():
    """gpt-oss's experts with adapters of many ranks: both matmuls, only one of them, neither."""
    weights = Weights(32, 2880, 2880)
    ranks = ([64, 16, 8, 0, 1, 0, 200], [64, 16, 8, 32, 0, 0, 512])
    biases = (weights.gate_up_bias, weights.down_bias)
    adapters = LayerAdapters(weights, *ranks, "cuda", torch.bfloat16)
    return adapters, biases, weights.kernel_weights()


def run_and_base(layer, x, ids, weights, slots):
    """The layer with adapters and without."""
    adapters, biases, kernel_weights = layer
    tiles = choose(Problem(ids.numel(), adapters.weights.num_experts))
    out = adapters.run(x, ids, weights, slots, tiles, biases, kernel_weights)
    base = run_layer(x, ids, weights, kernel_weights, biases, tiles, adapters.weights.num_experts)
    return out, base


@gpu
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 16, 64, 128, 300, 1000, 4096])
@pytest.mark.parametrize("top_k", [1, 4, 8])
def test_experts(layer, num_tokens, top_k):
    if top_k != 4 and num_tokens > 300:
        pytest.skip("one top_k is enough for many tokens")
    x = torch.randn(num_tokens, 2880, device="cuda").bfloat16()
    ids, weights = routing(num_tokens, 32, top_k, "cuda")
    slots = random_slots(num_tokens, 7)
    slots[0] = 0
    out, base = run_and_base(layer, x, ids, weights, slots)
    largest, rms = errors(out, layer[0].reference(x, ids, weights, slots))
    assert largest < 0.05  # among millions of sums whose terms were rounded
    assert rms < 0.005
    assert torch.equal(out[slots < 0], base[slots < 0])
    assert torch.equal(out[slots == 5], base[slots == 5])  # an adapter of nothing here
    assert (out[slots == 0] != base[slots == 0]).any(1).all()


@gpu
@pytest.mark.parametrize("num_tokens", [1, 50, 2000])
def test_no_adapter_in_the_batch(layer, num_tokens):
    x = torch.randn(num_tokens, 2880, device="cuda").bfloat16()
    ids, weights = routing(num_tokens, 32, 4, "cuda")
    slots = torch.full((num_tokens,), -1, dtype=torch.int32, device="cuda")
    out, base = run_and_base(layer, x, ids, weights, slots)
    assert torch.equal(out, base)


@gpu
def test_a_token_has_the_same_bits_in_every_batch(layer):
    x = torch.randn(4096, 2880, device="cuda").bfloat16()
    ids, weights = routing(4096, 32, 4, "cuda")
    slots = random_slots(4096, 7)
    slots[1234] = 0

    def run(rows):
        return run_and_base(layer, x[rows], ids[rows], weights[rows], slots[rows])

    alone, alone_base = run(torch.tensor([1234], device="cuda"))
    assert not torch.equal(alone, alone_base)
    for size in (2, 5, 16, 17, 33, 64, 100, 128, 200, 256, 257, 500, 1000, 2000, 4096):
        rows = torch.randperm(4096, device="cuda")[:size]
        rows[size // 2] = 1234
        out, base = run(rows)
        assert torch.equal(out[size // 2], alone[0]), size
        none = slots[rows] < 0
        assert torch.equal(out[none], base[none]), size


@gpu
@pytest.mark.parametrize("rank", [8, 16, 32, 64])
def test_many_tokens_have_the_bits_of_few(layer, rank):
    """Each rank is another kernel, in which ptxas hands out the registers in another way."""
    adapters, biases, kernel_weights = layer
    adapters = LayerAdapters(adapters.weights, [rank] * 3, [rank] * 3, "cuda", torch.bfloat16)
    x = torch.randn(4096, 2880, device="cuda").bfloat16()
    ids, weights = routing(4096, 32, 4, "cuda")
    slots = random_slots(4096, 3)

    def run(rows):
        tiles = choose(Problem(ids[rows].numel(), 32))
        call = x[rows], ids[rows], weights[rows], slots[rows], tiles, biases, kernel_weights
        return adapters.run(*call)

    few = torch.cat([run(slice(i, i + 64)) for i in range(0, 4096, 64)])
    assert few.isfinite().all()
    for size in (128, 256, 512, 1024, 2048, 4096):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # kernels start beside the one before
            out = run(slice(size))
        for repeat in range(20):
            graph.replay()
            assert torch.equal(out, few[:size]), (size, repeat)


@gpu
@pytest.mark.parametrize("rank", [16, 32, 64])
@pytest.mark.parametrize("num_slots", [4, 6, 16])
@pytest.mark.parametrize("top_k", [6, 12])
def test_grid_of_100_tokens(rank, num_slots, top_k):
    check_dense_experts(100, top_k, 64, [rank] * num_slots)


@gpu
@pytest.mark.parametrize("num_tokens", [1, 2, 4, 8])
@pytest.mark.parametrize(("num_experts", "rank"), [(64, 16), (128, 32)])
@pytest.mark.parametrize(("top_k", "num_slots"), [(1, 4), (2, 8)])
def test_grid_of_few_tokens(num_tokens, num_experts, rank, top_k, num_slots):
    check_dense_experts(num_tokens, top_k, num_experts, [rank] * num_slots)


@gpu
@pytest.mark.parametrize("num_tokens", [16, 100])
@pytest.mark.parametrize("ranks", [[4, 8], [128, 256], [1, 512, 0, 40]])
def test_grid_of_small_and_large_ranks(num_tokens, ranks):
    check_dense_experts(num_tokens, 4, 8, ranks)


def check_dense_experts(num_tokens, top_k, num_experts, ranks, out_features=1408):
    """One matmul of bfloat16 experts with adapters, and the same rows without them."""
    in_features = 2048
    adapters = gpu_adapters([ranks], in_features, (out_features,), num_experts)
    shape = num_experts, out_features
    weight = (torch.randn(*shape, in_features, device="cuda") / in_features**0.5).bfloat16()
    bias = torch.randn(shape, device="cuda").bfloat16()
    x = torch.randn(num_tokens, in_features, device="cuda").bfloat16()
    ids, _ = routing(num_tokens, num_experts, top_k, "cuda")
    slots = random_slots(num_tokens, len(ranks))
    tile = Tile(16, 64, 64)
    buffers = routing_kernel.allocate(
        num_tokens, in_features, num_experts, top_k, 16, x.dtype, "cuda"
    )
    sort = sort_kernel.sort(ids, range(num_experts), buffers, 16)
    parts = pair_parts(take("cuda"), ids.numel(), max(ranks))
    low_rank = shrink_experts(
        x, adapters.site, adapters.memory, slots, sort, 16, top_k, True, parts
    )
    base, out = (torch.empty(ids.numel(), out_features, device="cuda").bfloat16() for _ in "12")
    call = DenseWeight(weight, RowOrder.PLAIN), bias, sort, tile
    grouped_matmul(x, *call, base, top_k, gather=True)
    grouped_matmul(x, *call, out, top_k, gather=True, low_rank=low_rank)
    pair = sort.slots.long()
    token, expert = pair // top_k, ids.flatten()[pair].long()
    exact = torch.empty(out.shape, dtype=torch.float64, device="cuda")
    for e in expert.unique().tolist():
        rows = expert == e
        exact[rows] = x[token[rows]].double() @ weight[e].double().T + bias[e].double()
    delta_less = torch.where((slots < 0)[token][:, None], base.double(), exact)
    check_rows(out.double(), delta_less, x[token], adapters, slots[token], 0.02, expert)


@gpu
def test_one_graph_serves_every_mix(layer):
    adapters, biases, kernel_weights = layer
    tiles = choose(Problem(24 * 4, 32))
    x = torch.randn(24, 2880, device="cuda").bfloat16()
    ids, weights = routing(24, 32, 4, "cuda")
    slots = random_slots(24, 7)
    call = (x, ids, weights, slots, tiles, biases, kernel_weights)
    adapters.run(*call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = adapters.run(*call)
    for mix in ([-1] * 24, [0] * 24, [-1, 0, 6] * 8, list(range(6)) * 4):
        slots.copy_(torch.tensor(mix))
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(out, adapters.run(*call))


@gpu
def test_wrong_factors_are_rejected(layer):
    adapters, biases, kernel_weights = layer
    x = torch.randn(16, 2880, device="cuda").bfloat16()
    ids, weights = routing(16, 32, 4, "cuda")
    slots = torch.zeros(16, dtype=torch.int32, device="cuda")
    others = torch.full_like(slots, 1)
    tiles = choose(Problem(64, 32))
    out = adapters.run(x, ids, weights, others, tiles, biases, kernel_weights)
    largest, rms = errors(out, adapters.reference(x, ids, weights, slots))
    assert largest > 0.05
    assert rms > 0.005
