from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from headrace.ops.mxfp4 import MXFP4Weight, dequantize, quantize

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
EVERY_BYTE = torch.arange(256, dtype=torch.uint8).view(16, 16)  # 16 blocks


def value_of(code: int, scale: int) -> float:
    """The format's definition, in Python's float64."""
    return math.copysign(E2M1[code & 7], -1 if code & 8 else 1) * 2.0 ** (scale - 127)


def random_weight(*shape: int, std: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * std


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0, 1, 2, 100, 126, 127, 128, 200, 252])
def test_every_byte_at_many_scales_is_exact(scale: int, dtype: torch.dtype) -> None:
    scales = torch.full((16,), scale, dtype=torch.uint8)
    decoded = dequantize(EVERY_BYTE, scales, dtype)
    codes = [nibble for byte in range(256) for nibble in (byte & 15, byte >> 4)]
    expected = torch.tensor([value_of(c, scale) for c in codes], dtype=torch.float64)
    assert decoded.dtype == dtype
    assert torch.equal(decoded.double().flatten(), expected)
    assert torch.equal(decoded.signbit().flatten(), expected.signbit())


def test_the_low_nibble_is_the_even_value() -> None:
    blocks = torch.zeros(1, 16, dtype=torch.uint8)
    blocks[0, 3] = 0x2F  # low 0xF = -6, high 0x2 = 1
    decoded = dequantize(blocks, torch.tensor([128], dtype=torch.uint8), torch.float32)
    expected = torch.zeros(32)
    expected[6], expected[7] = -12.0, 2.0
    assert torch.equal(decoded, expected)


def test_scale_255_is_nan_in_its_block_only() -> None:
    scales = torch.tensor([127, 255], dtype=torch.uint8)
    decoded = dequantize(torch.zeros(2, 16, dtype=torch.uint8), scales, torch.bfloat16)
    assert decoded[:32].eq(0).all()
    assert decoded[32:].isnan().all()


def test_what_the_format_holds_survives_a_round_trip() -> None:
    exact = dequantize(*quantize(random_weight(3, 8, 96, std=0.02)), torch.float32)
    assert torch.equal(dequantize(*quantize(exact), torch.float32), exact)
    assert exact.count_nonzero() > 0.8 * exact.numel()


def test_quantize_takes_the_nearest_value_of_the_block_scale() -> None:
    """By brute force over the 16 codes, in float64."""
    weight = random_weight(64, 64)
    blocks, scales = quantize(weight)
    largest = weight.view(64, 2, 32).abs().amax(-1).double()
    assert torch.equal(scales, (largest.log2().floor() - 2 + 127).byte())
    grid = torch.tensor([value_of(c, 127) for c in range(16)], dtype=torch.float64)
    grid = grid * (2.0 ** (scales.double() - 127))[..., None, None]
    nearest = (weight.view(64, 2, 32, 1) - grid).abs().amin(-1)
    error = (weight - dequantize(blocks, scales, torch.float32)).abs().view(64, 2, 32)
    assert_close(error.double(), nearest, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("value", "rounded"),
    [(0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0)],
)
def test_ties_go_to_the_even_code(value: float, rounded: float) -> None:
    weight = torch.zeros(32)
    weight[0], weight[1], weight[2] = 4.0, value, -value  # the first sets the scale to 1
    decoded = dequantize(*quantize(weight), torch.float32)
    assert decoded[:3].tolist() == [4.0, rounded, -rounded]


def test_values_beyond_six_saturate() -> None:
    weight = torch.full((32,), 7.9)
    assert dequantize(*quantize(weight), torch.float32).eq(6.0).all()


def test_blocks_of_zeros_and_tiny_values() -> None:
    weight = torch.zeros(2, 32)
    weight[1] = 1e-44  # below half of the smallest value, 2^-128
    assert dequantize(*quantize(weight), torch.float32).eq(0).all()


@pytest.mark.parametrize("size", [31, 33, 48])
def test_other_sizes_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"in_features is {size}.*multiple of 32"):
        quantize(torch.zeros(4, size))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        quantize(torch.tensor([value] * 32))


def test_rows_of_a_weight() -> None:
    packed = MXFP4Weight(*quantize(random_weight(4, 6, 64)))
    dense = packed.dequantize(torch.float32)
    assert packed.shape == dense.shape == (4, 6, 64)
    assert torch.equal(packed.rows(2).dequantize(torch.float32), dense[2])
    assert torch.equal(packed.rows(2).rows(slice(1, 5)).dequantize(torch.float32), dense[2, 1:5])
    with pytest.raises(AssertionError, match=r"blocks\.shape"):
        MXFP4Weight(packed.blocks[:3], packed.scales)


@pytest.mark.parametrize("wrong", ["nibbles", "scales", "shift"])
def test_a_wrong_decoder_is_noticed(wrong: str) -> None:
    blocks, scales = quantize(random_weight(16, 64) * torch.logspace(-2, 2, 16)[:, None])
    right = dequantize(blocks, scales, torch.float32)
    if wrong == "nibbles":
        blocks = (blocks >> 4) | (blocks << 4)
    elif wrong == "scales":
        scales = scales.flip(0)
    else:
        blocks = blocks.roll(1, dims=-1)
    with pytest.raises(AssertionError):
        assert_close(dequantize(blocks, scales, torch.float32), right)
