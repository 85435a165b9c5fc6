"""Tile sizes of the dense linear layer: a pure function from a frozen problem to a frozen choice.

No choice changes a bit of the result: see `linear_kernel`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class LinearProblem:
    """What the choice depends on. The defaults are an H100's."""

    num_tokens: int
    out_features: int
    in_features: int
    num_sms: int = 132
    shared_memory: int = 227 * 1024  # bytes that one program can have
    has_tma: bool = True

    @property
    def large_tiles(self) -> bool:
        """Whether 128 x 256 fits: loads by TMA spare registers."""
        return self.has_tma and self.shared_memory > 160 * 1024


@dataclass(frozen=True)
class LinearTile:
    """Sizes of one program, and how its operands get to it."""

    block_m: int  # tokens
    block_n: int  # height of the tile: rows of the matrix instruction's tall side
    rows: int  # rows of the weight in the tile; the others are zeros, and nothing is read for them
    block_k: int
    num_warps: int
    num_stages: int  # steps over K whose loads are under way
    group_m: int = 1  # blocks of tokens that share weights while they are in L2
    tma: bool = False  # sm_90; see `tma_fits`
    programs: int = 0  # with tma: so many compute tile after tile; 0: one a tile


def choose(problem: LinearProblem) -> LinearTile:
    """The tile for one problem."""
    if problem.num_tokens > 128:
        return _for_arithmetic(problem)
    # Few tokens wait for the weights: every SM takes an equal share of the rows. A multiple of 8
    # rows keeps the stores 16 bytes wide.
    rows = _cdiv(_cdiv(problem.out_features, problem.num_sms), 8) * 8
    block_m = max(16, _power_of_2(problem.num_tokens))
    if rows > 64:
        return _for_streaming(problem, block_m)
    if block_m <= 32:
        # TMA takes as long for the zeros of a tile as for its rows: 16.1 us against 11.0 (output)
        tile = LinearTile(block_m, 64, rows, 128, num_warps=4, num_stages=8)
        return _fitted(replace(problem, has_tma=False), tile)
    # every program reads all tokens: fewer and full tiles (15.5 us against 27.2, 128 tokens)
    tile = LinearTile(block_m, 64, 64, 64, num_warps=4, num_stages=8)
    return _fitted(problem, tile, persistent=False)


def tma_fits(problem: LinearProblem, rows: int, block_n: int) -> bool:
    """Whether TMA can read it: rows of 16 bytes, and equal shares where the tile is not full."""
    return problem.in_features % 8 == 0 and (rows == block_n or problem.out_features % rows == 0)


def _for_streaming(problem: LinearProblem, block_m: int) -> LinearTile:
    """Few tokens and many rows, as in the LM head: tile after tile, the loads never pause."""
    if block_m <= 32:
        tile = LinearTile(block_m, 64, 64, 128, num_warps=4, num_stages=8)
        return _fitted(problem, tile, programs_per_sm=2)
    rows = 256 if problem.large_tiles else 128  # the taller, the less often is x read
    return _fitted(problem, LinearTile(block_m, rows, rows, 64, num_warps=8, num_stages=8))


def _for_arithmetic(problem: LinearProblem) -> LinearTile:
    """Many tokens: the tile whose operands, step by step and round by round, are the least.

    They come from L2, and at these sizes an SM waits for them more than for the arithmetic.
    """
    block_n = 128

    def cost(block_m: int) -> int:
        tiles = _cdiv(problem.num_tokens, block_m) * _cdiv(problem.out_features, block_n)
        return _cdiv(tiles, problem.num_sms) * (block_m + block_n)

    block_m = min((256, 128) if problem.large_tiles else (128,), key=cost)
    tile = LinearTile(block_m, block_n, block_n, 64, num_warps=8, num_stages=4, group_m=8)
    if block_m == 128:
        # an SM has one tile, seldom two: the memory to store one while the next is computed holds
        # more stages instead (512 tokens of output: 24.5 us, not 26.5)
        return _fitted(problem, replace(tile, num_stages=6), persistent=False)
    return _fitted(problem, tile)


def _fitted(
    problem: LinearProblem, tile: LinearTile, programs_per_sm: int = 1, persistent: bool = True
) -> LinearTile:
    """With TMA where it can read; with the stages asked for, or fewer if memory holds no more."""
    tma = problem.has_tma and tma_fits(problem, tile.rows, tile.block_n)
    programs = programs_per_sm * problem.num_sms if tma and persistent else 0
    # each program has 1 KiB for the system, and its barriers; a persistent one stores a tile
    # through memory of its own, of float32 as much for 64 tokens as for 128
    memory = (problem.shared_memory - 1024) // programs_per_sm - 1024
    if programs:
        memory -= max(tile.block_m, 128) * tile.block_n
    stages = memory // ((tile.block_m + tile.block_n) * tile.block_k * 2)
    num_stages = max(2, min(tile.num_stages, stages))
    return replace(tile, num_stages=num_stages, tma=tma, programs=programs)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
