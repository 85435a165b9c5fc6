from itertools import pairwise

import pytest

from headrace.engine.graphs import chunk_sizes, graph_sizes


@pytest.mark.parametrize("max_rows", [1, 2, 7, 8, 64, 100, 256])
def test_sizes_hold_every_batch_with_little_padding(max_rows: int) -> None:
    sizes = graph_sizes(max_rows)
    assert sizes[-1] == max_rows
    for rows in range(1, max_rows + 1):
        padded = min(size for size in sizes if size >= rows)
        assert padded <= rows * 5 / 4


def test_sizes_of_64() -> None:
    assert graph_sizes(64) == [
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        8,
        10,
        12,
        14,
        16,
        20,
        24,
        28,
        32,
        40,
        48,
        56,
        64,
    ]


@pytest.mark.parametrize(
    ("max_tokens", "has_lora", "smallest", "largest"),
    [
        (8192, False, 16, 1024),
        (8192, True, 16, 2048),
        (1500, True, 16, 1500),
        (100, True, 16, 100),
        (9, False, 9, 9),
    ],
)
def test_sizes_of_steps_with_chunks(
    max_tokens: int, has_lora: bool, smallest: int, largest: int
) -> None:
    sizes = chunk_sizes(max_tokens, has_lora)
    assert sizes == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (smallest, largest)
    assert all(b <= a * 5 / 4 for a, b in pairwise(sizes))
