# mypy: disable-error-code="no-untyped-def"
"""Many small arrays from one pinned block of the host to their places on the GPU, in one launch.

The kernel reads the host's memory itself. Copies one by one leave the GPU idle for 2 to 5 us each,
and as long again where kernels follow on copies.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 3  # of the table: first word in the block, address on the GPU, number of words
BLOCK = 1024  # words that a program moves


@triton.jit
def move_kernel(
    table_ptr,  # [num_arrays, 3] int64
    block_ptr,  # [num_words] int32
    BLOCK: tl.constexpr,
):
    """target[i] = block[first + i] for BLOCK words of one array."""
    table_ptr += tl.program_id(0) * 3
    first, target = tl.load(table_ptr), tl.load(table_ptr + 1)
    num_words = tl.load(table_ptr + 2)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < num_words
    words = tl.load(block_ptr + first + i, mask=mask)
    tl.store(target.to(tl.pointer_type(tl.int32)) + i, words, mask=mask)


def move(
    table: Tensor,  # [num_arrays, 3] int64, pinned
    block: Tensor,  # [num_words] int32, pinned
    most_words: int,  # of an array
) -> None:
    """Write each array of `block` to the address that `table` has for it."""
    grid = len(table), triton.cdiv(most_words, BLOCK)
    if len(table) and most_words:
        move_kernel[grid](table, block, BLOCK=BLOCK)
