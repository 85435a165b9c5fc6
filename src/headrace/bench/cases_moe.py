"""One mixture-of-experts layer of gpt-oss, the routing path alone, and the preparing of weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from headrace.bench.case import NUM_INPUTS, NUM_WEIGHT_SETS, Case
from headrace.bench.exact_moe import exact_layer, exact_logits, relative_errors
from headrace.ops import routing_kernel
from headrace.ops.experts import Experts
from headrace.ops.moe import MoEBuffers, MoEWeights, moe_layer, own_buffers
from headrace.ops.mxfp4_kernel import PreparedMXFP4, RowOrder, prepare, restore
from headrace.ops.tiles import MoETiles

OPS = ("moe_layer", "router", "router_gemm", "prepare")
HIDDEN = INTER = 2880
TOP_K = 4
NUM_EXPERTS = (32, 128)  # gpt-oss-20b, gpt-oss-120b
BYTES_PER_EXPERT = 3 * INTER * HIDDEN * (4 + 8 / 32) / 8
CHECKED_ROWS = 64


@dataclass(frozen=True)
class Step:
    """What the calls of one case read and write: call i takes input i % 8, layer i % 3."""

    layers: Sequence[MoEWeights]
    inputs: Sequence[Tensor]  # each [num_tokens, HIDDEN]
    buffers: Sequence[MoEBuffers]
    outs: Sequence[Tensor]
    logits: Tensor  # [num_tokens, num_experts] float32

    def layer(self, i: int) -> Tensor:
        """Hidden states to hidden states."""
        n = i % NUM_INPUTS
        return moe_layer(
            self.inputs[n], self.layers[i % NUM_WEIGHT_SETS], self.buffers[n], self.outs[n]
        )

    def route(self, i: int) -> MoEBuffers:
        """Norm, router, top-k and sort."""
        weights, buffers = self.layers[i % NUM_WEIGHT_SETS], self.buffers[i % NUM_INPUTS]
        routing_kernel.route(
            self.inputs[i % NUM_INPUTS], None, weights.norm, weights.eps, weights.router,
            weights.router_bias, buffers.routing, buffers.tiles.gate_up.block_m,
        )  # fmt: skip
        return buffers

    def router_gemm(self, i: int) -> Tensor:
        """The router's logits alone, of x as it is."""
        weights, n = self.layers[i % NUM_WEIGHT_SETS], i % NUM_INPUTS
        return routing_kernel.router_gemm(
            self.inputs[n],
            weights.router,
            weights.router_bias,
            self.buffers[n].routing,
            self.logits,
        )

    def experts_hit(self) -> float:
        """Mean of the inputs."""
        hits = [self.route(i).routing.expert_ids.unique().numel() for i in range(NUM_INPUTS)]
        return sum(hits) / len(hits)

    def check_layer(self) -> None:
        """The first rows against float64, for the experts that the router chose."""
        got = self.layer(0)[:CHECKED_ROWS]
        ids = self.buffers[0].routing.expert_ids[:CHECKED_ROWS]
        expected = exact_layer(self.inputs[0][:CHECKED_ROWS], self.layers[0], ids)
        largest, rms = relative_errors(got, expected)
        assert largest < 0.025, f"largest error {largest}"
        assert rms < 0.005, f"RMS error {rms}"

    def check_route(self) -> None:
        """The chosen logits are the largest ones, and the slots lie in the order of experts."""
        routing = self.route(0).routing
        ids = routing.expert_ids.long()
        _, logits = exact_logits(self.inputs[0], self.layers[0])
        # the kernel rounds rms_norm(h) to bfloat16
        torch.testing.assert_close(
            logits.gather(1, ids), logits.topk(TOP_K).values, rtol=0, atol=0.05
        )
        expected = ids.flatten().sort(stable=True).indices
        assert torch.equal(routing.sorted.slots.long(), expected), "slots are not sorted"

    def check_router_gemm(self) -> None:
        """All logits against float64."""
        weights = self.layers[0]
        assert weights.router_bias is not None
        expected = self.inputs[0].double() @ weights.router.double().T
        expected += weights.router_bias.double()
        torch.testing.assert_close(self.router_gemm(0).double(), expected, rtol=1e-4, atol=1e-4)


