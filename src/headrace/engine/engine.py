"""The engine: requests in, tokens out, one step at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from itertools import count

from torch import Tensor

from headrace.config import EngineConfig
from headrace.engine.cache_size import cache_memory, plan_cache
from headrace.engine.kv_cache import KVCache
from headrace.engine.messages import (
    AddRequest,
    EngineReady,
    EngineStats,
    RequestOutput,
    TokenLogprobs,
)
from headrace.engine.request import Request, RequestError, new_request
from headrace.engine.runner import Runner
from headrace.engine.sampler import choose_tokens, score_tokens
from headrace.engine.scheduler import Plan, Scheduler
from headrace.engine.threads import set_cpu_threads
from headrace.models import Model, load_model


class Engine:
    """One model, its cache and its requests; not thread-safe, does nothing between calls.

    Raises:
        ConfigError: the flags don't fit each other, the checkpoint or the memory.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: Model | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        start = time.monotonic()
        self.config = config
        set_cpu_threads(config.model)
        self.model = model or load_model(config.model, config.device, config.dtype, progress)
        layout, dtype = self.model.kv_layout, self.model.dtype
        memory = cache_memory(config, self.model.device)
        positions = self.model.config.max_position_embeddings
        pages, self.max_model_len = plan_cache(layout, config, memory, dtype, positions)
        self.cache = KVCache(layout.windows, pages, config.block_size, config.enable_prefix_caching)
        self.runner = Runner(self.model, pages, config.block_size)
        self.scheduler = Scheduler(self.cache, config.max_num_seqs, config.max_num_batched_tokens)
        self.requests: dict[str, Request] = {}
        self.ready = EngineReady(
            self.max_model_len, pages, config.block_size, time.monotonic() - start
        )
        self._news: list[RequestOutput] = []  # refusals and aborts, told with the next step
        self._arrivals = count()
        self._num_steps = 0
        self._iteration_tokens: list[int] = []

    def add_request(self, message: AddRequest) -> None:
        """Queue a request; one that can't run is answered with an error output."""
        try:
            if message.request_id in self.requests:
                raise RequestError(f"request id {message.request_id!r} is already in use")
            vocab_size = self.model.config.vocab_size
            request = new_request(
                message, next(self._arrivals), self.config.seed, vocab_size, self.max_model_len
            )
        except RequestError as error:
            refusal = RequestOutput(message.request_id, [], finish_reason="error", error=str(error))
            self._news.append(refusal)
            return
        self.requests[request.request_id] = request
        self.scheduler.add(request)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget requests and free their pages at once; unknown ids are ignored."""
        for request_id in request_ids:
            request = self.requests.pop(request_id, None)
            if request is not None:
                self.scheduler.remove(request)
                self._news.append(request.output([], finish_reason="abort"))

    def has_work(self) -> bool:
        """Whether a step would do or tell anything."""
        return bool(self.requests or self._news)

    def step(self) -> list[RequestOutput]:
        """Compute one batch; returns the news of every request that has any."""
        outputs, self._news = self._news, []
        plan = self.scheduler.schedule()
        if not plan:
            assert not self.requests, "requests are waiting and nothing runs"
            return outputs
        sampling = [r for r, n in plan.items() if r.samples_after(n)]
        scoring = [(r, p) for r, n in plan.items() for p in r.unscored_positions(n)]
        logits = self.runner.forward(plan, output_rows(plan, sampling, scoring))
        for request, num_tokens in plan.items():
            self.cache.commit(request, num_tokens)
        self._score_prompts(logits[len(sampling) :], scoring)
        outputs += self._sample(logits[: len(sampling)], sampling)
        for request in plan:
            if request.params.max_tokens == 0 and request.num_pending == 0:
                outputs.append(self._finish(request, [], "length"))
        self._num_steps += 1
        self._iteration_tokens.append(sum(plan.values()))
        return outputs

    def _score_prompts(self, logits: Tensor, scoring: list[tuple[Request, int]]) -> None:
        """Add the log-probabilities of the prompt tokens after the scored positions."""
        tokens = [request.token_ids[position + 1] for request, position in scoring]
        num_top = [request.params.prompt_logprobs or 0 for request, _ in scoring]
        scores = score_tokens(logits, tokens, num_top)
        for (request, _), score in zip(scoring, scores, strict=True):
            request.prompt_logprobs.append(score)

    def _sample(self, logits: Tensor, requests: list[Request]) -> list[RequestOutput]:
        """Add a token to each request, and say so."""
        if not requests:
            return []
        tokens = choose_tokens(logits, requests)
        scores = self._score_outputs(logits, requests, tokens)
        outputs = []
        for i, (request, token) in enumerate(zip(requests, tokens, strict=True)):
            request.token_ids.append(token)
            reason = request.finish_reason(self.max_model_len)
            news = {"logprobs": [scores[i]] if i in scores else None}
            if reason is None:
                outputs.append(request.output([token], **news))
            else:
                outputs.append(self._finish(request, [token], reason, **news))
        return outputs

    def _score_outputs(
        self, logits: Tensor, requests: list[Request], tokens: list[int]
    ) -> dict[int, TokenLogprobs]:
        """Log-probabilities of the chosen tokens, by row, where they are wanted."""
        rows = [i for i, r in enumerate(requests) if r.params.logprobs is not None]
        num_top = [requests[i].params.logprobs or 0 for i in rows]
        scores = score_tokens(logits[rows], [tokens[i] for i in rows], num_top)
        return dict(zip(rows, scores, strict=True))

    def _finish(
        self, request: Request, tokens: list[int], reason: str, **news: object
    ) -> RequestOutput:
        """The last output of a request, whose pages are free from now on."""
        del self.requests[request.request_id]
        self.scheduler.remove(request)
        stop = tokens[-1] if reason == "stop" else None
        return request.output(tokens, finish_reason=reason, stop_token_id=stop, **news)

    def stats(self) -> EngineStats:
        """Counters since start, gauges of now, and the steps since the last call."""
        steps, self._iteration_tokens = self._iteration_tokens, []
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            kv_cache_usage=self.cache.usage,
            num_preemptions=self.scheduler.num_preemptions,
            prefix_cache_queries=self.scheduler.prefix_cache_queries,
            prefix_cache_hits=self.scheduler.prefix_cache_hits,
            num_steps=self._num_steps,
            iteration_tokens=steps,
        )

    def check(self) -> None:
        """Assert that every page is held by a running request, or free."""
        self.cache.check(self.scheduler.running)
        assert all(not request.block_tables for request in self.scheduler.waiting)


def output_rows(
    plan: Plan, sampling: list[Request], scoring: list[tuple[Request, int]]
) -> list[int]:
    """Rows of the flat batch whose logits are wanted: first to sample from, then to score."""
    first_row, row = {}, 0
    for request, num_tokens in plan.items():
        first_row[request] = row
        row += num_tokens
    last = [first_row[r] + plan[r] - 1 for r in sampling]
    return last + [first_row[r] + p - r.num_computed for r, p in scoring]
