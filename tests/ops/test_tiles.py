from __future__ import annotations

import pytest

from headrace.ops.tiles import Problem, Tile, choose, shared_bytes

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
ADA, AMPERE, HOPPER = 99 * 1024, 163 * 1024, 227 * 1024


@pytest.mark.parametrize("shared_memory", [ADA, AMPERE, HOPPER])
@pytest.mark.parametrize("mxfp4", [True, False])
@pytest.mark.parametrize("num_experts", [8, 32, 128])
def test_every_choice_fits(num_experts: int, mxfp4: bool, shared_memory: int) -> None:
    for num_tokens in SIZES:
        tiles = choose(Problem(num_tokens * 4, num_experts, mxfp4, shared_memory))
        for tile in (tiles.gate_up, tiles.down):
            assert shared_bytes(tile, mxfp4) <= shared_memory
            assert tile.num_stages >= 2
            widths = (*tile.narrow, tile.block_m)
            assert list(widths) == sorted(set(widths))
            assert min(widths) >= 16  # one matrix instruction for every number of tokens
            assert tile.block_n % 64 == 0
            assert tile.block_k % (128 if mxfp4 else 64) == 0
        assert tiles.gate_up.block_m == tiles.down.block_m  # one sort for both


@pytest.mark.parametrize("num_experts", [32, 128])
def test_what_was_measured_is_taken_as_it_is(num_experts: int) -> None:
    """On an H100 nothing needs to be made smaller, and more memory changes nothing."""
    for num_tokens in SIZES:
        problem = Problem(num_tokens * 4, num_experts)
        roomy = Problem(num_tokens * 4, num_experts, shared_memory=10 * HOPPER)
        assert choose(problem) == choose(roomy)


def test_faster_memory_wants_wider_tiles() -> None:
    """An H200's SMs have to ask for more bytes at once; at few tokens there are too few tiles."""
    for num_slots, width in ((8, 64), (16, 128), (256, 128)):
        tiles = choose(Problem(num_slots, 32, memory_tb_per_s=4.9))
        assert (tiles.gate_up.block_n, tiles.down.block_n) == (width, width)
        assert choose(Problem(num_slots, 32)).gate_up.block_n == 64


@pytest.mark.parametrize(
    ("tile", "mxfp4", "compiled"),
    [  # bytes of the kernels compiled for sm_80, and for sm_90
        (Tile(16, 64, num_stages=5), True, (33792, 37888)),
        (Tile(16, 128, num_stages=5), True, (83968, 55296)),
        (Tile(32, 64, num_stages=3), True, (41472, 33280)),
        (Tile(128, 128, num_stages=3), True, (115712, 115712)),
        (Tile(16, 64, num_stages=5), False, (81920, 102400)),
        (Tile(128, 128, num_stages=3), False, (131072, 196608)),
    ],
)
def test_the_estimate_is_an_upper_bound(tile: Tile, mxfp4: bool, compiled: tuple[int, int]) -> None:
    assert max(compiled) <= shared_bytes(tile, mxfp4) <= 1.35 * max(compiled)
