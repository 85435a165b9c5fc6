"""Time one MoE layer of gpt-oss against the bandwidth floor: python bench/kernels.py --out DIR.

Each figure is the median of 15 replays of one CUDA graph of 24 calls (64 for the router) over 8
inputs and 3 weight sets, so that no expert's weights are in L2 from one call to the next.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from torch import Tensor

from headrace.ops import experts_kernel, routing_kernel
from headrace.ops.experts_kernel import Activation
from headrace.ops.mxfp4_kernel import PreparedMXFP4, RowOrder, prepare
from headrace.ops.routing_kernel import RoutingBuffers
from headrace.ops.tiles import MoETiles, Problem, Tile, choose

HIDDEN = INTER = 2880
TOP_K = 4
NUM_INPUTS, NUM_WEIGHT_SETS, CALLS, REPLAYS = 8, 3, 24, 15
BYTES_PER_EXPERT = (3 * INTER) * HIDDEN * (4 + 8 / 32) / 8
COPY_BYTES_PER_S, BF16_FLOPS = 3.0e12, 790e12  # of an H100, measured
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
# best of triton_kernels 3.5.1 and Marlin on an H100, us (docs/measured.md)
PEERS = {
    32: (58, 75, 110, 146, 191, 196, 198, 270, 324, 418, 633, 1031, 1806, 3286),
    128: (59, 76, 120, 189, 303, 453, 609, 695, 718, 968, 1228, 1607, 2389, 3900),
}


@dataclass(frozen=True)
class Layer:
    """The weights of one layer."""

    norm: Tensor
    router: Tensor
    router_bias: Tensor
    gate_up: PreparedMXFP4
    gate_up_bias: Tensor
    down: PreparedMXFP4
    down_bias: Tensor


@dataclass(frozen=True)
class Workspace:
    """What one layer's call writes."""

    routing: RoutingBuffers
    hidden: Tensor
    slots_out: Tensor
    out: Tensor


def random_mxfp4(num_experts: int, rows: int, order: RowOrder) -> PreparedMXFP4:
    """Uniform nibbles, scales 119..121, as the peers were measured."""
    blocks = torch.randint(0, 256, (num_experts, rows, 90, 16), dtype=torch.uint8, device="cuda")
    scales = torch.randint(119, 122, (num_experts, rows, 90), dtype=torch.uint8, device="cuda")
    return prepare(blocks, scales, order)


def random_layer(num_experts: int) -> Layer:
    """Random weights under which routing spreads over all experts."""

    def normal(*shape: int, std: float) -> Tensor:
        return (torch.randn(shape, device="cuda") * std).bfloat16()

    return Layer(
        norm=normal(HIDDEN, std=0.1) + 1,
        router=normal(num_experts, HIDDEN, std=0.05),
        router_bias=normal(num_experts, std=0.05),
        gate_up=random_mxfp4(num_experts, 2 * INTER, RowOrder.INTERLEAVED),
        gate_up_bias=normal(num_experts, 2 * INTER, std=0.1),
        down=random_mxfp4(num_experts, HIDDEN, RowOrder.PLAIN),
        down_bias=normal(num_experts, HIDDEN, std=0.1),
    )


def workspace(num_tokens: int, num_experts: int, block_m: int) -> Workspace:
    """Buffers of one call."""
    slots = num_tokens * TOP_K
    bf16 = {"dtype": torch.bfloat16, "device": "cuda"}
    return Workspace(
        routing_kernel.allocate(
            num_tokens, HIDDEN, num_experts, TOP_K, block_m, torch.bfloat16, "cuda"
        ),
        torch.empty(slots, INTER, **bf16),
        torch.empty(slots, HIDDEN, **bf16),
        torch.empty(num_tokens, HIDDEN, **bf16),
    )


def route(x: Tensor, layer: Layer, ws: Workspace, tiles: MoETiles) -> Tensor:
    """Norm, router, top-k and sort."""
    return routing_kernel.route(
        x, None, layer.norm, 1e-5, layer.router, layer.router_bias, ws.routing,
        tiles.gate_up.block_m,
    )  # fmt: skip


def gate_up(layer: Layer, ws: Workspace, tile: Tile) -> Tensor:
    """First matmul."""
    return experts_kernel.grouped_matmul(
        ws.routing.normed, layer.gate_up, layer.gate_up_bias, ws.routing.sorted, tile, ws.hidden,
        TOP_K, gather=True, activation=Activation.SWIGLU_OAI,
    )  # fmt: skip


