"""What a load's timeline means: the figures of vLLM's serving benchmark, by its definitions.

- TTFT: from just before a request is sent to its first chunk that has choices.
- ITL: the gaps between successive chunks, of all requests together.
- E2EL: from just before a request is sent to its last chunk.
- TPOT: (E2EL - TTFT) / (output tokens - 1), of requests with more than one output token.
- Throughputs: what successful requests brought, by the whole duration.
- Peaks: by seconds since the earliest start of a successful request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

LABELS = {
    "ttft": ("Time to First Token", "TTFT"),
    "tpot": ("Time per Output Token (excl. 1st token)", "TPOT"),
    "itl": ("Inter-token Latency", "ITL"),
    "e2el": ("End-to-end Latency", "E2EL"),
}
WIDTH = 50


@dataclass(frozen=True)
class Timeline:
    """One successful request, in seconds of one clock."""

    start: float
    chunk_times: Sequence[float]  # at least one
    input_tokens: int
    output_tokens: int

    @property
    def ttft(self) -> float:
        """Time to the first chunk."""
        return self.chunk_times[0] - self.start

    @property
    def e2el(self) -> float:
        """Time to the last chunk."""
        return self.chunk_times[-1] - self.start

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None if there is no second."""
        if self.output_tokens < 2:
            return None
        return (self.e2el - self.ttft) / (self.output_tokens - 1)

    @property
    def itls(self) -> list[float]:
        """Gaps between chunks."""
        return [b - a for a, b in pairwise(self.chunk_times)]

    def keeps_to(self, goals: Mapping[str, float]) -> bool:
        """Whether no metric is over its goal in milliseconds; a lone token has a TPOT of 0."""
        values = {"ttft": self.ttft, "tpot": self.tpot or 0.0, "e2el": self.e2el}
        return all(1000 * values[name] <= goal for name, goal in goals.items())


@dataclass(frozen=True)
class Summary:
    """The figures of one run; times in milliseconds."""

    completed: int
    failed: int
    duration: float  # seconds
    total_input_tokens: int
    total_output_tokens: int
    good: int | None  # requests that kept to the goals; None: there were none
    max_output_tokens_per_s: float
    max_concurrent_requests: int
    values: dict[str, np.ndarray] = field(repr=False)  # metric -> all its values, ms

    @property
    def request_throughput(self) -> float:
        """Requests per second."""
        return self.completed / self.duration

    @property
    def request_goodput(self) -> float | None:
        """Good requests per second."""
        return None if self.good is None else self.good / self.duration

    @property
    def output_throughput(self) -> float:
        """Generated tokens per second."""
        return self.total_output_tokens / self.duration

    @property
    def total_token_throughput(self) -> float:
        """Prompt and generated tokens per second."""
        return (self.total_input_tokens + self.total_output_tokens) / self.duration

    def mean(self, metric: str) -> float:
        """Mean of a metric, ms; 0 without values."""
        return statistic(np.mean, self.values[metric])

    def median(self, metric: str) -> float:
        """Median of a metric, ms; 0 without values."""
        return statistic(np.median, self.values[metric])

    def percentile(self, metric: str, percent: float) -> float:
        """Percentile by linear interpolation, ms; 0 without values."""
        return statistic(lambda v: np.percentile(v, percent), self.values[metric])

    def to_json(self, metrics: Sequence[str], percentiles: Sequence[float]) -> dict[str, Any]:
        """All figures, under the field's names."""
        result: dict[str, Any] = {
            "duration": self.duration,
            "completed": self.completed,
            "failed": self.failed,
            "total_input_tokens": self.total_input_tokens,
            "total_output_tokens": self.total_output_tokens,
            "request_throughput": self.request_throughput,
            "request_goodput": self.request_goodput,
            "output_throughput": self.output_throughput,
            "total_token_throughput": self.total_token_throughput,
            "max_output_tokens_per_s": self.max_output_tokens_per_s,
            "max_concurrent_requests": self.max_concurrent_requests,
        }
        for metric in metrics:
            result[f"mean_{metric}_ms"] = self.mean(metric)
            result[f"median_{metric}_ms"] = self.median(metric)
            result[f"std_{metric}_ms"] = statistic(np.std, self.values[metric])
            for percent in percentiles:
                result[f"p{percent:g}_{metric}_ms"] = self.percentile(metric, percent)
        return result


