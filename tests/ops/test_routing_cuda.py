"""The CUDA C++ router has the bits of the Triton one, which test_routing_kernel.py checks."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from torch import Tensor

from headrace.bench.cases_moe import make_step, random_layer
from headrace.ops import cuda_source, dispatch, routing_cuda
from headrace.ops.routing import RoutingBuffers
from tests.fake_gpu import NUM_SMS, SHARED_MEMORY
from tests.ops.test_cuda_source import need_nvrtc
from tests.ops.test_routing_kernel import Router

gpu = pytest.mark.gpu
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@pytest.mark.parametrize(
    ("hidden", "num_experts", "top_k"), [(2880, 32, 4), (2880, 128, 4), (2056, 8, 8), (4096, 96, 1)]
)
def test_it_compiles_and_fits(hidden, num_experts, top_k, tmp_path, monkeypatch):
    need_nvrtc()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    defines = routing_cuda.shape(hidden, num_experts).defines(top_k, renormalize=True)
    cubin = tmp_path / "k.cubin"
    cubin.write_bytes(cuda_source.compile_source(routing_cuda.SOURCE, "sm_90", defines))
    command = [CUOBJDUMP, "-res-usage", cubin]
    usage = subprocess.run(command, capture_output=True, text=True).stdout
    found = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    assert found["REG"] * routing_cuda.NUM_THREADS <= 65536
    assert found["STACK"] == found["LOCAL"] == 0


def test_memory_that_is_too_small_does_not_compile(tmp_path, monkeypatch):
    need_nvrtc()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    defines = routing_cuda.shape(2880, 32).defines(4, renormalize=True)
    defines["SHARED_BYTES"] -= routing_cuda.OTHER_SHARED
    with pytest.raises(RuntimeError, match="static assertion failed"):
        cuda_source.compile_source(routing_cuda.SOURCE, "sm_90", defines)


def test_every_shape_fits_an_sm():
    for hidden in range(2056, 4097, 8):
        for num_experts in range(1, routing_cuda.MAX_EXPERTS + 1):
            cut = routing_cuda.shape(hidden, num_experts)
            assert cut.shared_bytes <= SHARED_MEMORY, cut
            assert cut.programs <= 8, cut  # every GPU with clusters has room for those
            assert cut.programs * cut.own * 256 >= hidden, cut


def test_arguments_stand_in_one_order():
    struct = re.search(r"struct Arguments \{(.*?)\};", routing_cuda.SOURCE.read_text(), re.S)
    assert struct
    members = re.sub(r"//.*", "", struct[1]).split(";")
    names = [name for member in members for name in re.findall(r"\*?(\w+)(?=,|\s*$)", member)]
    assert names == [name for name, _ in routing_cuda.Arguments._fields_]


@pytest.mark.parametrize(
    ("num_tokens", "hidden", "num_experts", "taken"),
    [
        (128, 2880, 32, True), (1, 4096, 128, True), (129, 2880, 32, False), (1, 2048, 32, False),
        (1, 4104, 32, False), (1, 2884, 32, False), (1, 2880, 129, False),
    ],
)  # fmt: skip
def test_what_it_takes(num_tokens, hidden, num_experts, taken, monkeypatch):
    monkeypatch.setattr(dispatch, "is_hopper", lambda x: True)
    limits = dispatch.GpuLimits(NUM_SMS, SHARED_MEMORY, is_hopper=True)
    monkeypatch.setattr(dispatch, "gpu_limits", lambda index: limits)
    monkeypatch.setattr(cuda_source, "available", lambda: True)
    router = Router(num_experts, hidden, "cpu")
    x = torch.zeros(num_tokens, hidden, dtype=torch.bfloat16)
    arguments = (router.norm, router.weight, router.buffers(x, 1))
    assert routing_cuda.takes(x, *arguments) == taken
    shifted = torch.zeros(num_tokens * hidden + 1, dtype=torch.bfloat16)[1:].view_as(x)
    assert not routing_cuda.takes(shifted, *arguments)  # not in 16 bytes


def results(buffers: RoutingBuffers, local: range) -> dict[str, Tensor]:
    """All that the experts read."""
    ids, blocks = buffers.expert_ids, buffers.sorted.blocks
    held = int(((ids >= local.start) & (ids < local.stop)).sum())
    return {
        "normed": buffers.normed,
        "ids": ids,
        "weights": buffers.expert_weights,
        "slots": buffers.sorted.slots[:held],
        "blocks": blocks.where(blocks[:, :1] >= 0, -1),
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_wrong_result_is_noticed():
    router = Router(12, 300, "cpu", torch.float32)
    buffers = router.buffers(torch.zeros(20, 300), 4)
    buffers.expert_weights.fill_(0.25)
    buffers.normed.zero_()
    good = {name: value.clone() for name, value in results(buffers, range(12)).items()}
    assert_same(results(buffers, range(12)), good)
    buffers.normed[19, 299] = 1
    with pytest.raises(AssertionError, match="normed"):
        assert_same(results(buffers, range(12)), good)


@pytest.fixture
def triton_alone(monkeypatch):
    """A function after which the Triton router takes all."""
    assert cuda_source.available()
    return lambda: monkeypatch.setattr(routing_cuda, "takes", lambda *args: False)


@gpu
@pytest.mark.parametrize(
    ("num_experts", "hidden", "top_k", "options"),
    [
        (32, 2880, 4, {}),
        (128, 2880, 4, {}),
        (60, 2880, 8, {"renormalize": False}),
        (8, 2200, 1, {"local": range(3, 6)}),
        (33, 4096, 3, {"block_m": 64}),
        (100, 3000, 5, {"local": range(40, 100)}),
    ],
)
def test_the_bits_are_tritons(num_experts, hidden, top_k, options, triton_alone):
    router, local = Router(num_experts, hidden), options.get("local", range(num_experts))
    batches = []
    for num_tokens in (1, 2, 3, 7, 8, 9, 16, 17, 127, 128):
        x, residual = torch.randn(2, num_tokens, hidden, device="cuda").bfloat16()
        for added in (None, residual):
            summed, buffers = router.run(x, added, top_k, **options)
            assert routing_cuda.takes(x, router.norm, router.weight, buffers)
            assert not buffers.counters.any()
            batches.append((x, added, {"sum": summed} | results(buffers, local)))
    triton_alone()
    for x, added, found in batches:
        summed, buffers = router.run(x, added, top_k, **options)
        assert_same(found, {"sum": summed} | results(buffers, local))


@gpu
@pytest.mark.parametrize("num_tokens", [1, 20, 128])
def test_a_replayed_layer(num_tokens, triton_alone):
    """In a chain whose kernels start early; a replay finds the counters as it needs them."""
    layers = [random_layer(32, torch.device("cuda")) for _ in range(3)]
    step = make_step(layers, num_tokens)
    step.layer(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(24):  # input n meets layer (16 + n) % 3 last
            step.layer(i)
    for out in step.outs:
        out.fill_(float("nan"))
    graph.replay()
    graph.replay()
    found = [out.clone() for out in step.outs]
    triton_alone()
    for n in range(8):
        assert torch.equal(step.layer(16 + n), found[n]), n