def down(layer: Layer, ws: Workspace, tile: Tile) -> Tensor:
    """Second matmul."""
    return experts_kernel.grouped_matmul(
        ws.hidden, layer.down, layer.down_bias, ws.routing.sorted, tile, ws.slots_out, TOP_K,
        gather=False, slot_weights=ws.routing.expert_weights.view(-1),
    )  # fmt: skip


def whole(x: Tensor, layer: Layer, ws: Workspace, tiles: MoETiles) -> Tensor:
    """One layer, hidden states to hidden states."""
    residual = route(x, layer, ws, tiles)
    gate_up(layer, ws, tiles.gate_up)
    down(layer, ws, tiles.down)
    everyone = range(layer.down.num_experts)
    return experts_kernel.weighted_sum(
        ws.slots_out, ws.routing.expert_ids, everyone, residual, ws.out
    )


def time_graph(call: Callable[[int], object], calls: int = CALLS) -> float:
    """Microseconds of one call(i), i = 0 .. calls - 1 in a CUDA graph."""
    for i in range(calls):
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    times = []
    for _ in range(REPLAYS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / calls)
    return statistics.median(times[2:])


def floor_us(num_tokens: int, experts_hit: float) -> float:
    """Weights once at copy speed, or arithmetic at matmul speed, whichever is longer."""
    flops = num_tokens * TOP_K * 2 * 3 * INTER * HIDDEN
    return 1e6 * max(experts_hit * BYTES_PER_EXPERT / COPY_BYTES_PER_S, flops / BF16_FLOPS)


def candidates(num_tokens: int, num_experts: int) -> list[Tile]:
    """Tiles worth a try."""
    rows = num_tokens * TOP_K / num_experts
    tiles = []
    if rows <= 16:
        tiles += [Tile(16, 64, 128, 4, s) for s in (3, 5, 7)]
        tiles += [Tile(16, 64, 256, 4, s) for s in (3, 4)]
        tiles += [Tile(16, 128, 128, 8, 5), Tile(16, 128, 128, 4, 5), Tile(16, 128, 256, 8, 4)]
    if 4 <= rows <= 32:
        tiles += [Tile(32, 64, 128, 4, 3), Tile(32, 64, 128, 4, 5), Tile(32, 128, 128, 8, 4)]
    if 8 <= rows <= 64:
        tiles += [Tile(64, 64, 128, 4, 3), Tile(64, 128, 128, 8, 3), Tile(64, 128, 128, 4, 3)]
        tiles += [Tile(64, 64, 128, 4, 4, 2)]
    if rows >= 32:
        tiles += [Tile(128, 128, 128, 8, 3, 4), Tile(128, 128, 128, 8, 4, 8)]
        tiles += [Tile(128, 64, 128, 4, 3, 4), Tile(128, 128, 128, 4, 3, 4)]
    if rows >= 128:
        tiles += [Tile(256, 128, 128, 8, 3, 4), Tile(256, 128, 128, 8, 2, 4)]
    return tiles


@dataclass(frozen=True)
class Case:
    """One number of tokens, with its inputs and buffers."""

    inputs: list[Tensor]
    spaces: list[Workspace]
    layers: Sequence[Layer]
    tiles: MoETiles

    def routing_us(self) -> float:
        """The routing path alone."""
        return time_graph(
            lambda i: route(self.inputs[i % 8], self._layer(i), self.spaces[i % 8], self.tiles), 64
        )

    def layer_us(self) -> float:
        """The whole layer."""
        return time_graph(
            lambda i: whole(self.inputs[i % 8], self._layer(i), self.spaces[i % 8], self.tiles)
        )

    def matmul_us(self, op: Callable[[Layer, Workspace, Tile], Tensor]) -> float:
        """One of the matmuls; both use the same tile here."""
        return time_graph(lambda i: op(self._layer(i), self.spaces[i % 8], self.tiles.gate_up))

    def _layer(self, i: int) -> Layer:
        return self.layers[i % NUM_WEIGHT_SETS]


