"""Low-rank deltas through the kernels against float64, here and on a GPU."""

import pytest
import torch

from headrace.ops.lora import LoraRows, LoraSite
from headrace.ops.lora_kernel import add_lora_kernel, low_rank_parts, shrink_experts
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


@interpreted
@pytest.mark.parametrize("slot_of_row", [[2, -1, 0, 2, 1], [-1, -1], [1] * 70])
def test_interpreted_dense(slot_of_row):
    adapters = Adapters(
        [[8, 3, 16], [1, 0, 20], [40, 5, 0]], 160, (96, 32, 80), 1, "cpu", torch.float32
    )
    slots = torch.tensor(slot_of_row)
    x = torch.randn(len(slots), 160)
    y = torch.randn(len(slots), 208)
    parts = low_rank_parts(take("cpu"), 3, len(slots), 64)
    out = add_lora_kernel(y.clone(), x, adapters.site, adapters.memory, rows_of(slots, 3), parts)
    for row, slot in enumerate(slot_of_row):
        if slot < 0:
            assert torch.equal(out[row], y[row])
        else:
            expected = y[row].double() + adapters.delta(x[row, None], slot)[0]
            torch.testing.assert_close(out[row].double(), expected, rtol=1e-5, atol=1e-5)


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
