# mypy: disable-error-code="no-untyped-def"
"""Programs of one launch that count each other.

The last to arrive goes on with what all wrote; or others wait for them. These must have lower ids
than those that wait, and wait for nobody in the launch: a GPU starts programs in the order of their
ids, so whoever waits was started after all that it waits for, and they end whatever it does. What
other programs wrote must be read past L1 (cache_modifier=".cg").
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def count_in(counter_ptr, unit=1):
    """Add a unit for this program, after all its writes; returns what the counter was."""
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, unit, sem="acq_rel", scope="gpu")


@triton.jit
def arrive(counter_ptr, total):
    """Count this program in; true for the last, which zeroes the counter."""
    last = count_in(counter_ptr) == total - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def wait_for(counter_ptr, total):
    """Wait until the counter is at total or above."""
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < total:
        pass
