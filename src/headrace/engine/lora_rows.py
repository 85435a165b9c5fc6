"""Which rows of a step have which adapter: from the scheduled requests to the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from headrace.engine.request import Request
from headrace.engine.scheduler import Plan
from headrace.engine.staging import Staging
from headrace.lora.rows import row_arrays
from headrace.ops.lora import LoraBatch, LoraRows, LoraWeights


class LoraStaging:
    """Says on the device which rows of a step belong to which adapter."""

    def __init__(self, weights: LoraWeights, max_rows: int, device: torch.device) -> None:
        self._weights = weights
        self._num_slots = weights.lm_head.rank.shape[1]
        lengths = 2 * [max_rows, max_rows, self._num_slots, self._num_slots + 1]
        self._staging = Staging([4 * n for n in lengths], device)

    def put(self, slots: np.ndarray, num_rows: int, output_rows: np.ndarray) -> LoraBatch:
        """The slots of the first rows' adapters, int32, -1 for none; the other rows have none.

        Batches of the same numbers of rows and outputs get the same addresses.
        """
        slots = np.pad(slots, (0, num_rows - len(slots)), constant_values=-1)
        arrays = row_arrays(slots, self._num_slots)
        arrays += row_arrays(slots[output_rows], self._num_slots)
        # each aligned, so that the kernels are compiled once and not for each remainder
        parts = self._staging.put(arrays)
        return LoraBatch(self._weights, LoraRows(*parts[:4]), LoraRows(*parts[4:]))


def by_adapter(plan: Plan) -> Plan:
    """The same, requests of one adapter side by side.

    A block of an expert's rows then seldom has rows of two adapters, which the kernels take one
    after the other.
    """
    return dict(sorted(plan.items(), key=lambda item: slot_of(item[0])))


def slots_of(work: Sequence[tuple[Request, int]]) -> np.ndarray:
    """The slot of the adapter of each row of (request, number of tokens), int32; -1 for none."""
    slots = np.array([slot_of(request) for request, _ in work], dtype=np.int32)
    return np.repeat(slots, [n for _, n in work])


def slot_of(request: Request) -> int:
    """Where the adapter of a scheduled request is; -1 without one."""
    if request.lora is None:
        return -1
    assert request.lora.ready, request
    assert request.lora.slot is not None, request
    return request.lora.slot
