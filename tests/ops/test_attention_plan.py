"""Plans against brute force: every visible key of every row is taken exactly once, in order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.ops import attention_plan as ap
from headrace.ops.attention_plan import AttentionTile, PlanShape, plan_shape

GPT_OSS = plan_shape(8192, 256, 64, 8, 64)


def items_of(words: np.ndarray) -> np.ndarray:
    return words[ap.HEADER :].reshape(-1, len(ap.FIELDS))


def plan(sequences: list[tuple[int, int]], window: int, shape: PlanShape) -> np.ndarray:
    """Sequences as (tokens in all, rows of this step)."""
    lengths, rows = np.array(sequences, np.int32).reshape(-1, 2).T
    words = ap.plan_attention(rows, lengths, window, shape)
    assert words.dtype == np.int32
    assert words[0] == len(items_of(words)) <= shape.max_items
    assert len(words) <= shape.counters_start
    return items_of(words)


def cuts(num_keys: int) -> list[int]:
    """Where splits begin, one by one."""
    found, key = [], 0
    while key < num_keys:
        found.append(key)
        key += 128 if key < 1024 else 512 if key < 8192 else 2048
    return found


def check(sequences: list[tuple[int, int]], window: int, shape: PlanShape) -> None:
    items = plan(sequences, window, shape)
    starts = np.cumsum([0, *(rows for _, rows in sequences)])
    covered: dict[int, tuple[int, int]] = {}  # row of q -> its tile's first row, parts
    part_rows, counters = set(), set()
    keys = shape.tile.keys
    for item in items:
        row, count, position, seq = item[:4]
        length, rows = sequences[seq]
        assert starts[seq] <= row < row + count <= starts[seq + 1]
        assert 0 < count <= shape.tile_tokens
        assert position == length - rows + row - starts[seq]
        end = -(-(position + count) // keys)
        first = max(0, position - window + 1) // keys if window else 0
        parts, part = item[ap.PARTS], item[ap.PART]
        if parts == 1:
            assert (item[ap.FIRST_BLOCK], item[ap.END_BLOCK]) == (first, end)
        else:
            bounds = [*(c // keys for c in cuts(end * keys)), end]
            assert (item[ap.FIRST_BLOCK], item[ap.END_BLOCK]) == (bounds[part], bounds[part + 1])
            assert parts == len(bounds) - 1
            mine = range(item[ap.PART_ROW], item[ap.PART_ROW] + count)
            assert part_rows.isdisjoint(mine)
            assert mine.stop <= shape.max_part_rows
            part_rows.update(mine)
            if part == 0:
                assert item[ap.COUNTER] not in counters
                counters.add(item[ap.COUNTER])
        for r in range(row, row + count):
            assert covered.setdefault(r, (row, 0))[0] == row
            covered[r] = (row, covered[r][1] + 1)
    assert sorted(covered) == list(range(starts[-1]))
    for row, count, *_, parts, part, part_row, counter in items:
        assert all(covered[r][1] == parts for r in range(row, row + count))
        if parts > 1:
            assert 0 <= counter < shape.max_part_rows // 2
            same = items[(items[:, ap.ROW] == row)]
            assert set(same[:, ap.COUNTER]) == {counter}
            assert set(same[:, ap.PART_ROW] - same[:, ap.PART] * count) == {part_row - part * count}
    blocks = items[:, ap.END_BLOCK] - items[:, ap.FIRST_BLOCK]
    assert (np.diff(blocks) <= 0).all()


sequences = st.lists(
    st.tuples(st.sampled_from([1, 5, 128, 129, 1023, 1024, 1500, 8192, 9000, 131072]),
              st.sampled_from([1, 1, 1, 7, 8, 9, 100])).map(lambda s: (max(s), s[1])),
    max_size=12,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    sequences,
    st.sampled_from([0, 0, 1, 128]),
    st.sampled_from([(64, 8), (5, 1), (4, 4)]),
    st.sampled_from([0, 3, 100, 2048]),
    st.sampled_from([1, 20, 132]),
    st.sampled_from([64, 128]),
)
def test_every_row_gets_its_keys_once(sequences, window, heads, part_rows, sms, keys) -> None:
    tile = AttentionTile(keys=keys)
    check(sequences, window, plan_shape(1200, 12, *heads, 64, sms, part_rows, tile))


@pytest.mark.parametrize("field", range(len(ap.FIELDS)))
def test_a_wrong_item_is_noticed(field: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = [(3000, 1), (40, 9)]
    check(batch, 0, GPT_OSS)

    right = ap.plan_attention

    def wrong(*args) -> np.ndarray:
        words = right(*args)
        item = items_of(words)[3]
        assert item[ap.PARTS] > 1
        item[field] += 1
        return words

    monkeypatch.setattr(ap, "plan_attention", wrong)
    with pytest.raises((AssertionError, IndexError)):
        check(batch, 0, GPT_OSS)


def test_splits_are_where_they_are_said_to_be() -> None:
    expected = cuts(200_000)
    found = ap.first_key_of(np.arange(len(expected)))
    assert found.tolist() == expected
    lengths = np.array([0, 1, 128, 129, 1024, 1025, 8192, 8193, 131072])
    assert ap.num_splits(lengths).tolist() == [len(cuts(n)) for n in lengths] != []
    assert ap.num_splits(np.array([131072])) == 82
    assert all(c % 128 == 0 for c in expected)


def test_short_contexts_in_a_large_batch_are_left_whole() -> None:
    assert set(plan([(600, 1)] * 64, 0, GPT_OSS)[:, ap.PARTS]) == {1}
    assert len(plan([(600, 1)], 0, GPT_OSS)) == 5
    one_long = plan([(600, 1)] * 63 + [(131072, 1)], 0, GPT_OSS)
    assert len(one_long) == 63 + 82


def test_the_longest_are_split_first_where_not_all_can_be() -> None:
    shape = replace(GPT_OSS, max_part_rows=90, split_above=0.0)
    items = plan([(8000, 1), (131072, 1), (9000, 1)], 0, shape)
    assert {s: int((items[:, ap.SEQ] == s).sum()) for s in range(3)} == {0: 1, 1: 82, 2: 1}


def test_windows_are_never_split() -> None:
    items = plan([(131072, 1), (130, 1)], 128, GPT_OSS)
    assert items[:, [ap.FIRST_BLOCK, ap.END_BLOCK]].tolist() == [[0, 3], [2046, 2048]]
    assert set(items[:, ap.PARTS]) == {1}


def test_large_chunks_get_more_programs() -> None:
    assert [GPT_OSS.grid(n) for n in (1, 128, 2048, 8192)] == [1056, 1056, 1056, 4096]


def test_empty_batch() -> None:
    assert len(plan([], 0, GPT_OSS)) == 0
    assert len(plan([(5, 0)], 0, GPT_OSS)) == 0


def test_too_many_rows_are_refused() -> None:
    shape = plan_shape(16, 2, 64, 8, 64, max_part_rows=0)
    assert len(plan([(20, 8), (20, 8)], 0, shape)) == 2
    with pytest.raises(
        ValueError, match="17 tiles of 8 rows need 17 items, the plan has room for 4"
    ):
        plan([(131, 131)], 0, shape)


@pytest.mark.parametrize(("heads", "kv_heads"), [(7, 2), (65, 1)])
def test_heads_that_do_not_fit_are_refused(heads: int, kv_heads: int) -> None:
    with pytest.raises(ValueError, match=f"{heads} heads on {kv_heads} KV heads"):
        plan_shape(16, 2, heads, kv_heads, 64)


@pytest.mark.parametrize(("num_heads", "rows"), [(64, 16), (8, 16), (160, 32)])
def test_single_rows_have_tiles_of_one_token(num_heads: int, rows: int) -> None:
    plan = ap.empty_plan(plan_shape(64, 8, num_heads, 8, 16, max_part_rows=16), 0, "cpu")
    for query_lens in ([1], [1, 1, 0]):
        single = plan.for_rows(np.array(query_lens))
        assert single.tile == replace(plan.shape.tile, rows=rows, num_stages=3)
        assert single.words is plan.words
    for query_lens in ([2], [1, 64, 1]):
        assert plan.for_rows(np.array(query_lens)).tile == plan.shape.tile
