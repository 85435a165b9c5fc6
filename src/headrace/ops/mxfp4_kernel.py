# mypy: disable-error-code="no-untyped-def"
"""MXFP4 on the GPU: the layout the expert matmul reads, and the decode of one of its words.

A weight [num_experts, out_features, in_features] is cut into tiles of 64 rows x 64 columns, each
2,048 contiguous bytes: the two words that thread t of a warpgroup needs as its part of a tensor
core's first operand, for its two rows, then those of thread t + 1. So a load is 16 bytes a thread,
one after the other, and decoded values are where the matrix instruction wants them.
Within a word the bits lie so that one shift and one mask make two bfloat16 values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_N = 64
TILE_K = 128  # one 32-bit word holds the four scales of a row
PREPARED_AT_ONCE = 8  # experts: few launches, and 0.4 GB on the way for those of gpt-oss
_EXPONENT_SHIFT = 126  # a nibble's exponent and mantissa moved to bfloat16's field lose 2 ** 126
_LARGEST_DIRECT_SCALE = 128  # larger ones would leave bfloat16's exponent with that factor put back


class RowOrder(IntEnum):
    """How gate and up rows lie in the checkpoint; the tile puts each pair 8 rows apart."""

    PLAIN = 0  # no pairs
    INTERLEAVED = 1  # rows 2i and 2i + 1
    HALVES = 2  # rows i and out_features / 2 + i


@dataclass(frozen=True)
class PreparedMXFP4:
    """An MXFP4 weight in the GPU layout."""

    words: Tensor  # [num_experts, tiles_n, 2 * tiles_k, 512] int32
    scales: Tensor  # [num_experts, tiles_n, tiles_k, 64] int32: four exponents of 8 bits
    out_features: int
    in_features: int
    row_order: RowOrder
    exponent: int  # the decoded value times 2 ** exponent is the weight

    @property
    def num_experts(self) -> int:
        """Experts held."""
        return self.words.shape[0]

    def expert(self, index: int) -> PreparedMXFP4:
        """One of them, as a weight of one expert."""
        chosen = slice(index, index + 1)
        return replace(self, words=self.words[chosen], scales=self.scales[chosen])


def prepare(
    blocks: Tensor,  # [num_experts, out_features, in_features / 32, 16] uint8
    scales: Tensor,  # [num_experts, out_features, in_features / 32] uint8, e8m0
    row_order: RowOrder = RowOrder.PLAIN,
) -> PreparedMXFP4:
    """Checkpoint layout -> GPU layout; `restore` is its inverse.

    Rows are padded to 64 and columns to 128 with zeros. Raises ValueError for a scale of 0xFF
    (NaN), which no sound checkpoint has.
    """
    num_experts, out_features, num_blocks, _ = blocks.shape
    largest = int(scales.max())
    if largest == 0xFF:
        raise ValueError("scales has 0xFF (NaN); quantize the weight again")
    exponent = max(0, largest - _LARGEST_DIRECT_SCALE)
    tiles_k = triton.cdiv(num_blocks * 32, TILE_K)
    rows = row_map(out_features, row_order).to(blocks.device)
    words = blocks.new_empty((num_experts, len(rows) // 64, tiles_k * 2, 512), dtype=torch.int32)
    packed = blocks.new_empty((num_experts, len(rows) // 64, tiles_k, 64), dtype=torch.int32)
    table = _word_table().to(blocks.device)
    for first in range(0, num_experts, PREPARED_AT_ONCE):
        experts = slice(first, first + PREPARED_AT_ONCE)
        words[experts] = _tile_words(blocks[experts], rows, tiles_k, table)
        shifted = scales[experts].int() + (_EXPONENT_SHIFT - exponent)
        packed[experts] = _tile_scales(shifted.to(torch.uint8), rows, tiles_k)
    return PreparedMXFP4(words, packed, out_features, num_blocks * 32, row_order, exponent)


def _tile_words(blocks: Tensor, rows: Tensor, tiles_k: int, table: Tensor) -> Tensor:
    """[num_experts, tiles_n, 2 * tiles_k, 512] int32."""
    data = _gather(blocks, rows, tiles_k)
    # w, r8, hi: the row in its tile; b: block; i, lo: byte in its block
    data = data.view(len(blocks), -1, 4, 2, 8, tiles_k * 2, 2, 4, 4)
    word = table[0][data[..., 0, :].int()]  # [experts, nt, w, r8, hi, ku, b, lo]
    for i in range(1, 4):
        word += table[i][data[..., i, :].int()]
    word = word.permute(0, 1, 5, 2, 4, 7, 3, 6)
    return word.reshape(len(blocks), -1, tiles_k * 2, 512)


def _tile_scales(scales: Tensor, rows: Tensor, tiles_k: int) -> Tensor:
    """[num_experts, tiles_n, tiles_k, 64] int32."""
    four = _gather(scales, rows, tiles_k).view(torch.int32)  # [experts, rows, tiles_k]
    return four.view(len(scales), -1, 64, tiles_k).transpose(2, 3)


def _gather(x: Tensor, rows: Tensor, tiles_k: int) -> Tensor:
    """x[:, rows] of [num_experts, out_features, blocks, ...], padded with zeros."""
    num_experts, out_features, num_blocks, *rest = x.shape
    padded = x.new_zeros(num_experts, out_features + 1, tiles_k * 4, *rest)
    padded[:, :-1, :num_blocks] = x
    return padded[:, rows]


def restore(weight: PreparedMXFP4) -> tuple[Tensor, Tensor]:
    """GPU layout -> checkpoint layout: the blocks and scales that `prepare` was given."""
    num_experts, tiles_n, units_k, _ = weight.words.shape
    rows = row_map(weight.out_features, weight.row_order).to(weight.words.device)
    kept = rows < weight.out_features
    num_blocks = weight.in_features // 32
    word = weight.words.view(num_experts, tiles_n, units_k, 4, 8, 4, 2, 2)
    word = word.permute(0, 1, 3, 6, 4, 2, 7, 5)  # [experts, nt, w, r8, hi, ku, b, lo]
    data = torch.stack([_byte_of_word(word, i) for i in range(4)], -2)
    data = data.reshape(num_experts, tiles_n * 64, units_k * 2, 16)[:, kept, :num_blocks]
    packed = weight.scales.transpose(2, 3).clone(memory_format=torch.contiguous_format)
    packed = packed.view(num_experts, tiles_n * 64, -1)
    shifted = packed.view(torch.uint8)[:, kept, :num_blocks].int()
    blocks, scales = torch.empty_like(data), torch.empty_like(shifted)
    blocks[:, rows[kept]] = data
    scales[:, rows[kept]] = shifted - (_EXPONENT_SHIFT - weight.exponent)
    return blocks, scales.to(torch.uint8)


def row_map(out_features: int, row_order: RowOrder) -> Tensor:  # [tiles_n * 64]
    """Checkpoint row of each row of the tiles; out_features stands for a row of padding."""
    row = torch.arange(triton.cdiv(out_features, TILE_N) * TILE_N)
    if row_order == RowOrder.PLAIN:
        return row.clamp(max=out_features)
    second = row // 8 % 2
    pair = row // 16 * 8 + row % 8
    source = 2 * pair + second
    if row_order == RowOrder.HALVES:
        source = pair + second * (out_features // 2)
    return torch.where(pair < out_features // 2, source, out_features)


def _word_table() -> Tensor:  # [4, 256] int32
    """The bits of a word that byte i of four holds: low nibble in the low half, high in the high.

    Per half, as 4-bit masks at their shifts: byte 0 has sign 15 and magnitude 8..6; bytes 1 and 2
    the same 3 and 6 lower; byte 3 takes what is left: sign 14, magnitude 13, 11, 10.
    """
    nibble = torch.arange(16, dtype=torch.int64)
    half = [((nibble & 8) << (12 - 3 * i)) | ((nibble & 7) << (6 - 3 * i)) for i in range(3)]
    half.append(((nibble & 12) << 11) | ((nibble & 3) << 10))
    byte = torch.arange(256)
    table = torch.stack([h[byte & 15] | (h[byte >> 4] << 16) for h in half])
    return torch.where(table >= 2**31, table - 2**32, table).to(torch.int32)


def _byte_of_word(word: Tensor, i: int) -> Tensor:
    def nibble(half: Tensor) -> Tensor:
        if i == 3:
            return ((half >> 11) & 12) | ((half >> 10) & 3)
        return ((half >> (12 - 3 * i)) & 8) | ((half >> (6 - 3 * i)) & 7)

    return (nibble(word & 0xFFFF) | (nibble((word >> 16) & 0xFFFF) << 4)).to(torch.uint8)


# 11 integer instructions and 4 multiplies for 8 values. A multiply is written as an fma with -0,
# which every GPU from sm_80 on has.
_DECODE_PTX = tl.constexpr("""{
.reg .b32 a, b, c, d, t, z;
mov.b32 z, 0x80008000;
and.b32 a, $8, 0x81C081C0;
shl.b32 t, $8, 3;
and.b32 b, t, 0x81C081C0;
shl.b32 t, $8, 6;
and.b32 c, t, 0x81C081C0;
shl.b32 t, $8, 1;
and.b32 d, t, 0x80008000;
shr.u32 t, $8, 5;
and.b32 t, t, 0x01000100;
or.b32 d, d, t;
shr.u32 t, $8, 4;
and.b32 t, t, 0x00C000C0;
or.b32 d, d, t;
fma.rn.bf16x2 a, a, $9, z;
fma.rn.bf16x2 b, b, $9, z;
fma.rn.bf16x2 c, c, $9, z;
fma.rn.bf16x2 d, d, $9, z;
mov.b32 {$0, $1}, a;
mov.b32 {$2, $3}, b;
mov.b32 {$4, $5}, c;
mov.b32 {$6, $7}, d;
}""")


@triton.jit
def decode_tile(
    words,  # [UNITS_N, UNITS_K, 512] int32
    scales,  # [UNITS_N, UNITS_K / 2, 64] int32
    UNITS_N: tl.constexpr,
    UNITS_K: tl.constexpr,
    DTYPE: tl.constexpr,
    PTX: tl.constexpr,
):
    """Decode tiles to [UNITS_N * 64, UNITS_K * 64] values; none leaves the thread that read it."""
    # names of the dimensions: row = (n, w, r8, hi), column = (k, c, b, step, k8, lo, pair)
    word = words.reshape(UNITS_N, UNITS_K // 2, 2, 4, 8, 4, 2, 2)  # n k c w hi lo r8 b
    scale = scales.reshape(UNITS_N, UNITS_K // 2, 1, 4, 2, 8, 1, 1)  # n k 1 w r8 hi 1 1
    scale = scale.permute(0, 1, 2, 3, 5, 6, 4, 7)  # n k 1 w hi 1 r8 1
    c = tl.arange(0, 2).reshape(1, 1, 2, 1, 1, 1, 1, 1)
    b = tl.arange(0, 2).reshape(1, 1, 1, 1, 1, 1, 1, 2)
    scale = (scale >> (c * 16 + b * 8)) & 0xFF
    v00, v01, v10, v11, v20, v21, v30, v31 = _decode_word(word, scale, DTYPE, PTX)
    low = tl.join(tl.join(v00, v01), tl.join(v10, v11))
    high = tl.join(tl.join(v20, v21), tl.join(v30, v31))
    values = tl.join(low, high)  # n k c w hi lo r8 b pair k8 step
    values = values.permute(0, 3, 6, 4, 1, 2, 7, 10, 9, 5, 8)
    return values.reshape(UNITS_N * 64, UNITS_K * 64)


@triton.jit
def _decode_word(word, exponent, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Eight values of each word, times 2 ** (exponent - 127)."""
    if PTX:
        word, scale = tl.broadcast(word, exponent * 0x00800080)
        return tl.inline_asm_elementwise(
            _DECODE_PTX,
            "=h,=h,=h,=h,=h,=h,=h,=h,r,r",
            [word, scale],
            dtype=(tl.bfloat16,) * 8,
            is_pure=True,
            pack=1,
        )
    scale = tl.exp2(exponent.to(tl.float32) - 127.0)
    return (
        _field((word & 0x1C0) >> 6, word >> 15, scale, DTYPE),
        _field((word >> 22) & 7, word >> 31, scale, DTYPE),
        _field((word >> 3) & 7, word >> 12, scale, DTYPE),
        _field((word >> 19) & 7, word >> 28, scale, DTYPE),
        _field(word & 7, word >> 9, scale, DTYPE),
        _field((word >> 16) & 7, word >> 25, scale, DTYPE),
        _field(((word >> 11) & 4) | ((word >> 10) & 3), word >> 14, scale, DTYPE),
        _field(((word >> 27) & 4) | ((word >> 26) & 3), word >> 30, scale, DTYPE),
    )


@triton.jit
def _field(magnitude, sign, scale, DTYPE: tl.constexpr):
    """The same value from three bits and a sign, for where there is no PTX (Triton on a CPU)."""
    bits = (magnitude << 22) | ((sign & 1) << 31)  # float32's field: also 2 ** 126 too small
    return (bits.to(tl.float32, bitcast=True) * 8.507059173023462e37 * (scale * 2.0**-126)).to(
        DTYPE
    )
