"""Tile sizes: a pure function from a frozen problem to a frozen choice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """What the choice depends on."""

    num_slots: int  # num_tokens * top_k
    num_experts: int  # held here
    mxfp4: bool = True


@dataclass(frozen=True)
class Tile:
    """Sizes for one grouped matmul. block_m must be the one that the slots were sorted with."""

    block_m: int  # tokens
    block_n: int  # rows of the weight
    block_k: int = 128
    num_warps: int = 4
    num_stages: int = 4
    group_m: int = 1


@dataclass(frozen=True)
class MoETiles:
    """Both matmuls of a layer; they share block_m, and so the sort."""

    gate_up: Tile
    down: Tile


def choose(problem: Problem) -> MoETiles:
    """Tiles for both matmuls."""
    rows = problem.num_slots / problem.num_experts  # of an expert, if they spread evenly
    for block_m in (8, 16, 32, 64):
        if rows <= block_m / 2:
            tile = Tile(block_m, 64)
            return MoETiles(tile, tile)
    tile = Tile(128, 128, num_warps=8, num_stages=3, group_m=4)
    return MoETiles(tile, tile)
