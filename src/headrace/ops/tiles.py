"""Tile sizes: a pure function from a frozen problem to a frozen choice."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Problem:
    """What the choice depends on."""

    num_slots: int  # num_tokens * top_k
    num_experts: int  # held here
    mxfp4: bool = True  # else bfloat16 weights
    shared_memory: int = 227 * 1024  # bytes that one program can have; an H100's
    memory_tb_per_s: float = 3.35  # an H100's; an H200 has 4.8 for as many SMs


@dataclass(frozen=True)
class Tile:
    """Sizes for one grouped matmul. block_m must be the one that the slots were sorted with.

    The last rows of an expert seldom fill a block: with 64 rows an expert on average, blocks of 128
    would multiply zeros for more than half of their time.
    """

    block_m: int  # tokens
    block_n: int  # rows of the weight
    block_k: int = 128
    num_warps: int = 4
    num_stages: int = 4
    group_m: int = 1
    narrow: tuple[int, ...] = ()  # rising widths below block_m, for blocks with so few tokens


@dataclass(frozen=True)
class MoETiles:
    """Both matmuls of a layer; they share block_m, and so the sort."""

    gate_up: Tile
    down: Tile


def choose(problem: Problem) -> MoETiles:
    """Tiles for both matmuls, by the rows an expert gets if they spread evenly.

    Where they were not measured (Ampere, Ada, bfloat16 weights) they are the same, with as many
    stages as fit.
    """
    tiles = _fastest(problem)
    gate_up, down = _fitted(tiles.gate_up, problem), _fitted(tiles.down, problem)
    return replace(tiles, gate_up=gate_up, down=down)


def shared_bytes(tile: Tile, mxfp4: bool) -> int:
    """What a program needs at most, as seen in the kernels compiled for sm_80 and sm_90."""
    x, w = tile.block_m * tile.block_k * 2, tile.block_n * tile.block_k * 2
    if not mxfp4:
        return tile.num_stages * (x + w)
    packed = w // 4 + tile.block_n * tile.block_k // 32  # with scales
    return (tile.num_stages - 1) * (x + packed) + w  # decoded


def _fitted(tile: Tile, problem: Problem) -> Tile:
    while shared_bytes(tile, problem.mxfp4) > problem.shared_memory:
        if tile.num_stages > 2:
            tile = replace(tile, num_stages=tile.num_stages - 1)
        else:
            tile = replace(tile, block_k=tile.block_k // 2)
    return tile


def _fastest(problem: Problem) -> MoETiles:
    """On an H100 and an H200; the reasons: tune.csv in bench/results/h100 and h200, and in h100
    moe_small.csv and moe_large.csv.

    Never fewer than 16 rows: with 8 the compiler takes another matrix instruction (mma.sync), which
    gives the same bits but wants the weights elsewhere: 45 us a layer against 36 at one token.
    """
    rows = problem.num_slots / problem.num_experts
    if rows <= 8:
        if problem.memory_tb_per_s > 4 and problem.num_slots >= 16:
            # an H200: both matmuls 7 to 9 % faster than 64 wide at 16 to 64 tokens
            tile = Tile(16, 128, num_stages=5)
            return MoETiles(tile, tile)
        # 128 x 16 leads where many experts are hit (524 against 539 us at 128 experts, 64 tokens);
        # with fewer there are too few programs: 17.0 against 20.7 us for gate_up at one token
        wide = min(problem.num_slots, problem.num_experts) > 64
        return MoETiles(Tile(16, 128 if wide else 64), Tile(16, 64))
    if rows <= 16:
        # 111 + 62 us at 32 experts, 128 tokens; with 3 stages 114 + 62, 64 wide 118 + 68
        return MoETiles(Tile(32, 128), Tile(32, 128))
    if rows <= 32:
        # 139 us, without the narrow width 148; with 4 warps 134, but they spill with adapters.
        # down takes 79 us, with 8 warps 101; the narrow width gains 2 and spills, too.
        gate_up = Tile(64, 128, num_warps=8, num_stages=3, narrow=(32,))
        return MoETiles(gate_up, Tile(64, 128, num_stages=3))
    # 4 warps hold 128 x 128 sums and still lead: 1088 us against 1165 for 128 x 256
    if rows <= 64:
        tile = Tile(128, 128, num_stages=3, narrow=(32, 64))  # 190 us; 64 x 128, 8 warps: 205
    else:
        tile = Tile(128, 128, num_stages=3, group_m=4, narrow=(32,))  # 284 us; without: 331
    return MoETiles(tile, tile)