def statistic(function: Any, values: np.ndarray) -> float:
    """Apply a function to values, 0 if there are none."""
    return float(function(values)) if len(values) else 0.0


def summarize(
    timelines: Sequence[Timeline], failed: int, duration: float, goals: Mapping[str, float]
) -> Summary:
    """Compute every figure of a run that took `duration` seconds in all."""
    tpots = [t.tpot for t in timelines if t.tpot is not None]
    values = {
        "ttft": [t.ttft for t in timelines],
        "tpot": tpots,
        "itl": [gap for t in timelines for gap in t.itls],
        "e2el": [t.e2el for t in timelines],
    }
    tokens, requests = per_second(timelines)
    return Summary(
        completed=len(timelines),
        failed=failed,
        duration=duration,
        total_input_tokens=sum(t.input_tokens for t in timelines),
        total_output_tokens=sum(t.output_tokens for t in timelines),
        good=sum(t.keeps_to(goals) for t in timelines) if goals else None,
        max_output_tokens_per_s=float(tokens.max(initial=0)),
        max_concurrent_requests=int(requests.max(initial=0)),
        values={name: 1000 * np.array(seconds) for name, seconds in values.items()},
    )


def per_second(timelines: Sequence[Timeline]) -> tuple[np.ndarray, np.ndarray]:
    """Count chunks, and requests in flight, in each second from the earliest start on.

    A request is in flight in the second of its start, in that of its last chunk, and between.
    """
    if not timelines:
        return np.zeros(0, int), np.zeros(0, int)
    origin = min(t.start for t in timelines)
    num_seconds = 1 + max(int(t.chunk_times[-1] - origin) for t in timelines)
    chunks, requests = np.zeros(num_seconds, int), np.zeros(num_seconds, int)
    for t in timelines:
        np.add.at(chunks, (np.array(t.chunk_times) - origin).astype(int), 1)
        requests[int(t.start - origin) : int(t.chunk_times[-1] - origin) + 1] += 1
    return chunks, requests


def table(
    summary: Summary,
    metrics: Sequence[str],
    percentiles: Sequence[float],
    max_concurrency: int | None,
    request_rate: float,
) -> str:
    """Return the table that vLLM's client prints, line for line."""
    lines = [" Serving Benchmark Result ".center(WIDTH, "=")]

    def line(label: str, value: float | None, form: str = "<10.2f") -> None:
        if value is not None:
            lines.append(f"{label:<40} {value:{form}}")

    line("Successful requests:", summary.completed, "<10")
    line("Failed requests:", summary.failed, "<10")
    line("Maximum request concurrency:", max_concurrency, "<10")
    line("Request rate configured (RPS):", request_rate if np.isfinite(request_rate) else None)
    line("Benchmark duration (s):", summary.duration)
    line("Total input tokens:", summary.total_input_tokens, "<10")
    line("Total generated tokens:", summary.total_output_tokens, "<10")
    line("Request throughput (req/s):", summary.request_throughput)
    line("Request goodput (req/s):", summary.request_goodput)
    line("Output token throughput (tok/s):", summary.output_throughput)
    line("Peak output token throughput (tok/s):", summary.max_output_tokens_per_s)
    line("Peak concurrent requests:", summary.max_concurrent_requests)
    line("Total token throughput (tok/s):", summary.total_token_throughput)
    for metric in metrics:
        title, short = LABELS[metric]
        lines.append(title.center(WIDTH, "-"))
        line(f"Mean {short} (ms):", summary.mean(metric))
        line(f"Median {short} (ms):", summary.median(metric))
        for percent in percentiles:
            line(f"P{percent:g} {short} (ms):", summary.percentile(metric, percent))
    lines.append("=" * WIDTH)
    return "\n".join(lines)
