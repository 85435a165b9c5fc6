"""The CUDA C++ router has the bits of the Triton one, which test_routing_kernel.py checks."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace

import pytest
import torch
import triton
from torch import Tensor

from headrace.bench.cases_lora import LoraCase, make_case, random_adapters
from headrace.bench.cases_moe import Step, make_step, random_layer
from headrace.ops import cuda_source, dispatch, routing_cuda
from headrace.ops.lora import LoraBuffers, LoraLayer, MoELora
from headrace.ops.routing import RoutingBuffers
from tests.fake_gpu import NUM_SMS, SHARED_MEMORY
from tests.ops.test_cuda_source import need_nvrtc
from tests.ops.test_lora_kernel import Adapters, rows_of
from tests.ops.test_routing_kernel import Router

gpu = pytest.mark.gpu


@pytest.mark.parametrize(
    ("hidden", "num_experts", "top_k"), [(2880, 32, 4), (2880, 128, 4), (2056, 8, 8), (4096, 96, 1)]
)
def test_it_compiles_and_fits(hidden, num_experts, top_k, tmp_path, monkeypatch):
    need_nvrtc()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    defines = routing_cuda.shape(hidden, num_experts).defines(top_k, renormalize=True)
    cubin = tmp_path / "k.cubin"
    cubin.write_bytes(cuda_source.compile_source(routing_cuda.SOURCE, "sm_90", defines))
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin]
    usage = subprocess.run(command, capture_output=True, text=True).stdout
    found = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    assert found["REG"] * routing_cuda.NUM_THREADS <= 65536 // 2
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
    limits = dispatch.GpuLimits(NUM_SMS, SHARED_MEMORY, is_hopper=True, memory_tb_per_s=3.35)
    monkeypatch.setattr(dispatch, "gpu_limits", lambda index: limits)
    monkeypatch.setattr(cuda_source, "available", lambda: True)
    router = Router(num_experts, hidden, "cpu")
    x = torch.zeros(num_tokens, hidden, dtype=torch.bfloat16)
    arguments = (router.norm, router.weight, router.buffers(x, 1))
    assert routing_cuda.takes(x, *arguments) == taken
    shifted = torch.zeros(num_tokens * hidden + 1, dtype=torch.bfloat16)[1:].view_as(x)
    assert not routing_cuda.takes(shifted, *arguments)  # not in 16 bytes
    slots = torch.zeros(num_tokens, dtype=torch.int32)
    lora = router_lora(router_adapters([3], hidden, num_experts, "cpu"), slots)
    assert routing_cuda.takes(x, *arguments, lora) == taken
    lora = replace(lora, memory=torch.zeros(len(lora.memory) + 1, dtype=x.dtype)[1:])
    assert not routing_cuda.takes(x, *arguments, lora)


def router_adapters(ranks, hidden, num_experts, device="cuda") -> Adapters:
    """Their deltas are of the order of one; NaN stands around every factor."""
    return Adapters([ranks], hidden, [num_experts], 1, device, torch.bfloat16)


def router_lora(adapters: Adapters, slots: Tensor) -> MoELora:
    """What `route` takes."""
    site = adapters.site
    rows = rows_of(slots, site.rank.shape[1])
    return MoELora(LoraLayer(*[site] * 5), adapters.memory, rows, LoraBuffers())


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


RANKS = [
    [0, 1, 200],
    [64, 0, 7, 520],  # more than are multiplied with B at once
    [8 * (i % 5) + i % 3 for i in range(17)],
]


@gpu
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(
    ("num_experts", "hidden", "top_k"), [(32, 2880, 4), (128, 2880, 4), (60, 2056, 8), (8, 4096, 1)]
)
def test_the_bits_are_tritons_with_adapters(num_experts, hidden, top_k, ranks, triton_alone):
    router, local = Router(num_experts, hidden), range(num_experts)
    adapters, batches = router_adapters(ranks, hidden, num_experts), []
    for num_tokens in (1, 2, 9, 16, 17, 100, 128):
        x, residual = torch.randn(2, num_tokens, hidden, device="cuda").bfloat16()
        slots = torch.randint(-1, len(ranks), (num_tokens,), device="cuda").int()
        slots[0] = len(ranks) - 1  # of a rank above 0
        lora = router_lora(adapters, slots)
        _, base = router.run(x, residual, top_k)
        summed, buffers = router.run(x, residual, top_k, lora=lora)
        assert routing_cuda.takes(x, router.norm, router.weight, buffers, lora)
        assert not buffers.counters.any()
        assert not buffers.sorted.blocks[buffers.sorted.blocks[:, 0] >= 0, 3].any()
        rank = torch.tensor([*ranks, 0], device="cuda")[slots.long()]
        for name in ("expert_ids", "expert_weights"):
            assert torch.equal(getattr(buffers, name)[rank == 0], getattr(base, name)[rank == 0])
        if top_k > 1:
            assert (buffers.expert_weights != base.expert_weights)[rank > 1].any(1).all()
        batches.append((x, residual, lora, {"sum": summed} | results(buffers, local)))
    triton_alone()
    for x, residual, lora, found in batches:
        summed, buffers = router.run(x, residual, top_k, lora=lora)
        assert_same(found, {"sum": summed} | results(buffers, local))


@gpu
@pytest.mark.parametrize("num_tokens", [1, 16, 100])
@pytest.mark.parametrize("num_experts", [32, 128])
@pytest.mark.parametrize("ranks", RANKS)
def test_adapters_against_float64(ranks, num_experts, num_tokens):
    router = Router(num_experts, 2880)
    x = torch.randn(num_tokens, 2880, device="cuda").bfloat16()
    slots = (torch.arange(num_tokens, device="cuda") % (len(ranks) + 1) - 1).int().flip(0)
    adapters = router_adapters(ranks, 2880, num_experts)
    _, buffers = router.run(x, None, 4, lora=router_lora(adapters, slots))
    logits = router.logits(buffers.normed)
    for slot in range(len(ranks)):
        mine = slots == slot
        logits[mine] += adapters.delta(buffers.normed[mine], slot)
    chosen = logits.gather(1, buffers.expert_ids.long())
    best = logits.topk(4).values
    torch.testing.assert_close(chosen, best, rtol=0, atol=0.03)  # x A^T is rounded
    weights = buffers.expert_weights.double()
    torch.testing.assert_close(weights, chosen.softmax(1), rtol=0.03, atol=0.03)


@gpu
def test_slots_that_are_nobodys_count_as_none():
    """A warm-up runs the kernel on slots that no kernel has written."""
    router, x = Router(32, 2880), torch.randn(20, 2880, device="cuda").bfloat16()
    lora = router_lora(router_adapters([64], 2880, 32), torch.zeros(20, device="cuda"))
    lora.rows.slot_of_row.copy_(torch.tensor([1, -7, 1 << 30, -(1 << 31)] * 5))
    _, base = router.run(x, None, 4)
    _, buffers = router.run(x, None, 4, lora=lora)
    assert_same(results(buffers, range(32)), results(base, range(32)))


def random_lora_case(step: Step) -> LoraCase:
    """Two adapters; one of them changes the router, too."""
    found = []
    for _ in step.layers:
        adapters = random_adapters(2, 16, torch.device("cuda"))
        more, begin = router_adapters([20, 0], 2880, 32), len(adapters.memory)
        router = replace(more.site, a=more.site.a + begin, b=more.site.b + begin)
        memory = torch.cat((adapters.memory, more.memory))
        found.append(replace(adapters, layer=replace(adapters.layer, router=router), memory=memory))
    return make_case(step, found, 2)


@gpu
@pytest.mark.parametrize("has_lora", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 20, 128])
def test_a_replayed_layer(num_tokens, has_lora, triton_alone):
    """In a chain whose kernels start early; a replay finds the counters as it needs them."""
    layers = [random_layer(32, torch.device("cuda")) for _ in range(3)]
    step = make_step(layers, num_tokens)
    run = random_lora_case(step).experts if has_lora else step.layer
    run(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(24):  # input n meets layer (16 + n) % 3 last
            run(i)
    for out in step.outs:
        out.fill_(float("nan"))
    graph.replay()
    graph.replay()
    found = [out.clone() for out in step.outs]
    triton_alone()
    for n in range(8):
        assert torch.equal(run(16 + n), found[n]), n
