"""The formats of expert weights, each as one object: from a checkpoint's values to the GPU's bits.

A format stands in FORMATS once; the loader, the float64 reference and the tests of round trips find
it there. Its decode on the device is in the grouped matmul, by the type of its GPU layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headrace.ops.experts_kernel import DenseWeight, KernelWeight
from headrace.ops.mxfp4 import MXFP4Weight, quantize
from headrace.ops.mxfp4_kernel import PreparedMXFP4, RowOrder, prepare, restore


@dataclass(frozen=True)
class WeightFormat:
    """`dequantize(quantize(w))` is w rounded; `restore(prepare(q, order))` is q, bit by bit."""

    checkpoint_type: type  # what a checkpoint's reader hands over
    gpu_type: type  # what the grouped matmul reads
    quantize: Callable[[Tensor], Any]  # [num_experts, out_features, in_features]
    dequantize: Callable[[Any, torch.dtype], Tensor]
    prepare: Callable[[Any, RowOrder], KernelWeight]
    restore: Callable[[Any], Any]


FORMATS = {
    "mxfp4": WeightFormat(
        checkpoint_type=MXFP4Weight,
        gpu_type=PreparedMXFP4,
        quantize=lambda weight: MXFP4Weight(*quantize(weight)),
        dequantize=lambda packed, dtype: packed.dequantize(dtype),
        prepare=lambda packed, order: prepare(packed.blocks, packed.scales, order),
        restore=lambda weight: MXFP4Weight(*restore(weight)),
    ),
    "bfloat16": WeightFormat(
        checkpoint_type=Tensor,
        gpu_type=DenseWeight,
        quantize=lambda weight: weight.bfloat16(),
        dequantize=lambda weight, dtype: weight.to(dtype),
        prepare=lambda weight, order: DenseWeight(weight.contiguous(), order),
        restore=lambda weight: weight.values,
    ),
}


def in_gpu_layout(weight: object, order: RowOrder) -> KernelWeight:
    """A weight of a checkpoint as the grouped matmul reads it. ValueError for unknown formats."""
    for form in FORMATS.values():
        if isinstance(weight, form.checkpoint_type):
            return form.prepare(weight, order)
    raise _unknown(weight)


def dequantized(weight: object, dtype: torch.dtype) -> Tensor:
    """The values of a weight in any format's layout. ValueError for unknown formats."""
    for form in FORMATS.values():
        if isinstance(weight, form.gpu_type):
            weight = form.restore(weight)
        if isinstance(weight, form.checkpoint_type):
            return form.dequantize(weight, dtype)
    raise _unknown(weight)


def _unknown(weight: object) -> ValueError:
    name = type(weight).__name__
    return ValueError(f"a {name} is in no known format; there are {list(FORMATS)}")
