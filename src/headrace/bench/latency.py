"""How long a token takes at each batch size, in this process: the engine without a server.

TPOT = (time of L + 1 tokens - time of 1 token) / L, all requests of a batch arriving at once; the
time of one token is the prefill's. Each time is the better of two runs, after one to warm up.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from headrace.bench.floors import Gpu, Step, find_gpu, step_work, total
from headrace.bench.peers import find_row, peer_rows
from headrace.bench.results import write_csv
from headrace.config import ConfigError, EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.messages import AddRequest, SamplingParams
from headrace.models.config import GptOssConfig

NUM_RUNS = 2
CHECKED_TOKENS = 16  # at most, whose log-probabilities are looked at too


class WrongResult(Exception):
    """What the engine computed can't be right, so its speed means nothing."""


@dataclass(frozen=True)
class Workload:
    """Sizes to measure."""

    batches: tuple[int, ...]  # requests that run at once
    prompt: int  # tokens of each
    output: int  # tokens over which TPOT is a mean

    def __post_init__(self) -> None:
        if not self.batches or min(*self.batches, self.prompt, self.output) < 1:
            raise ConfigError("--batch, --prompt and --output must be at least 1")

    @staticmethod
    def parse(batches: str, prompt: int, output: int) -> Workload:
        """From the command line, where batches are numbers with commas between."""
        try:
            return Workload(tuple(int(b) for b in batches.split(",")), prompt, output)
        except ValueError:
            raise ConfigError(f"--batch is {batches}; it must be like 1,2,4") from None


@dataclass(frozen=True)
class LatencyRow:
    """One line of latency.csv; floor and peer are those of TPOT."""

    adapters: int
    rank: int
    batch: int
    prompt: int
    tpot_ms: float
    prefill_ms: float
    floor_ms: float | None
    peer_ms: float | None


@dataclass(frozen=True)
class Figure:
    """A time, the least that the GPU allows, and a peer's; None where nobody has measured."""

    ms: float
    floor_ms: float | None
    peer_ms: float | None

    def cells(self) -> list[str]:
        """For a table: time, floor, floor / time, peer, time / peer."""
        floor, peer = self.floor_ms, self.peer_ms
        return [
            f"{self.ms:.2f}",
            *(["", ""] if floor is None else [f"{floor:.2f}", f"{floor / self.ms:.0%}"]),
            *(["", ""] if peer is None else [f"{peer:.2f}", f"{self.ms / peer:.2f}"]),
        ]


@dataclass(frozen=True)
class Latency:
    """What one batch size takes."""

    batch: int
    prompt: int
    tpot: Figure
    prefill: Figure

    def row(self) -> LatencyRow:
        """For latency.csv; adapters can't be measured yet."""
        floor, peer = self.tpot.floor_ms, self.tpot.peer_ms
        return LatencyRow(
            adapters=0,
            rank=0,
            batch=self.batch,
            prompt=self.prompt,
            tpot_ms=round(self.tpot.ms, 3),
            prefill_ms=round(self.prefill.ms, 2),
            floor_ms=floor if floor is None else round(floor, 3),
            peer_ms=peer,
        )


@dataclass(frozen=True)
class Answer:
    """What a request got."""

    token_ids: list[int]
    logprobs: list[float]  # of the tokens, if they were asked for


def run_latency(config: EngineConfig, workload: Workload, csv: Path | None) -> int:
    """Measure, print the table and write the CSV; the exit status: 1 after a wrong result."""
    console = Console()
    with Progress(console=Console(stderr=True), transient=True) as bar:
        loading = bar.add_task(f"loading {config.model}", total=None)
        engine = Engine(
            engine_config(config, workload),
            progress=lambda d, t: bar.update(loading, completed=d, total=t),
        )
        measuring = bar.add_task("measuring", total=len(workload.batches))
        measured, status = [], 0
        try:
            for latency in measure(engine, workload):
                measured.append(latency)
                bar.advance(measuring)
        except WrongResult as error:
            console.print(f"wrong result: {error}", style="bold red", markup=False)
            status = 1
    title = f"{device_name(engine)}: {workload.prompt} tokens in, {workload.output} out"
    console.print(tpot_table(measured, title), prefill_table(measured, title))
    if csv and measured:
        write_csv(csv, [latency.row() for latency in measured])
    return status


def engine_config(config: EngineConfig, workload: Workload) -> EngineConfig:
    """As many requests at once as the largest batch; every prompt is computed."""
    return replace(config, max_num_seqs=max(workload.batches), enable_prefix_caching=False)


