import pytest

from headrace.ops.linear_tiles import LinearProblem, choose

SIZES = (1, 16, 17, 64, 128, 129, 512, 2048, 16384)


@pytest.mark.parametrize("num_tokens", SIZES)
@pytest.mark.parametrize("out_features", [1, 33, 512, 2880, 5120, 201088])
@pytest.mark.parametrize("shared_memory", [99 * 1024, 163 * 1024, 227 * 1024])
def test_the_tile_fits(num_tokens, out_features, shared_memory):
    tile = choose(LinearProblem(num_tokens, out_features, 2880, shared_memory=shared_memory))
    assert tile.block_m >= 16  # 8 columns would be another matrix instruction
    assert tile.block_n >= 64
    assert 0 < tile.rows <= tile.block_n
    assert tile.num_stages >= 2
    stages = (tile.block_m + tile.block_n) * tile.block_k * 2 * tile.num_stages
    # float32, in four parts; a tile of 64 tokens takes what one of 128 does
    to_store = max(tile.block_m, 128) * tile.block_n if tile.programs else 0
    assert stages + to_store < shared_memory


def test_few_tokens_use_every_sm_once():
    for out_features in (5120, 2880):
        for num_tokens in (1, 16, 32):
            tile = choose(LinearProblem(num_tokens, out_features, 2880))
            programs = out_features / tile.rows * -(-num_tokens // tile.block_m)
            assert 0.9 * 132 < programs <= 132


def test_tma_only_where_it_can_read():
    assert choose(LinearProblem(64, 5120, 2880)).tma
    assert not choose(LinearProblem(64, 5120, 2880, has_tma=False)).tma
    assert not choose(LinearProblem(64, 5120, 2884)).tma  # rows of 16 bytes
    assert choose(LinearProblem(1000, 5128, 2880)).tma


def test_no_tma_for_tiles_that_are_mostly_zeros():
    assert not choose(LinearProblem(1, 5120, 2880)).tma  # 40 rows of 64


def test_programs_go_on_to_other_tiles_only_where_there_are_more_than_sms():
    one_each = choose(LinearProblem(512, 2880, 4096))
    assert (one_each.block_m, one_each.programs, one_each.num_stages) == (128, 0, 6)
    assert choose(LinearProblem(1024, 2880, 4096)).programs == 132
    assert choose(LinearProblem(512, 5120, 2880)).block_m == 256
