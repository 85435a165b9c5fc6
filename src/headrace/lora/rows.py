"""Which rows of a step belong to which adapter, put together on the host."""

from __future__ import annotations

import numpy as np


def row_arrays(
    slot_of_row: np.ndarray,  # [num_rows] int32, -1: no adapter
    num_slots: int,
) -> list[np.ndarray]:
    """The four arrays of LoraRows, on the host."""
    # -1 sorts last as an unsigned number
    order = np.argsort(slot_of_row.astype(np.uint32), kind="stable").astype(np.int32)
    counts = np.bincount(slot_of_row[slot_of_row >= 0], minlength=num_slots)
    used = np.flatnonzero(counts)
    active = np.full(num_slots, -1, dtype=np.int32)
    active[: len(used)] = used
    starts = np.full(num_slots + 1, counts.sum(), dtype=np.int32)
    starts[0] = 0
    starts[1 : len(used) + 1] = counts[used].cumsum()
    return [slot_of_row.astype(np.int32), order, active, starts]
