"""How long a token takes at each batch size, in this process: the engine without a server.

TPOT = (time of L + 1 tokens - time of 1 token) / L, all requests of a batch arriving at once; the
time of one token is the prefill's. Each time is the better of two runs, after one to warm up.
"""

from __future__ import annotations

import itertools
import math
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from headrace.bench.floors import Gpu, Step, find_gpu, lora_work, step_work, total
from headrace.bench.peers import find_row, peer_rows
from headrace.bench.results import write_csv
from headrace.bench.synth_adapter import write_adapter
from headrace.config import ConfigError, EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.messages import AddRequest, SamplingParams
from headrace.models.config import GptOssConfig, read_config

NUM_RUNS = 2
CHECKED_TOKENS = 16  # at most, whose log-probabilities are looked at too
KEYS = ("adapters", "rank", "batch", "prompt")  # columns: one workload


class WrongResult(Exception):
    """What the engine computed can't be right, so its speed means nothing."""


@dataclass(frozen=True)
class Workload:
    """Sizes to measure."""

    batches: tuple[int, ...]  # requests that run at once
    prompt: int  # tokens of each
    output: int  # tokens over which TPOT is a mean
    adapters: int = 0  # that requests have in turn; 0: the base model
    rank: int = 0  # of the adapters

    def __post_init__(self) -> None:
        if not self.batches or min(*self.batches, self.prompt, self.output) < 1:
            raise ConfigError("--batch, --prompt and --output must be at least 1")
        if (self.adapters > 0) != (self.rank > 0):
            raise ConfigError(f"--adapters is {self.adapters} and --rank {self.rank}; give both")


def parse_sizes(batches: str) -> tuple[int, ...]:
    """Numbers with commas between, from the command line."""
    try:
        return tuple(int(size) for size in batches.split(","))
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
    tpot: Figure
    prefill: Figure

    def row(self, workload: Workload) -> LatencyRow:
        """For latency.csv."""
        floor, peer = self.tpot.floor_ms, self.tpot.peer_ms
        return LatencyRow(
            adapters=workload.adapters,
            rank=workload.rank,
            batch=self.batch,
            prompt=workload.prompt,
            tpot_ms=round(self.tpot.ms, 3),
            prefill_ms=round(self.prefill.ms, 2),
            floor_ms=floor if floor is None else round(floor, 3),
            peer_ms=peer,
        )


@dataclass(frozen=True)
class Question:
    """What a request asks."""

    token_ids: list[int]
    adapter: str | None


@dataclass(frozen=True)
class Answer:
    """What a request got."""

    token_ids: list[int]
    logprobs: list[float]  # of the tokens, if they were asked for


def run_latency(config: EngineConfig, workload: Workload, csv: Path | None) -> int:
    """Measure, print the tables and write the CSV; the exit status: 1 after a wrong result.

    Rows of the file that are of other workloads stay.
    """
    console = Console()
    with (
        Progress(console=Console(stderr=True), transient=True) as bar,
        tempfile.TemporaryDirectory(prefix="headrace-adapters-") as folder,
    ):
        loading = bar.add_task(f"loading {config.model}", total=None)
        engine = Engine(
            engine_config(config, workload, Path(folder)),
            progress=lambda d, t: bar.update(loading, completed=d, total=t),
        )
        measuring = bar.add_task("measuring", total=len(workload.batches))
        measured, status = [], 0
        try:
            for latency in measure(engine, workload):
                measured.append(latency)
                bar.advance(measuring)
                if csv:  # at once, so that a run cut short keeps its rows
                    write_csv(csv, [latency.row(workload)], KEYS)
        except WrongResult as error:
            console.print(f"wrong result: {error}", style="bold red", markup=False)
            status = 1
    title = f"{device_name(engine)}: {workload.prompt} tokens in, {workload.output} out"
    if workload.adapters:
        title += f", {workload.adapters} adapters of rank {workload.rank}"
    console.print(tpot_table(measured, title), prefill_table(measured, workload.prompt, title))
    return status


def engine_config(config: EngineConfig, workload: Workload, folder: Path) -> EngineConfig:
    """As many requests at once as the largest batch; every prompt is computed.

    Writes the adapters, random ones, to the folder.
    """
    config = replace(config, max_num_seqs=max(workload.batches), enable_prefix_caching=False)
    if not workload.adapters:
        return config
    model = read_config(config.model)
    for i in range(workload.adapters):
        write_adapter(folder / str(i), model, workload.rank, seed=i)
    return replace(
        config,
        enable_lora=True,
        lora_modules=tuple(f"{i}={folder / str(i)}" for i in range(workload.adapters)),
        max_loras=workload.adapters,
        max_lora_rank=workload.rank,
    )


