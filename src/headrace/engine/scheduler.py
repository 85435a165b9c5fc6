"""Which requests run in a step, and how many tokens of each: continuous batching."""

from __future__ import annotations

import time
from bisect import insort

from headrace.engine.kv_cache import KVCache
from headrace.engine.request import Request

# Rows of logits that prompt logprobs may take in a step: 206 MB at 201,088 tokens of vocabulary.
MAX_SCORED_ROWS = 256

Plan = dict[Request, int]  # tokens to compute, in the order of the batch


def by_arrival(request: Request) -> tuple[float, int]:
    """Sort key: first come, first served."""
    return request.arrival


class Scheduler:
    """Queues of waiting and running requests, both in order of arrival.

    A step takes one token of each decoding request, then prefill chunks of running ones, then of
    new ones, up to max_num_batched_tokens. When pages run out, the running request that arrived
    last gives back all of its pages and computes its tokens again later. The one that arrived
    first is never stopped, so every request ends.
    """

    def __init__(self, cache: KVCache, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.cache = cache
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self._left = 0  # tokens that the step has still room for
        self.num_preemptions = 0
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0

    def add(self, request: Request) -> None:
        """Queue a request by its arrival."""
        insort(self.waiting, request, key=by_arrival)

    def remove(self, request: Request) -> None:
        """Forget a request, finished or not, and free its pages."""
        queue = self.running if request in self.running else self.waiting
        queue.remove(request)
        self.cache.release(request)

    def schedule(self) -> Plan:
        """Choose the next step's work and take the pages for it."""
        plan: Plan = {}
        self._left = self.max_num_batched_tokens
        preemptions = self.num_preemptions
        running = [request for request in self.running if not request.ends_in_flight]
        decoding = [request for request in running if request.num_pending == 1]
        prefilling = [request for request in running if request.num_pending > 1]
        for request in decoding + prefilling:
            if request.block_tables:  # else it was preempted for one before it
                self._extend(request, plan)
        if self.num_preemptions == preemptions:
            while self.waiting and len(self.running) < self.max_num_seqs:
                if not self._admit(self.waiting[0], plan):
                    break
        return plan

    def _chunk(self, request: Request, plan: Plan) -> int:
        """The most tokens of a request that the step still has room for."""
        chunk = min(request.num_pending, self._left)
        if request.owes_prompt_logprobs:
            scored = sum(n for other, n in plan.items() if other.owes_prompt_logprobs)
            chunk = min(chunk, MAX_SCORED_ROWS - scored)
        return chunk

    def _extend(self, request: Request, plan: Plan) -> None:
        """Plan the next tokens of a running request, at the expense of later ones if need be."""
        chunk = self._chunk(request, plan)
        if chunk == 0:
            return
        while (num_tokens := self.cache.grow(request, chunk)) == 0:
            last = self.running[-1]
            self._preempt(last, plan)
            if last is request:
                return
        plan[request] = num_tokens
        self._left -= num_tokens

    def _preempt(self, request: Request, plan: Plan) -> None:
        """Back to the queue: all of its tokens, outputs too, become its prompt."""
        assert len(self.running) > 1, "the cache can't hold one request"
        self.running.remove(request)
        self._left += plan.pop(request, 0)
        self.cache.release(request)
        self.num_preemptions += 1
        self.add(request)

    def _admit(self, request: Request, plan: Plan) -> bool:
        """Start a waiting request if the step and the cache have room for it."""
        if self._chunk(request, plan) == 0:
            return False
        num_matched = self.cache.match(request)
        # one spare page for each running request, or else it would be preempted at once
        spare = len(self.running)
        if self.running and not self.cache.fits(request, num_matched, spare):
            return False
        self.cache.attach(request, num_matched)
        num_tokens = self.cache.grow(request, self._chunk(request, plan))
        if num_tokens == 0:
            assert self.running, "the cache can't hold one request"
            self.cache.release(request)
            return False
        self.waiting.remove(request)
        insort(self.running, request, key=by_arrival)
        plan[request] = num_tokens
        self._left -= num_tokens
        self._count_admission(request)
        return True

    def _count_admission(self, request: Request) -> None:
        if request.num_cached is not None:
            return  # preempted: what it finds are its own tokens, not another request's
        request.num_cached = request.num_computed
        request.queued_s = max(0.0, time.monotonic() - request.arrival[0])
        if self.cache.looks_up(request):
            self.prefix_cache_queries += request.num_tokens
            self.prefix_cache_hits += request.num_computed