def make_case(num_tokens: int, layers: Sequence[Layer], tiles: MoETiles) -> Case:
    """Random inputs, routed once."""
    num_experts = layers[0].down.num_experts
    inputs = [torch.randn(num_tokens, HIDDEN, device="cuda").bfloat16() for _ in range(NUM_INPUTS)]
    spaces = [workspace(num_tokens, num_experts, tiles.gate_up.block_m) for _ in range(NUM_INPUTS)]
    for x, ws in zip(inputs, spaces, strict=True):
        whole(x, layers[0], ws, tiles)
    return Case(inputs, spaces, layers, tiles)


def tune(num_experts: int, layers: Sequence[Layer], sizes: Sequence[int]) -> list[dict]:
    """Time both matmuls with every candidate."""
    rows = []
    for m in sizes:
        for tile in candidates(m, num_experts):
            case = make_case(m, layers, MoETiles(tile, tile))
            for name, op in (("gate_up", gate_up), ("down", down)):
                us = round(case.matmul_us(op), 1)
                rows.append({"experts": num_experts, "m": m, "op": name, "us": us, **vars(tile)})
    return rows


def time_layers(
    num_experts: int, layers: Sequence[Layer], sizes: Sequence[int]
) -> tuple[list[dict], list[dict]]:
    """Rows of moe_layer.csv and router.csv."""
    layer_rows, router_rows = [], []
    for m in sizes:
        case = make_case(m, layers, choose(Problem(m * TOP_K, num_experts)))
        hit = sum(ws.routing.expert_ids.unique().numel() for ws in case.spaces) / NUM_INPUTS
        us, floor = case.layer_us(), floor_us(m, hit)
        peer = PEERS[num_experts][SIZES.index(m)]
        layer_rows.append(
            {"experts": num_experts, "m": m, "us": round(us, 1), "floor_us": round(floor, 1),
             "share": round(floor / us, 3), "peer": "vllm-0.24", "peer_us": peer}
        )  # fmt: skip
        router_rows.append({"experts": num_experts, "m": m, "us": round(case.routing_us(), 2)})
    return layer_rows, router_rows


def time_prepare() -> list[dict]:
    """GB/s of checkpoint bytes, for the first matmul of 32 experts."""
    blocks = torch.randint(0, 256, (32, 2 * INTER, 90, 16), dtype=torch.uint8, device="cuda")
    scales = torch.randint(119, 122, (32, 2 * INTER, 90), dtype=torch.uint8, device="cuda")
    seconds = []
    for _ in range(4):
        torch.cuda.synchronize()
        start = time.perf_counter()
        prepare(blocks, scales, RowOrder.INTERLEAVED)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    total = blocks.numel() + scales.numel()
    rate = total / min(seconds[1:]) / 1e9
    return [{"op": "prepare", "mbytes": round(total / 1e6), "gb_per_s": round(rate, 1)}]


def compile_tile(tile: Tile) -> None:
    """Fill the kernel cache, in a process of its own."""
    layer, tiles = random_layer(1), MoETiles(tile, tile)
    ws = workspace(4, 1, tile.block_m)
    ws.routing.expert_ids.zero_()
    gate_up(layer, ws, tiles.gate_up)
    down(layer, ws, tiles.down)


def compile_all(tiles: set[Tile]) -> None:
    """Compile on all cores: one kernel takes about a second."""
    with ProcessPoolExecutor(14, mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_tile, tiles))


def write(path: Path, rows: list[dict]) -> None:
    """Write rows and print them."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(path.name)
    print("\n".join(",".join(str(v) for v in row.values()) for row in rows), flush=True)


def main() -> None:
    """Run all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--experts", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--tune", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    name = torch.cuda.get_device_name()
    print(name, "torch", torch.__version__, "triton", triton.__version__, flush=True)
    if args.tune:
        start = time.perf_counter()
        compile_all({t for e in args.experts for m in args.sizes for t in candidates(m, e)})
        print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    write(args.out / "prepare.csv", time_prepare())
    tuned, layer_rows, router_rows = [], [], []
    for num_experts in args.experts:
        layers = [random_layer(num_experts) for _ in range(NUM_WEIGHT_SETS)]
        if args.tune:
            tuned += tune(num_experts, layers, args.sizes)
            write(args.out / "tune.csv", tuned)
        rows, routers = time_layers(num_experts, layers, args.sizes)
        layer_rows += rows
        router_rows += routers
        write(args.out / "moe_layer.csv", layer_rows)
        write(args.out / "router.csv", router_rows)


if __name__ == "__main__":
    main()