def measure(engine: Engine, workload: Workload) -> Iterator[Latency]:
    """Each batch size, checked before it is timed.

    Raises:
        ConfigError: the prompt and its output don't fit the model.
        WrongResult: a log-probability isn't finite, all requests got the same tokens, a request
            got other tokens than in the smaller batch, or an adapter changed none.
    """
    gpu = find_gpu(device_name(engine))
    peers = peer_rows("latency", engine.model.config, gpu.name if gpu else None)
    questions = random_questions(engine.model.config, workload)
    check_adapter(engine, questions[0])
    seen: list[Answer] = []
    for batch in workload.batches:
        seen = check(engine, questions[:batch], workload.output + 1, seen)
        prefill = best_time(engine, questions[:batch], 1)
        whole = best_time(engine, questions[:batch], workload.output + 1)
        peer = (
            find_row(
                peers,
                adapters=workload.adapters,
                rank=workload.rank,
                batch=batch,
                prompt=workload.prompt,
            )
            or {}
        )
        halfway = Step(batch, 1, workload.prompt + workload.output / 2)
        yield Latency(
            batch,
            tpot=Figure(
                1000 * (whole - prefill) / workload.output,
                floor_ms(engine.model.config, halfway, workload, gpu),
                peer.get("tpot_ms"),
            ),
            prefill=Figure(
                1000 * prefill,
                floor_ms(engine.model.config, Step(batch, workload.prompt, 0), workload, gpu),
                peer.get("prefill_ms"),
            ),
        )


def random_questions(config: GptOssConfig, workload: Workload) -> list[Question]:
    """One for each request of the largest batch; question i is the same whatever the batches."""
    prompts = random_prompts(config, max(workload.batches), workload.prompt)
    adapters: list[str | None] = [str(i) for i in range(workload.adapters)]
    return [
        Question(p, a) for p, a in zip(prompts, itertools.cycle(adapters or [None]), strict=False)
    ]


def random_prompts(config: GptOssConfig, count: int, length: int) -> list[list[int]]:
    """Token ids without the end of a text; prompt i is the same whatever the count."""
    ids = [i for i in range(config.vocab_size) if i not in config.eos_token_id]
    return [random.Random(seed).choices(ids, k=length) for seed in range(count)]


def run(
    engine: Engine, questions: Sequence[Question], num_tokens: int, logprobs: bool = False
) -> tuple[float, list[Answer]]:
    """Answer all questions at once, greedily and to full length; seconds, and the answers."""
    params = SamplingParams(
        max_tokens=num_tokens, temperature=0.0, logprobs=0 if logprobs else None
    )
    answers = {str(i): Answer([], []) for i in range(len(questions))}
    start = time.perf_counter()
    for request_id, question in zip(answers, questions, strict=True):
        engine.add_request(
            AddRequest(request_id, question.token_ids, params, time.monotonic(), question.adapter)
        )
    while engine.has_work():
        for output in engine.step():
            if output.error is not None:
                raise ConfigError(output.error)
            answers[output.request_id].token_ids.extend(output.token_ids)
            for scored in output.logprobs or []:
                answers[output.request_id].logprobs.append(scored.logprobs[0])
    return time.perf_counter() - start, list(answers.values())


def best_time(engine: Engine, questions: Sequence[Question], num_tokens: int) -> float:
    """Seconds of the fastest of NUM_RUNS runs after one that isn't counted."""
    run(engine, questions, num_tokens)
    return min(run(engine, questions, num_tokens)[0] for _ in range(NUM_RUNS))


def check_adapter(engine: Engine, question: Question) -> None:
    """An adapter must change what the base model says."""
    if question.adapter is None:
        return
    asked = [question, replace(question, adapter=None)]
    _, (adapted, base) = run(engine, asked, CHECKED_TOKENS, logprobs=True)
    if adapted == base:
        raise WrongResult(f"adapter {question.adapter} changes nothing")


def check(
    engine: Engine, questions: Sequence[Question], num_tokens: int, before: Sequence[Answer]
) -> list[Answer]:
    """Compare a run with what the same questions gave in another batch; returns its answers."""
    num_scored = min(num_tokens, CHECKED_TOKENS)
    _, scored = run(engine, questions, num_scored, logprobs=True)
    _, answers = run(engine, questions, num_tokens)
    batch = len(questions)
    for i, answer in enumerate(scored):
        if len(answer.logprobs) != num_scored or not all(map(math.isfinite, answer.logprobs)):
            raise WrongResult(f"batch {batch}, request {i}: log-probabilities {answer.logprobs}")
        _compare(f"batch {batch}, request {i}", answers[i].token_ids[:num_scored], answer)
    if batch > 1 and len({tuple(a.token_ids) for a in answers}) == 1:
        raise WrongResult(f"batch {batch}: other questions, but the same tokens for all")
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


def floor_ms(config: GptOssConfig, step: Step, workload: Workload, gpu: Gpu | None) -> float | None:
    """The floor of a step; an adapter that no sequence asks for costs nothing."""
    if gpu is None:
        return None
    work = total(step_work(config, step))
    return 1000 * (work + lora_work(config, step, workload.adapters, workload.rank)).floor_s(gpu)


def tpot_table(measured: Sequence[Latency], title: str) -> Table:
    """TPOT beside its floor and the peer's, and the tokens per second of the whole batch."""
    table = _table(f"{title}: one token", "tokens/s")
    for m in measured:
        table.add_row(str(m.batch), *m.tpot.cells(), f"{1000 * m.batch / m.tpot.ms:,.0f}")
    return table


def prefill_table(measured: Sequence[Latency], prompt: int, title: str) -> Table:
    """The same for the prefill of the whole batch."""
    table = _table(f"{title}: prefill", "prompt tokens/s")
    for m in measured:
        speed = f"{1000 * m.batch * prompt / m.prefill.ms:,.0f}"
        table.add_row(str(m.batch), *m.prefill.cells(), speed)
    return table


def _table(title: str, speed: str) -> Table:
    table = Table(title=title)
    for column in ("batch", "ms", "floor ms", "share", "peer ms", "of peer", speed):
        table.add_column(column, justify="right")
    return table
