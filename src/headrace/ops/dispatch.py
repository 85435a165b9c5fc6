"""Where an op computes: its Triton kernel, or the plain-torch reference."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


def takes_kernel(x: Tensor) -> bool:
    """Whether ops compute x with their kernels: CUDA tensors."""
    return x.is_cuda


def is_hopper(x: Tensor) -> bool:
    """Whether x's GPU has TMA and programmatic dependent launch: from sm_90 on."""
    return x.is_cuda and gpu_limits(x.device.index).is_hopper


@dataclass(frozen=True)
class GpuLimits:
    """What choices of tiles depend on."""

    num_sms: int
    shared_memory: int  # bytes that one program can have
    is_hopper: bool
    memory_tb_per_s: float


def num_sms(x: Tensor) -> int:
    """SMs of x's GPU; 1 on the CPU, where kernels are interpreted."""
    return gpu_limits(x.device.index).num_sms if x.device.type == "cuda" else 1


@cache
def gpu_limits(index: int | None) -> GpuLimits:
    """Of one GPU; asking the driver takes 1 ms, longer than a launch, so it is asked once."""
    import triton  # may be missing where there is no GPU

    found = triton.runtime.driver.active.utils.get_device_properties(index)
    is_hopper = torch.cuda.get_device_capability(index) >= (9, 0)
    bits_per_s = 2 * 1000 * found["mem_clock_rate"] * found["mem_bus_width"]  # two a clock, in kHz
    return GpuLimits(
        found["multiprocessor_count"], found["max_shared_mem"], is_hopper, bits_per_s / 8e12
    )