def cases(sizes: Sequence[int], device: torch.device) -> Iterator[Case]:
    """All of OPS, with 32 and with 128 experts."""
    yield prepare_case(device)
    for num_experts in NUM_EXPERTS:
        layers = [random_layer(num_experts, device) for _ in range(NUM_WEIGHT_SETS)]
        for num_tokens in sizes:
            yield from _cases_of(make_step(layers, num_tokens))


def _cases_of(step: Step) -> Iterator[Case]:
    num_tokens, num_experts = len(step.inputs[0]), step.layers[0].num_experts
    case = partial(Case, labels={"experts": num_experts}, num_tokens=num_tokens)
    yield case(
        "moe_layer",
        run=step.layer,
        check=step.check_layer,
        num_bytes=step.experts_hit() * BYTES_PER_EXPERT,
        num_flops=num_tokens * TOP_K * 2 * 3 * INTER * HIDDEN,
    )
    router_bytes = 2 * HIDDEN * num_experts
    yield case(
        "router",
        run=step.route,
        check=step.check_route,
        num_bytes=router_bytes + 2 * 2 * num_tokens * HIDDEN,  # reads h, writes what is normed
        num_flops=num_tokens * 2 * HIDDEN * num_experts,
        num_calls=64,
    )
    yield case(
        "router_gemm",
        run=step.router_gemm,
        check=step.check_router_gemm,
        num_bytes=router_bytes + num_tokens * (2 * HIDDEN + 4 * num_experts),
        num_flops=num_tokens * 2 * HIDDEN * num_experts,
        num_calls=64,
    )


def prepare_case(device: torch.device) -> Case:
    """Checkpoint layout to GPU layout, for the first matmul of 32 experts."""
    packed = [random_packed(32, 2 * INTER, device) for _ in range(2)]

    def run(i: int) -> PreparedMXFP4:
        return prepare(*packed[i % 2], RowOrder.INTERLEAVED)

    def check() -> None:
        assert all(map(torch.equal, restore(run(0)), packed[0])), "restore is not the inverse"

    num_bytes = 2 * sum(part.numel() for part in packed[0])  # read once, written once
    return Case("prepare", {}, 0, run, check, num_bytes, 0.0, num_calls=2, in_graph=False)


def make_step(layers: Sequence[MoEWeights], num_tokens: int, tiles: MoETiles | None = None) -> Step:
    """Random inputs, and buffers for each; other tiles than the table's to tune it."""
    weights, device = layers[0], layers[0].norm.device
    inputs = [torch.randn(num_tokens, HIDDEN, device=device).bfloat16() for _ in range(NUM_INPUTS)]
    return Step(
        layers,
        inputs,
        [own_buffers(num_tokens, weights, device, tiles) for _ in inputs],
        [torch.empty_like(x) for x in inputs],
        torch.empty(num_tokens, weights.num_experts, device=device),
    )


def random_layer(num_experts: int, device: torch.device) -> MoEWeights:
    """Random weights under which routing spreads over all experts."""

    def normal(*shape: int, std: float) -> Tensor:
        return (torch.randn(shape, device=device) * std).bfloat16()

    return MoEWeights(
        norm=normal(HIDDEN, std=0.1) + 1,
        eps=1e-5,
        router=normal(num_experts, HIDDEN, std=0.05),
        router_bias=normal(num_experts, std=0.05),
        experts=Experts(
            prepare(*random_packed(num_experts, 2 * INTER, device), RowOrder.INTERLEAVED),
            normal(num_experts, 2 * INTER, std=0.1),
            prepare(*random_packed(num_experts, HIDDEN, device)),
            normal(num_experts, HIDDEN, std=0.1),
        ),
        top_k=TOP_K,
    )


def random_packed(num_experts: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Uniform nibbles and scales 119 to 121, as peers were measured with."""
    shape = (num_experts, rows, HIDDEN // 32)
    return (
        torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, device=device),
        torch.randint(119, 122, shape, dtype=torch.uint8, device=device),
    )
