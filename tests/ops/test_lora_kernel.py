"""Low-rank deltas through the kernels against float64, here and on a GPU."""

import pytest
import torch

from headrace.ops.lora import LoraRows, LoraSite
from headrace.ops.lora_kernel import (
    FEW_ROWS,
    add_expert_lora_kernel,
    add_lora_embedding_kernel,
    add_lora_kernel,
    low_rank_parts,
    shrink_experts,
)
from headrace.ops.tiles import MoETiles, Tile
from tests.ops.test_experts_kernel import Weights, errors, routing, run_layer

gpu = pytest.mark.gpu
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton on a CPU")
ALIGNMENT = 128


class Adapters:
    """Random adapters of one site, in the flat memory and as float64 factors."""

    def __init__(self, ranks, in_features, widths, num_experts, device, dtype):
        """ranks: [num_segments][num_slots], 0 where an adapter leaves a segment alone."""
        self.ranks, self.widths = ranks, widths
        generator = torch.Generator(device).manual_seed(len(ranks[0]))
        chunks = [torch.full((ALIGNMENT,), float("nan"), device=device)]
        self.factors, starts = {}, ([], [])

        def place(*shape):
            values = torch.randn(shape, device=device, generator=generator)
            values = values / (in_features**0.5 if shape[-1] == in_features else 1)
            start = sum(len(c) for c in chunks)
            chunks.append(values.flatten())
            chunks.append(torch.full((-values.numel() % ALIGNMENT,), float("nan"), device=device))
            return start, values.to(dtype).double()

        for segment, width in enumerate(widths):
            for slot, rank in enumerate(ranks[segment]):
                a = place(num_experts, rank, in_features) if rank else (-1, None)
                b = place(num_experts, rank, width) if rank else (-1, None)
                starts[0].append(a[0])
                starts[1].append(b[0])
                self.factors[segment, slot] = (a[1], b[1])
        table = torch.tensor(ranks, dtype=torch.int32, device=device)
        a, b = (torch.tensor(s, device=device).view(table.shape) for s in starts)
        self.scale = 0.5 + torch.rand(table.shape, device=device, generator=generator)
        self.memory = torch.cat(chunks).to(dtype)
        self.site = LoraSite(in_features, tuple(widths), num_experts, a, b, table, self.scale)

    def delta(self, x, slot, expert=0):
        """[rows, sum(widths)] float64 for rows of one adapter."""
        parts = []
        for segment, width in enumerate(self.widths):
            a, b = self.factors[segment, slot]
            if a is None:
                parts.append(x.new_zeros(len(x), width, dtype=torch.float64))
            else:
                u = x.double() @ a[expert].T * self.scale[segment, slot].double()
                parts.append(u @ b[expert])
        return torch.cat(parts, 1)


def rows_of(slot_of_row, num_slots):
    slot_of_row = slot_of_row.int()
    key = torch.where(slot_of_row < 0, num_slots, slot_of_row)
    counts = key.bincount(minlength=num_slots + 1)[:num_slots].tolist()
    used = [s for s in range(num_slots) if counts[s]]
    starts = [sum(counts[s] for s in used[:i]) for i in range(len(used) + 1)]
    starts += [starts[-1]] * (num_slots - len(used))
    used += [-1] * (num_slots - len(used))
    ints = {"dtype": torch.int32, "device": slot_of_row.device}
    order = key.argsort(stable=True).int()
    return LoraRows(slot_of_row, order, torch.tensor(used, **ints), torch.tensor(starts, **ints))


def take(device):
    return lambda shape, dtype: torch.full(shape, float("nan"), dtype=dtype, device=device)


def check_rows(out, y, x, adapters, slot_of_row, limit, expert_of_row=None):
    """Rows with an adapter have its delta, within limit of the largest; the others their bits."""
    expected = y.double()
    for row, slot in enumerate(slot_of_row.tolist()):
        if slot >= 0:
            expert = 0 if expert_of_row is None else int(expert_of_row[row])
            expected[row] += adapters.delta(x[row, None], slot, expert)[0]
    none = slot_of_row < 0
    assert torch.equal(out[none], y[none])
    delta = expected - y.double()
    error = (out.double() - expected)[~none]
    if len(error):
        assert error.abs().max() < limit * delta.abs().max()
        assert error.pow(2).mean() < (limit / 5) ** 2 * delta[~none].pow(2).mean()


@interpreted
@pytest.mark.parametrize("slot_of_row", [[2, -1, 0, 2, 1], [-1, -1], [1] * 70])
def test_interpreted_dense(slot_of_row):
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


@interpreted
def test_interpreted_one_part_has_the_bits_of_many():
    """Above FEW_ROWS rows, one program sums all slices of K, in the order of the expand."""
    adapters = Adapters([[8, 20]], 1100, [64], 1, "cpu", torch.float32)
    slots = torch.tensor([1, -1, 0, 0, 1])
    x, y = torch.randn(5, 1100), torch.randn(5, 64)
    many = low_rank_parts(take("cpu"), 1, 5, 20)
    one = low_rank_parts(take("cpu"), 1, FEW_ROWS + 1, 20)[:, :, :5].contiguous()
    assert (len(many), len(one)) == (4, 1)
    call = (x, adapters.site, adapters.memory, rows_of(slots, 2))
    out = add_lora_kernel(y.clone(), *call, many)
    assert torch.equal(add_lora_kernel(y.clone(), *call, one), out)
    check_rows(out, y, x, adapters, slots, 1e-5)


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
            parts = low_rank_parts(take(x.device), 1, ids.numel(), self.max_rank)
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
            out = x.new_zeros(len(x), sum(adapters.widths), dtype=torch.float64)
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
