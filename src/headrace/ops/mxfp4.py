"""MXFP4 (OCP microscaling): 32 values of 4 bits share one power-of-two scale."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_SIZE = 32  # values that share a scale; two to a byte, so 16 bytes a block
NAN_SCALE = 0xFF
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # e2m1 codes 0..7; bit 3 is the sign
_EXPONENT_BIAS = 127  # scale byte s means 2 ** (s - 127)
_LARGEST_EXPONENT = 2  # 6.0 = 1.5 * 2 ** 2


@dataclass(frozen=True)
class MXFP4Weight:
    """A weight [..., out_features, in_features] held as a checkpoint holds it."""

    blocks: Tensor  # [..., out_features, in_features / 32, 16] uint8: value 2b low, 2b + 1 high
    scales: Tensor  # [..., out_features, in_features / 32] uint8, e8m0

    def __post_init__(self) -> None:
        _check_packed(self.blocks, self.scales)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight it stands for."""
        return (*self.scales.shape[:-1], self.scales.shape[-1] * BLOCK_SIZE)

    def rows(self, index: int | slice) -> MXFP4Weight:
        """Select along the first dimension: an expert, some experts, or some output rows."""
        return MXFP4Weight(self.blocks[index], self.scales[index])

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight as a dense tensor of `shape`."""
        return dequantize(self.blocks, self.scales, dtype)


def quantize(
    weight: Tensor,  # [..., in_features] float32 or bfloat16, finite
) -> tuple[Tensor, Tensor]:
    """Per block of 32: scale = 2 ** (floor(log2(max |w|)) - 2), codes = e2m1(w / scale).

    Rounds to the nearest code, ties to the even code; what exceeds 6 * scale becomes 6 * scale.
    Returns blocks [..., in_features / 32, 16] and scales [..., in_features / 32], both uint8.
    Raises ValueError if in_features is not a multiple of 32 or a value is not finite.
    """
    if weight.shape[-1] % BLOCK_SIZE:
        raise ValueError(f"in_features is {weight.shape[-1]}; MXFP4 needs a multiple of 32")
    if not weight.isfinite().all():
        raise ValueError("the weight has values that are not finite; MXFP4 cannot hold them")
    values = weight.double().unflatten(-1, (-1, BLOCK_SIZE))
    # frexp's mantissa lies in [0.5, 1), so its exponent is floor(log2) + 1
    exponent = values.abs().amax(-1).frexp().exponent - 1 - _LARGEST_EXPONENT
    scales = (exponent + _EXPONENT_BIAS).clamp(0, NAN_SCALE - 1)
    magnitudes = torch.ldexp(values, (_EXPONENT_BIAS - scales).unsqueeze(-1)).abs()
    codes = _nearest_code(magnitudes) + 8 * values.signbit()
    low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return (low + 16 * high).to(torch.uint8), scales.to(torch.uint8)


def dequantize(
    blocks: Tensor,  # [..., in_features / 32, 16] uint8
    scales: Tensor,  # [..., in_features / 32] uint8
    dtype: torch.dtype,  # float32 or bfloat16: both hold every MXFP4 value exactly
) -> Tensor:
    """w[32 i + j] = e2m1(code j of block i) * 2 ** (scale i - 127); scale 0xFF makes NaN.

    The low nibble of byte b is value 2b, the high nibble value 2b + 1. Scales above 252 can
    overflow to infinity, as they do in float32. Returns [..., in_features].
    """
    _check_packed(blocks, scales)
    pairs = F.embedding(blocks.int(), _pair_table(blocks.device))  # [..., 16, 2]
    scale = F.embedding(scales.int(), _scale_table(scales.device))  # [..., 1]
    return (pairs.flatten(-2) * scale).flatten(-2).to(dtype)


def _nearest_code(magnitudes: Tensor) -> Tensor:
    table = torch.tensor(_MAGNITUDES, dtype=magnitudes.dtype, device=magnitudes.device)
    middles = (table[1:] + table[:-1]) / 2
    below = torch.bucketize(magnitudes.contiguous(), middles)  # a tie stays at the lower code
    tie = (magnitudes == middles[below.clamp(max=6)]) & (below < 7)
    return below + (tie & (below % 2 == 1))


@cache
def _pair_table(device: torch.device) -> Tensor:  # [256, 2]: byte -> its two values
    values = [*_MAGNITUDES, *(-m for m in _MAGNITUDES)]
    return torch.tensor([(values[b & 15], values[b >> 4]) for b in range(256)], device=device)


@cache
def _scale_table(device: torch.device) -> Tensor:  # [256, 1]
    scales = [2.0 ** (s - _EXPONENT_BIAS) for s in range(NAN_SCALE)]
    return torch.tensor([*scales, float("nan")], device=device).unsqueeze(-1)


def _check_packed(blocks: Tensor, scales: Tensor) -> None:
    assert blocks.dtype == scales.dtype == torch.uint8, f"{blocks.dtype=} {scales.dtype=}"
    assert blocks.shape == (*scales.shape, 16), f"{blocks.shape=} {scales.shape=}"
