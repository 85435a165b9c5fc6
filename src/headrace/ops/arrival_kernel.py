# mypy: disable-error-code="no-untyped-def"
"""Programs of one launch that wait for nobody: the last to arrive goes on with what all wrote."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def arrive(counter_ptr, total):
    """Count this program in, after all its writes; true for the last, which zeroes the counter.

    What other programs wrote must then be read past L1 (cache_modifier=".cg").
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == total - 1
    if last:
        tl.store(counter_ptr, 0)
    return last
