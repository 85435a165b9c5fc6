"""Pages of the KV cache: who holds them, and which prefixes can be found again.

A page holds block_size tokens of every layer of one KV group. A request's page of block i is
block_tables[group][i]. Full blocks are known by a hash of all tokens up to their end; a page
that nobody holds keeps its content, and can be found by that hash, until it is reused.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from headrace.engine.request import Request


class PagePool:
    """Pages of one group: reference counts, a free list in order of reuse, and an index by hash."""

    def __init__(self, num_pages: int) -> None:
        self.refcounts = [0] * num_pages
        self.free = OrderedDict.fromkeys(range(num_pages))  # reused from the front
        self.page_of: dict[bytes, int] = {}
        self.hash_of: dict[int, bytes] = {}

    def take(self) -> int:
        """A page of its own for the caller; its old content can no longer be found."""
        page, _ = self.free.popitem(last=False)
        self.refcounts[page] = 1
        old = self.hash_of.pop(page, None)
        if old is not None:
            del self.page_of[old]
        return page

    def share(self, page: int) -> None:
        """One more holder of a page that was found by its hash."""
        if self.refcounts[page] == 0:
            del self.free[page]
        self.refcounts[page] += 1

    def give_back(self, page: int) -> None:
        """One holder less; the last one frees it. Pages that can't be found are reused first."""
        assert self.refcounts[page] > 0, page
        self.refcounts[page] -= 1
        if self.refcounts[page] == 0:
            self.free[page] = None
            if page not in self.hash_of:
                self.free.move_to_end(page, last=False)

    def name(self, page: int, block_hash: bytes) -> None:
        """Make a full page findable, unless a page with the same content already is."""
        if block_hash not in self.page_of and page not in self.hash_of:
            self.page_of[block_hash] = page
            self.hash_of[page] = block_hash

    @property
    def usage(self) -> float:
        """Share of the pages that somebody holds."""
        return 1 - len(self.free) / len(self.refcounts)


class KVCache:
    """The pools of all groups, and the moves that a scheduler makes with a request's pages."""

    def __init__(
        self, windows: Sequence[int], num_pages: Sequence[int], block_size: int, find_prefixes: bool
    ) -> None:
        self.windows = tuple(windows)
        self.pools = [PagePool(n) for n in num_pages]
        self.block_size = block_size
        self.find_prefixes = find_prefixes

    def first_visible_block(self, window: int, position: int) -> int:
        """The first block that a query at this position sees."""
        return max(0, position - window + 1) // self.block_size if window else 0

    def looks_up(self, request: Request) -> bool:
        """Whether a prefix may be found: who scores a prompt computes all of it."""
        return self.find_prefixes and not request.owes_prompt_logprobs

    def match(self, request: Request) -> int:
        """Blocks of the longest usable cached prefix; the last token is always left to compute.

        A prefix of n blocks is usable if each group has the blocks that the token after it
        sees: all n for full attention, the last few for a window.
        """
        if not self.looks_up(request):
            return 0
        longest = (request.num_tokens - 1) // self.block_size
        request.extend_hashes(longest, self.block_size)
        runs = [0] * len(self.pools)  # consecutive blocks found, up to this one
        best = 0
        for n, block_hash in enumerate(request.block_hashes[:longest], 1):
            usable = True
            for g, (window, pool) in enumerate(zip(self.windows, self.pools, strict=True)):
                runs[g] = runs[g] + 1 if block_hash in pool.page_of else 0
                needed = n - self.first_visible_block(window, n * self.block_size)
                usable &= runs[g] >= needed
                if not window and runs[g] < needed:  # nor is any longer prefix usable
                    return best
            best = n if usable else best
        return best

    def fits(self, request: Request, num_matched: int, spare: int) -> bool:
        """Whether the full groups have pages for all of a waiting request, and spare ones."""
        for window, pool in zip(self.windows, self.pools, strict=True):
            if window:
                continue
            pages = [pool.page_of[h] for h in request.block_hashes[:num_matched]]
            idle = sum(pool.refcounts[page] == 0 for page in pages)
            fresh = -(-request.num_tokens // self.block_size) - num_matched
            if fresh + idle + spare > len(pool.free):
                return False
        return True

    def attach(self, request: Request, num_matched: int) -> None:
        """Start a request's block tables with the pages of its cached prefix."""
        assert not request.block_tables
        for window, pool in zip(self.windows, self.pools, strict=True):
            first = self.first_visible_block(window, num_matched * self.block_size)
            first = min(first, num_matched)
            pages = [pool.page_of[h] for h in request.block_hashes[first:num_matched]]
            for page in pages:
                pool.share(page)
            request.block_tables.append(array("i", [-1] * first + pages))
            request.first_block.append(first)
        request.num_computed = num_matched * self.block_size
        request.num_named = num_matched

    def grow(self, request: Request, num_tokens: int) -> int:
        """Take pages for up to num_tokens more tokens; returns for how many there were pages."""
        for table, pool in zip(request.block_tables, self.pools, strict=True):
            capacity = (len(table) + len(pool.free)) * self.block_size
            num_tokens = min(num_tokens, capacity - request.num_computed)
        num_blocks = -(-(request.num_computed + num_tokens) // self.block_size)
        for table, pool in zip(request.block_tables, self.pools, strict=True):
            while len(table) < num_blocks:
                table.append(pool.take())
        return num_tokens

    def commit(self, request: Request, num_tokens: int) -> None:
        """Note that num_tokens more tokens are in the cache.

        Full blocks of known tokens can be found from now on; pages before the window of the next
        token are given back.
        """
        request.num_computed += num_tokens
        num_known = min(request.num_computed, len(request.token_ids)) // self.block_size
        if self.find_prefixes:
            request.extend_hashes(num_known, self.block_size)
        for g, (window, pool) in enumerate(zip(self.windows, self.pools, strict=True)):
            table = request.block_tables[g]
            if self.find_prefixes:
                for i in range(max(request.num_named, request.first_block[g]), num_known):
                    pool.name(table[i], request.block_hashes[i])
            visible = self.first_visible_block(window, request.num_computed)
            for i in range(request.first_block[g], visible):
                pool.give_back(table[i])
                table[i] = -1
            request.first_block[g] = visible
        request.num_named = num_known

    def release(self, request: Request) -> None:
        """Give back every page, last blocks first, so that a prefix outlives its continuations."""
        for g, table in enumerate(request.block_tables):
            for page in reversed(table[request.first_block[g] :]):
                self.pools[g].give_back(page)
        request.block_tables, request.first_block = [], []
        request.num_computed = request.num_named = 0

    @property
    def usage(self) -> float:
        """Share of the pages in use, in the fullest group."""
        return max(pool.usage for pool in self.pools)

    def check(self, holders: Iterable[Request]) -> None:
        """Assert that counts, free lists and indexes add up to the holders' block tables."""
        holders = list(holders)
        for g, pool in enumerate(self.pools):
            counts = [0] * len(pool.refcounts)
            for request in holders:
                for page in request.block_tables[g][request.first_block[g] :]:
                    counts[page] += 1
            assert counts == pool.refcounts, (g, counts, pool.refcounts)
            assert {p for p, n in enumerate(counts) if n == 0} == set(pool.free), g
            assert {p: h for h, p in pool.page_of.items()} == pool.hash_of, g