def measure(engine: Engine, workload: Workload) -> Iterator[Latency]:
    """Each batch size, checked before it is timed.

    Raises:
        ConfigError: the prompt and its output don't fit the model.
        WrongResult: a log-probability isn't finite, all requests got the same tokens, or a request
            got other tokens than in the smaller batch.
    """
    config, gpu = engine.model.config, find_gpu(device_name(engine))
    prompts = random_prompts(config, max(workload.batches), workload.prompt)
    peers = peer_rows("latency", config, gpu.name if gpu else None)
    seen: list[Answer] = []
    for batch in workload.batches:
        seen = check(engine, prompts[:batch], workload.output + 1, seen)
        prefill = best_time(engine, prompts[:batch], 1)
        whole = best_time(engine, prompts[:batch], workload.output + 1)
        halfway = Step(batch, 1, workload.prompt + workload.output / 2)
        peer = find_row(peers, adapters=0, rank=0, batch=batch, prompt=workload.prompt) or {}
        yield Latency(
            batch,
            workload.prompt,
            tpot=Figure(
                1000 * (whole - prefill) / workload.output,
                floor_ms(config, halfway, gpu),
                peer.get("tpot_ms"),
            ),
            prefill=Figure(
                1000 * prefill,
                floor_ms(config, Step(batch, workload.prompt, 0), gpu),
                peer.get("prefill_ms"),
            ),
        )


def random_prompts(config: GptOssConfig, count: int, length: int) -> list[list[int]]:
    """Token ids without the end of a text; prompt i is the same whatever the count."""
    ids = [i for i in range(config.vocab_size) if i not in config.eos_token_id]
    return [random.Random(seed).choices(ids, k=length) for seed in range(count)]


def run(
    engine: Engine, prompts: Sequence[list[int]], num_tokens: int, logprobs: bool = False
) -> tuple[float, list[Answer]]:
    """Answer all prompts at once, greedily and to full length; seconds, and the answers."""
    params = SamplingParams(
        max_tokens=num_tokens, temperature=0.0, logprobs=0 if logprobs else None
    )
    answers = {str(i): Answer([], []) for i in range(len(prompts))}
    start = time.perf_counter()
    for request_id, prompt in zip(answers, prompts, strict=True):
        engine.add_request(AddRequest(request_id, prompt, params, time.monotonic()))
    while engine.has_work():
        for output in engine.step():
            if output.error is not None:
                raise ConfigError(output.error)
            answers[output.request_id].token_ids.extend(output.token_ids)
            for scored in output.logprobs or []:
                answers[output.request_id].logprobs.append(scored.logprobs[0])
    return time.perf_counter() - start, list(answers.values())


def best_time(engine: Engine, prompts: Sequence[list[int]], num_tokens: int) -> float:
    """Seconds of the fastest of NUM_RUNS runs after one that isn't counted."""
    run(engine, prompts, num_tokens)
    return min(run(engine, prompts, num_tokens)[0] for _ in range(NUM_RUNS))


def check(
    engine: Engine, prompts: Sequence[list[int]], num_tokens: int, before: Sequence[Answer]
) -> list[Answer]:
    """Compare a run with what the same prompts gave in another batch; returns its answers."""
    num_scored = min(num_tokens, CHECKED_TOKENS)
    _, scored = run(engine, prompts, num_scored, logprobs=True)
    _, answers = run(engine, prompts, num_tokens)
    batch = len(prompts)
    for i, answer in enumerate(scored):
        if len(answer.logprobs) != num_scored or not all(map(math.isfinite, answer.logprobs)):
            raise WrongResult(f"batch {batch}, request {i}: log-probabilities {answer.logprobs}")
        _compare(f"batch {batch}, request {i}", answers[i].token_ids[:num_scored], answer)
    if batch > 1 and len({tuple(a.token_ids) for a in answers}) == 1:
        raise WrongResult(f"batch {batch}: other prompts, but the same tokens for all")
    for i, (answer, old) in enumerate(zip(answers, before, strict=False)):
        _compare(f"batch {batch}, request {i}", answer.token_ids, old)
    return answers


def _compare(where: str, tokens: list[int], expected: Answer) -> None:
    for i, (token, other) in enumerate(zip(tokens, expected.token_ids, strict=True)):
        if token != other:
            raise WrongResult(f"{where}: token {i} is {token}, in another batch it was {other}")


def device_name(engine: Engine) -> str:
    """The card's name, or cpu."""
    device = engine.model.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def floor_ms(config: GptOssConfig, step: Step, gpu: Gpu | None) -> float | None:
    """The floor of a step."""
    return None if gpu is None else 1000 * total(step_work(config, step)).floor_s(gpu)


def tpot_table(measured: Sequence[Latency], title: str) -> Table:
    """TPOT beside its floor and the peer's, and the tokens per second of the whole batch."""
    table = _table(f"{title}: one token", "tokens/s")
    for m in measured:
        table.add_row(str(m.batch), *m.tpot.cells(), f"{1000 * m.batch / m.tpot.ms:,.0f}")
    return table


def prefill_table(measured: Sequence[Latency], title: str) -> Table:
    """The same for the prefill of the whole batch."""
    table = _table(f"{title}: prefill", "prompt tokens/s")
    for m in measured:
        speed = f"{1000 * m.batch * m.prompt / m.prefill.ms:,.0f}"
        table.add_row(str(m.batch), *m.prefill.cells(), speed)
    return table


def _table(title: str, speed: str) -> Table:
    table = Table(title=title)
    for column in ("batch", "ms", "floor ms", "share", "peer ms", "of peer", speed):
        table.add_column(column, justify="right")
    return table
