"""Routing of up to 128 tokens on sm_90: routing_cuda.cu in the place of router_kernel."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch import Tensor

from headrace.ops import cuda_source, dispatch
from headrace.ops.cuda_source import CudaKernel
from headrace.ops.lora import MoELora, router_tensors
from headrace.ops.routing import SLICE_K, RoutingBuffers

SOURCE = Path(__file__).with_suffix(".cu")
MAX_TOKENS = 128
MAX_EXPERTS = 128
NUM_THREADS = 512
OTHER_SHARED = 10 * 1024  # bytes, at most, of what is not sized in `shared_bytes`


class Arguments(ctypes.Structure):
    """As in routing_cuda.cu."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("summed", ctypes.c_void_p),
        ("normed", ctypes.c_void_p),
        ("ids", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("blocks", ctypes.c_void_p),
        ("masks", ctypes.c_void_p),
        ("counter", ctypes.c_void_p),
        ("slot_of_token", ctypes.c_void_p),
        ("memory", ctypes.c_void_p),
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("rank", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("num_tokens", ctypes.c_int),
        ("num_experts", ctypes.c_int),
        ("num_blocks", ctypes.c_int),
        ("block_m", ctypes.c_int),
        ("first_expert", ctypes.c_int),
        ("num_local", ctypes.c_int),
        ("num_adapters", ctypes.c_int),
    )


@dataclass(frozen=True)
class Shape:
    """How the work is cut."""

    hidden: int
    experts: int  # whole words of 32 bits
    tokens: int  # of a cluster
    programs: int  # of a cluster
    own: int  # slices of the hidden size that a program has

    @property
    def shared_bytes(self) -> int:
        """Memory of a program: the weight and x, their rows padded, and everybody's logits."""
        weight = self.own * self.experts * (2 * SLICE_K + 16)
        x = self.tokens * (2 * SLICE_K * self.own + 16)
        return weight + x + self.programs * self.own * self.tokens * self.experts * 4 + OTHER_SHARED

    def defines(self, top_k: int, renormalize: bool) -> dict[str, int]:
        """What routing_cuda.cu wants to know."""
        return {
            "HIDDEN": self.hidden,
            "EXPERTS": self.experts,
            "TOP_K": top_k,
            "RENORMALIZE": int(renormalize),
            "TOKENS": self.tokens,
            "PROGRAMS": self.programs,
            "OWN": self.own,
            "SHARED_BYTES": self.shared_bytes,
        }


@cache
def shape(hidden: int, num_experts: int) -> Shape:
    """Two slices a program: clusters of 8 or less, which fit everywhere."""
    experts = -(-num_experts // 32) * 32
    tokens = 8 if experts > 96 else 16  # as many as the logits leave room for
    return Shape(hidden, experts, tokens, programs=-(-hidden // (2 * SLICE_K)), own=2)


def takes(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    buffers: RoutingBuffers,
    lora: MoELora | None = None,
) -> bool:
    """Whether this kernel computes such a problem, with the bits of Triton's.

    Triton orders a row's squares so from 2049 to 4096 columns on.
    """
    num_tokens, hidden = x.shape
    fits = num_tokens <= MAX_TOKENS and 2048 < hidden <= 4096 and hidden % 8 == 0
    if not (fits and len(weight) <= MAX_EXPERTS and dispatch.is_hopper(x)):
        return False
    in_16_bytes = [x, norm_weight, weight, buffers.normed, buffers.summed]
    if lora is not None:
        in_16_bytes.append(lora.memory)
    limit = dispatch.gpu_limits(x.device.index).shared_memory
    return (
        all(tensor.data_ptr() % 16 == 0 for tensor in in_16_bytes)
        and shape(hidden, len(weight)).shared_bytes <= limit
        and cuda_source.available()
    )


@cache
def _kernel(shape: Shape, top_k: int, renormalize: bool, device: int) -> CudaKernel:
    return CudaKernel(
        SOURCE, "router_kernel", device, NUM_THREADS, shape.programs, shape.shared_bytes,
        shape.defines(top_k, renormalize),
    )  # fmt: skip


def launch(
    x: Tensor,  # [num_tokens, hidden]
    residual: Tensor | None,
    norm_weight: Tensor,  # [hidden]
    eps: float,
    weight: Tensor,  # [num_experts, hidden]
    bias: Tensor | None,  # [num_experts]
    buffers: RoutingBuffers,
    block_m: int,
    renormalize: bool,
    local: range,
    lora: MoELora | None = None,
) -> None:
    """Fill `buffers` as headrace.ops.routing_kernel.route does; `takes` it."""
    (num_tokens, hidden), top_k = x.shape, buffers.expert_ids.shape[1]
    cut = shape(hidden, len(weight))
    arguments = Arguments(
        x.data_ptr(), _address(residual), norm_weight.data_ptr(), weight.data_ptr(), _address(bias),
        buffers.summed.data_ptr(), buffers.normed.data_ptr(), buffers.expert_ids.data_ptr(),
        buffers.expert_weights.data_ptr(), buffers.sorted.slots.data_ptr(),
        buffers.sorted.blocks.data_ptr(), buffers.histograms.data_ptr(),
        buffers.counters.data_ptr(), *map(_address, router_tensors(lora)), eps, num_tokens,
        len(weight), len(buffers.sorted.blocks), block_m, local.start, len(local),
        0 if lora is None else lora.layer.router.rank.shape[1],
    )  # fmt: skip
    kernel = _kernel(cut, top_k, renormalize, x.device.index)
    kernel.launch((cut.programs, -(-num_tokens // cut.tokens)), arguments)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
