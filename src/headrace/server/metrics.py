"""Prometheus metrics under vLLM's names, so that its dashboards and routers work."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from headrace.engine.messages import EngineReady, EngineStats, RequestOutput

LABELS = ("model_name", "engine")
FINISHED_REASONS = ("stop", "length", "abort", "error")

TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
GAP_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0),
)
LATENCY_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
STEP_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


def one_two_five(limit: int) -> list[int]:
    """Return 1, 2, 5, 10, 20, ... up to limit."""
    series = [digit * 10**power for power in range(12) for digit in (1, 2, 5)]
    return [value for value in series if value <= limit]


class Metrics:
    """All metrics of one served model, in a registry of their own."""

    def __init__(self, model_name: str, ready: EngineReady) -> None:
        self.registry = CollectorRegistry()
        self._labels = (model_name, "0")
        self._last = EngineStats(0, 0, 0.0, 0, 0, 0, 0)
        sizes = one_two_five(ready.max_model_len)
        self.running = self._make(Gauge, "num_requests_running", "Requests in the batch")
        self.waiting = self._make(Gauge, "num_requests_waiting", "Requests in the queue")
        self.cache_usage = self._make(Gauge, "kv_cache_usage_perc", "Used share of the cache, 0-1")
        self.cache_queries = self._make(Counter, "prefix_cache_queries", "Tokens looked up")
        self.cache_hits = self._make(Counter, "prefix_cache_hits", "Tokens found in the cache")
        self.preemptions = self._make(Counter, "num_preemptions", "Requests sent back to wait")
        self.prompt_tokens = self._make(Counter, "prompt_tokens", "Prompt tokens taken in")
        self.cached_tokens = self._make(
            Counter, "prompt_tokens_cached", "Prompt tokens from the prefix cache"
        )
        self.generation_tokens = self._make(Counter, "generation_tokens", "Tokens generated")
        self.step_tokens = self._histogram("iteration_tokens_total", "In a step", STEP_BUCKETS)
        self.ttft = self._histogram("time_to_first_token_seconds", "To 1st token", TTFT_BUCKETS)
        self.gap = self._histogram("inter_token_latency_seconds", "Between tokens", GAP_BUCKETS)
        self.per_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean of a request", GAP_BUCKETS
        )
        self.e2e = self._histogram("e2e_request_latency_seconds", "Whole request", LATENCY_BUCKETS)
        self.queued = self._histogram("request_queue_time_seconds", "Queue", LATENCY_BUCKETS)
        self.prefill = self._histogram("request_prefill_time_seconds", "Prefill", LATENCY_BUCKETS)
        self.decode = self._histogram("request_decode_time_seconds", "Decode", LATENCY_BUCKETS)
        self.inference = self._histogram("request_inference_time_seconds", "Both", LATENCY_BUCKETS)
        self.prompt_sizes = self._histogram("request_prompt_tokens", "Of a request", sizes)
        self.output_sizes = self._histogram("request_generation_tokens", "Of a request", sizes)
        self.max_tokens = self._histogram("request_params_max_tokens", "Asked for", sizes)
        self.n = self._histogram("request_params_n", "Choices asked for", (1, 2, 5, 10, 20))
        self.success = Counter(
            "vllm:request_success",
            "Finished requests",
            (*LABELS, "finished_reason"),
            registry=self.registry,
        )
        for reason in FINISHED_REASONS:
            self.success.labels(*self._labels, reason)
        self._cache_info(ready)
        self._start_info(ready)

    def _make(self, kind: Any, name: str, text: str, **options: Any) -> Any:
        metric = kind(f"vllm:{name}", text, LABELS, registry=self.registry, **options)
        return metric.labels(*self._labels)

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Any:
        return self._make(Histogram, name, text, buckets=tuple(buckets))

    def _cache_info(self, ready: EngineReady) -> None:
        info = Gauge(
            "vllm:cache_config_info",
            "Sizes of the KV cache, as labels",
            (*LABELS, "block_size", "num_gpu_blocks"),
            registry=self.registry,
        )
        info.labels(*self._labels, str(ready.block_size), str(sum(ready.num_pages))).set(1)

    def _start_info(self, ready: EngineReady) -> None:
        seconds = Gauge(
            "headrace:startup_seconds",
            "Of each part of the start",
            (*LABELS, "phase"),
            registry=self.registry,
        )
        for phase, value in ready.start.phases.items():
            seconds.labels(*self._labels, phase).set(value)

    def on_stats(self, stats: EngineStats) -> None:
        """Take the engine's news; its counters run since its start."""
        last, self._last = self._last, stats
        self.running.set(stats.num_running)
        self.waiting.set(stats.num_waiting)
        self.cache_usage.set(stats.kv_cache_usage)
        self.cache_queries.inc(stats.prefix_cache_queries - last.prefix_cache_queries)
        self.cache_hits.inc(stats.prefix_cache_hits - last.prefix_cache_hits)
        self.preemptions.inc(stats.num_preemptions - last.num_preemptions)
        for tokens in stats.iteration_tokens:
            self.step_tokens.observe(tokens)

    def finished(self, reason: str) -> None:
        """Count a request by how it ended."""
        self.success.labels(*self._labels, reason).inc()

    def render(self) -> bytes:
        """Return the text that Prometheus scrapes."""
        return generate_latest(self.registry)


class RequestTimer:
    """Observes one engine request from arrival to end."""

    def __init__(self, metrics: Metrics, num_prompt_tokens: int, max_tokens: int) -> None:
        self._metrics = metrics
        self._num_prompt_tokens = num_prompt_tokens
        self._num_tokens = 0
        self._queued_s = 0.0
        self._arrival = self._last = time.monotonic()
        self._first: float | None = None
        self.finish_reason = "abort"  # until an output, or a stop string, says otherwise
        metrics.max_tokens.observe(max_tokens)

    def on_output(self, output: RequestOutput) -> None:
        """Take the news of one step."""
        now = time.monotonic()
        self.finish_reason = output.finish_reason or self.finish_reason
        if output.finish_reason == "error":
            return
        if self._first is None:
            self._first, self._queued_s = now, output.queued_s
            self._metrics.ttft.observe(now - self._arrival)
            self._metrics.prompt_tokens.inc(self._num_prompt_tokens)
            self._metrics.cached_tokens.inc(output.num_cached_tokens)
        elif output.token_ids:
            self._metrics.gap.observe(now - self._last)
        self._last = now
        self._num_tokens += len(output.token_ids)
        self._metrics.generation_tokens.inc(len(output.token_ids))

    def finish(self) -> None:
        """Observe the whole; durations only of requests that ran to their end."""
        metrics, now = self._metrics, time.monotonic()
        metrics.finished(self.finish_reason)
        if self._first is None or self.finish_reason not in ("stop", "length"):
            return
        decode = now - self._first
        prefill = max(self._first - self._arrival - self._queued_s, 0.0)
        metrics.e2e.observe(now - self._arrival)
        metrics.queued.observe(self._queued_s)
        metrics.prefill.observe(prefill)
        metrics.decode.observe(decode)
        metrics.inference.observe(prefill + decode)
        if self._num_tokens > 1:
            metrics.per_token.observe(decode / (self._num_tokens - 1))
        metrics.prompt_sizes.observe(self._num_prompt_tokens)
        metrics.output_sizes.observe(self._num_tokens)
