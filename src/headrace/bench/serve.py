"""`headrace bench serve`: load on any OpenAI-compatible server, measured as the field does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

import headrace
from headrace.bench.client import Client, Outcome
from headrace.bench.datasets import Sample, load_samples
from headrace.bench.model_list import choose_model, find_tokenizer, wait_for_models
from headrace.bench.plots import need_matplotlib, plot_run
from headrace.bench.serve_config import ServeBenchConfig
from headrace.bench.serve_metrics import Summary, Timeline, summarize, table
from headrace.server.tokenizer import Tokenizer, load_tokenizer

REASONS_SHOWN = 10


@dataclass(frozen=True)
class Run:
    """A load that is over."""

    model: str  # the base
    outcomes: list[Outcome]
    timelines: list[Timeline]  # of those that succeeded
    summary: Summary


def run_serve(config: ServeBenchConfig) -> int:
    """Measure and print; returns 1 if requests failed, 0 if none did.

    Raises ConfigError for a server that can't be reached, an unknown model or bad data.
    """
    if config.plot:
        need_matplotlib()
    run = asyncio.run(measure(config))
    shown = config.metrics, config.percentiles, config.max_concurrency, config.request_rate
    print(table(run.summary, *shown))
    print_failures(run.outcomes)
    path = result_path(config, run.model, datetime.now())
    if config.save_result or config.save_detailed:
        save(config, run, path)
    if config.plot:
        for plot in plot_run(run.timelines, run.summary, path.with_suffix("")):
            print(f"Plot: {plot}")
    return 1 if run.summary.failed else 0


async def measure(config: ServeBenchConfig) -> Run:
    """Find the model, make the prompts, warm up, send the load."""
    models = await wait_for_models(config.url, config.ready_check_timeout_sec)
    model = choose_model(models, config.model, config.lora_modules)
    tokenizer = load_tokenizer(config.tokenizer or find_tokenizer(models, model))
    samples = load_samples(config, tokenizer)
    chosen = assign_models(config, model, len(samples))
    async with Client(config.url + config.path, config.is_chat, config.extra_fields) as client:
        warmups = [samples[0]] * config.num_warmups
        await send_all(client, warmups, [model] * len(warmups), None, config, "warming up")
        delays = arrivals(len(samples), config.request_rate, config.burstiness, config.seed)
        start = time.perf_counter()
        outcomes = await send_all(client, samples, chosen, delays, config, "sending")
        duration = time.perf_counter() - start
    timelines = [timeline(o, tokenizer) for o in outcomes if o.succeeded]
    summary = summarize(timelines, len(outcomes) - len(timelines), duration, config.goals)
    return Run(model, outcomes, timelines, summary)


def assign_models(config: ServeBenchConfig, model: str, num_prompts: int) -> list[str]:
    """Return the model, or the adapter, that each request asks for."""
    adapters = config.lora_modules
    if not adapters:
        return [model] * num_prompts
    if config.lora_assignment == "round-robin":
        return [adapters[i % len(adapters)] for i in range(num_prompts)]
    return random.Random(config.seed).choices(adapters, k=num_prompts)


def arrivals(num_prompts: int, rate: float, burstiness: float, seed: int) -> np.ndarray | None:
    """Seconds from the start to each request: sums of gamma(burstiness) gaps of mean 1 / rate.

    They are stretched so that the last comes at num_prompts / rate, as vLLM does: the rate asked
    for is then the rate sent. None: all at once.
    """
    if not np.isfinite(rate):
        return None
    gaps = np.random.default_rng(seed).gamma(burstiness, 1 / (rate * burstiness), num_prompts)
    times = np.cumsum(gaps)
    return times * (num_prompts / rate / times[-1])


async def send_all(
    client: Client,
    samples: Sequence[Sample],
    models: Sequence[str],
    delays: np.ndarray | None,
    config: ServeBenchConfig,
    title: str,
) -> list[Outcome]:
    """Send every sample, at its time and at most --max-concurrency at once."""
    room = asyncio.Semaphore(config.max_concurrency or max(len(samples), 1))
    start = time.perf_counter()
    with progress(title, len(samples)) as advance:

        async def one(i: int) -> Outcome:
            if delays is not None:
                await asyncio.sleep(max(start + delays[i] - time.perf_counter(), 0))
            async with room:
                outcome = await client.send(samples[i], models[i])
            advance()
            return outcome

        return await asyncio.gather(*(one(i) for i in range(len(samples))))


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar on stderr (nothing where it is no terminal); yields what advances it."""
    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, console=console, transient=True, refresh_per_second=2,
        disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)


def timeline(outcome: Outcome, tokenizer: Tokenizer) -> Timeline:
    """Count the tokens: the server's count, or the text's where the server gives none."""
    tokens = outcome.usage_tokens
    return Timeline(
        outcome.start,
        outcome.chunk_times,
        outcome.prompt_len,
        len(tokenizer.encode(outcome.text)) if tokens is None else tokens,
    )


def print_failures(outcomes: Sequence[Outcome]) -> None:
    """Say why requests failed: the first ten reasons, with how often each came."""
    reasons = Counter(o.error for o in outcomes if not o.succeeded)
    for text, count in list(reasons.items())[:REASONS_SHOWN]:
        print(f"Failed {count}x: {text}")
    if len(reasons) > REASONS_SHOWN:
        print(f"... and {len(reasons) - REASONS_SHOWN} other reasons")


def result_path(config: ServeBenchConfig, model: str, now: datetime) -> Path:
    """Return where the result goes."""
    rate = f"{config.request_rate:g}qps"
    load = f"-concurrency{config.max_concurrency}" if config.max_concurrency else ""
    name = f"{config.backend}-{rate}{load}-{Path(model).name}-{now:%Y%m%d-%H%M%S}.json"
    return config.result_dir / (config.result_filename or name)


def save(config: ServeBenchConfig, run: Run, path: Path) -> None:
    """Write the figures and what they were measured with."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
    result = {
        "date": f"{datetime.now():%Y%m%d-%H%M%S}",
        "headrace": headrace.__version__,
        **settings | {"model": run.model, "request_rate": rate_text(config.request_rate)},
        **run.summary.to_json(config.metrics, config.percentiles),
    }
    if config.save_detailed:
        result |= details(run.outcomes)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"Result: {path}")


def rate_text(rate: float) -> float | str:
    """JSON has no infinity."""
    return rate if np.isfinite(rate) else "inf"


def details(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return every request's own figures, failed ones with their error; times in seconds."""
    lines = [Timeline(o.start, o.chunk_times or [o.start], o.prompt_len, 0) for o in outcomes]
    return {
        "models": [o.model for o in outcomes],
        "input_lens": [o.prompt_len for o in outcomes],
        "output_lens": [o.usage_tokens for o in outcomes],
        "start_times": [o.start for o in outcomes],
        "ttfts": [line.ttft for line in lines],
        "itls": [line.itls for line in lines],
        "generated_texts": [o.text for o in outcomes],
        "errors": [o.error for o in outcomes],
    }
