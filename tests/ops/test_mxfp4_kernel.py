"""The GPU layout of MXFP4: its inverse, its padding, and the decode of every byte and scale."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from headrace.ops import mxfp4
from headrace.ops.mxfp4_kernel import PREPARED_AT_ONCE, RowOrder, prepare, restore, row_map


class CountedOps(TorchDispatchMode):
    """Counts torch's operations."""

    number = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.number += 1
        return op(*args, **(kwargs or {}))


def random_packed(num_experts, rows, blocks, largest_scale=254, device="cpu"):
    shape = (num_experts, rows, blocks)
    return (
        torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, device=device),
        torch.randint(0, largest_scale + 1, shape, dtype=torch.uint8, device=device),
    )


def decode_words(weight):
    """Values [num_experts, rows, columns] by the bits that mxfp4_kernel's layout promises."""
    experts, tiles_n, units_k, _ = weight.words.shape
    word = weight.words.view(experts, tiles_n, units_k, 4, 8, 4, 2, 2).long()
    sources = [(15, (8, 7, 6)), (12, (5, 4, 3)), (9, (2, 1, 0)), (14, (13, 11, 10))]
    halves = []
    for half in (0, 16):
        values = []
        for sign, magnitude in sources:
            code = sum(((word >> (m + half)) & 1) << (2 - i) for i, m in enumerate(magnitude))
            value = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)[code]
            values.append(torch.where((word >> (sign + half)) & 1 == 1, -value, value))
        halves.append(torch.stack(values, -1))
    value = torch.stack(halves, -1)  # [experts, nt, ku, w, hi, lo, r8, b, byte, half]
    value = value.permute(0, 1, 3, 6, 4, 2, 7, 8, 5, 9)
    value = value.reshape(experts, tiles_n * 64, units_k * 2, 32)
    exponents = weight.scales.transpose(2, 3).clone(memory_format=torch.contiguous_format)
    exponents = exponents.view(experts, tiles_n * 64, -1)
    power = exponents.view(torch.uint8).double() - 126 - 127 + weight.exponent
    return (value * torch.exp2(power)[..., None]).flatten(-2)


@pytest.mark.parametrize("order", RowOrder)
@pytest.mark.parametrize(("rows", "blocks"), [(64, 4), (136, 5), (2, 1), (200, 7)])
def test_restore_is_the_inverse_of_prepare(order, rows, blocks):
    packed = random_packed(3, rows, blocks)
    for got, expected in zip(restore(prepare(*packed, order)), packed, strict=True):
        assert torch.equal(got, expected)


def test_experts_are_prepared_many_at_once():
    """Each op waits for Python while other threads compile kernels: 54,000 took 10 s."""
    some, all_but_one = (random_packed(n, 70, 3, 120) for n in (1, 2 * PREPARED_AT_ONCE - 1))
    with CountedOps() as one:
        prepare(*some)
    with CountedOps() as two:
        weight = prepare(*all_but_one)
    assert two.number < 2 * one.number
    for i in range(weight.num_experts):
        alone = prepare(*(part[i : i + 1] for part in all_but_one))
        assert torch.equal(weight.words[i], alone.words[0])
        assert torch.equal(weight.scales[i], alone.scales[0])


@pytest.mark.parametrize("order", RowOrder)
@pytest.mark.parametrize("largest_scale", [100, 128, 129, 254])
def test_the_words_mean_the_checkpoint_values(order, largest_scale):
    blocks, scales = random_packed(2, 90, 5, largest_scale)
    weight = prepare(blocks, scales, order)
    rows = row_map(90, order)
    expected = torch.zeros(2, 91, 256, dtype=torch.float64)
    nibbles = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).long()
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    values = torch.cat([table, -table])[nibbles]
    expected[:, :-1, :160] = (values * torch.exp2(scales.double() - 127)[..., None]).flatten(-2)
    assert torch.equal(decode_words(weight), expected[:, rows])


def test_gate_and_up_lie_eight_rows_apart():
    rows = row_map(128, RowOrder.INTERLEAVED)
    assert rows[:20].tolist() == [*range(0, 16, 2), *range(1, 16, 2), 16, 18, 20, 22]
    rows = row_map(128, RowOrder.HALVES)
    assert rows[:20].tolist() == [*range(8), *range(64, 72), 8, 9, 10, 11]


def test_a_nan_scale_is_refused():
    blocks, scales = random_packed(1, 64, 4)
    scales[0, 5, 1] = 0xFF
    with pytest.raises(ValueError, match="0xFF"):
        prepare(blocks, scales)


@pytest.mark.gpu
def test_prepare_on_the_gpu_is_the_same():
    blocks, scales = random_packed(4, 5760, 90, 130)
    here = prepare(blocks, scales, RowOrder.INTERLEAVED)
    there = prepare(blocks.cuda(), scales.cuda(), RowOrder.INTERLEAVED)
    assert torch.equal(here.words, there.words.cpu())
    assert torch.equal(here.scales, there.scales.cpu())
    back = restore(there)
    assert torch.equal(back[0].cpu(), blocks)
    assert torch.equal(
        mxfp4.dequantize(*back, torch.float32).cpu(),
        mxfp4.dequantize(blocks, scales, torch.float32),
    )
