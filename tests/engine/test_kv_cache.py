"""Pages move as they should: sharing, windows, reuse in order, and a check that can fail."""

from array import array
from typing import Any

import pytest

from headrace.engine.kv_cache import KVCache, PagePool
from headrace.engine.messages import SamplingParams
from headrace.engine.request import Request

BLOCK = 4


def request(tokens: list[int], adapter: str | None = None, **params: Any) -> Request:
    return Request(
        request_id="r",
        prompt_len=len(tokens),
        params=SamplingParams(max_tokens=1, **params),
        adapter=adapter,
        arrival=(0.0, 0),
        seed=0,
        token_ids=array("q", tokens),
        limit=1000,
    )


def computed(cache: KVCache, tokens: list[int], **kwargs: Any) -> Request:
    """A request with all of its tokens in the cache."""
    made = request(tokens, **kwargs)
    cache.attach(made, cache.match(made))
    pending = made.num_pending
    assert cache.grow(made, pending) == pending
    cache.commit(made, pending)
    return made


def cache_of(windows: tuple[int, ...] = (0,), pages: int = 20) -> KVCache:
    return KVCache(windows, [pages] * len(windows), BLOCK, find_prefixes=True)


def test_a_prefix_shares_its_pages() -> None:
    cache = cache_of()
    first = computed(cache, list(range(10)))
    second = computed(cache, [*range(8), 50, 51])
    assert list(second.block_tables[0][:2]) == list(first.block_tables[0][:2])
    assert second.block_tables[0][2] != first.block_tables[0][2]
    assert cache.pools[0].refcounts.count(2) == 2
    cache.check([first, second])
    cache.release(first)
    cache.check([second])
    cache.release(second)
    assert cache.usage == 0


def test_a_hash_covers_all_tokens_before_the_block() -> None:
    cache = cache_of()
    cache.release(computed(cache, list(range(12))))
    assert cache.match(request([*range(12), 99])) == 3
    assert cache.match(request([*range(11), 99, 99])) == 2
    assert cache.match(request([99, *range(1, 12), 99])) == 0
    assert cache.match(request([*range(12), 99], adapter="a")) == 0


def test_the_last_token_is_left_to_compute() -> None:
    cache = cache_of()
    cache.release(computed(cache, list(range(12))))
    assert cache.match(request(list(range(12)))) == 2
    assert cache.match(request(list(range(4)))) == 0


def test_window_pages_are_given_back() -> None:
    cache = cache_of((0, 6))
    made = computed(cache, list(range(30)))
    # the next token, at 30, sees 25..30: block 6 (24..27) is the first it needs
    assert list(made.block_tables[1][:6]) == [-1] * 6
    assert min(made.block_tables[1][6:]) >= 0
    assert len(cache.pools[1].free) == 20 - 2
    assert len(cache.pools[0].free) == 20 - 8
    cache.check([made])


def test_a_hit_needs_all_pages_of_full_groups_and_the_last_of_windows() -> None:
    cache = cache_of((0, 6))
    cache.release(computed(cache, list(range(30))))
    full, window = cache.pools
    probe = [*range(28), 99, 99]
    assert cache.match(request(probe)) == 7
    forget(window, 0)  # far outside of the window
    assert cache.match(request(probe)) == 7
    hit = computed(cache, probe)
    assert list(hit.block_tables[1][:5]) == [-1] * 5
    cache.release(hit)
    forget(window, 6, tokens=probe)
    assert cache.match(request(probe)) == 6
    forget(full, 2, tokens=probe)
    assert cache.match(request(probe)) == 0, "a short prefix needs block 0 in both groups"


def test_a_short_prefix_without_its_window_hides_no_longer_one() -> None:
    for windows in [(0, 6), (6, 0)]:
        cache = cache_of(windows)
        cache.release(computed(cache, list(range(30))))
        forget(cache.pools[windows.index(6)], 0)
        assert cache.match(request([*range(28), 99, 99])) == 7


def forget(pool: PagePool, block: int, tokens: list[int] | None = None) -> None:
    named = request(tokens or list(range(30)))
    named.extend_hashes(block + 1, BLOCK)
    page = pool.page_of.pop(named.block_hashes[block])
    del pool.hash_of[page]


def test_reuse_takes_unfindable_pages_first_then_the_oldest() -> None:
    cache = cache_of(pages=6)
    old = computed(cache, [1] * 8)
    new = computed(cache, [2] * 9)
    old_pages, new_pages = list(old.block_tables[0]), list(new.block_tables[0])
    cache.release(old)
    cache.release(new)
    order = list(cache.pools[0].free)
    assert order[0] == new_pages[2]  # not full, so nobody can find it
    # continuations go before their prefixes
    assert order[2:] == [*reversed(old_pages), *reversed(new_pages[:2])]


def test_growth_stops_where_the_pages_end() -> None:
    cache = cache_of(pages=3)
    made = request(list(range(30)))
    cache.attach(made, 0)
    assert cache.grow(made, 30) == 12
    cache.commit(made, 12)
    assert cache.grow(made, 18) == 0
    cache.check([made])


def test_the_check_finds_leaks() -> None:
    cache = cache_of()
    made = computed(cache, list(range(10)))
    with pytest.raises(AssertionError):
        cache.check([])
    cache.pools[0].free[made.block_tables[0][0]] = None
    with pytest.raises(AssertionError):
        cache.check([made])
