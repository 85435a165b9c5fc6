"""Tile sizes of the dense linear layer: a pure function from a frozen problem to a frozen choice.

No choice changes a bit of the result: see `linear_kernel`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class LinearProblem:
    """What the choice depends on."""

    num_tokens: int
    out_features: int
    num_sms: int = 132  # an H100's
    shared_memory: int = 227 * 1024  # bytes that one program can have


@dataclass(frozen=True)
class LinearTile:
    """Sizes of one program, and how many of its loads are under way."""

    block_m: int  # tokens
    block_n: int  # rows of the matrix instruction's tall side
    rows: int  # rows of the weight among them; the others are zeros, and are not read
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 1


def choose(problem: LinearProblem) -> LinearTile:
    """The tile for one problem."""
    if problem.num_tokens > 128:
        return _for_arithmetic(problem)
    block_m = max(16, _power_of_2(problem.num_tokens))
    # Few tokens wait for the weights: every SM takes an equal share of the rows. A multiple of 8
    # rows keeps the stores 16 bytes wide.
    rows = _cdiv(_cdiv(problem.out_features, problem.num_sms), 8) * 8
    if rows <= 64:
        return _fitted(problem, LinearTile(block_m, 64, rows, 128, num_warps=4, num_stages=8))
    if block_m <= 32:
        return _fitted(problem, LinearTile(block_m, 64, 64, 128, 4, 4), programs_per_sm=2)
    return _fitted(problem, LinearTile(block_m, 128, 128, 64, 8, 4), programs_per_sm=2)


def _for_arithmetic(problem: LinearProblem) -> LinearTile:
    """Many tokens: the largest tile of which there are enough for all SMs."""
    programs = _cdiv(problem.num_tokens, 256) * _cdiv(problem.out_features, 128)
    if programs >= 2 * problem.num_sms and problem.shared_memory > 160 * 1024:
        return _fitted(problem, LinearTile(256, 128, 128, 64, num_warps=8, num_stages=4, group_m=8))
    tile = LinearTile(128, 128, 128, 64, num_warps=8, num_stages=4, group_m=8)
    return _fitted(problem, tile, programs_per_sm=2)


def _fitted(problem: LinearProblem, tile: LinearTile, programs_per_sm: int = 1) -> LinearTile:
    """As many stages as asked for, or fewer if shared memory holds no more."""
    # a program has 1 KiB more than it asks for
    left = problem.shared_memory // programs_per_sm - 1024 * (programs_per_sm - 1)
    stages = left // ((tile.block_m + tile.block_n) * tile.block_k * 2)
    return replace(tile, num_stages=max(2, min(tile.num_stages, stages)))


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
