"""One decode step and one prefill of an engine, taken apart by torch's profiler.

On a GPU each kernel has its time, the bytes and FLOPs that its op needs at least, and its share of
their floor; and it is said for how long nothing ran. On a CPU: torch's operators.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from headrace.bench import floors
from headrace.bench.floors import Gpu, Work, find_gpu, step_work
from headrace.bench.latency import device_name, random_prompts
from headrace.bench.results import write_csv
from headrace.bench.timeline import Span, Step, name_ops, one_step, split_steps
from headrace.config import ConfigError, EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.messages import AddRequest, RequestOutput, SamplingParams
from headrace.models.config import GptOssConfig

NUM_STEPS = 10  # decode steps that the figures are means of
CPU_STEPS = 2  # the same on a CPU, whose operators are thousands
OPS_OF_LAYER = {
    "linear_kernel": ("qkv", "output"),
    "attention_kernel": ("attention",),
    "router_kernel": ("router",),
    "grouped_matmul_kernel": ("gate_up", "down"),
}
LAST_OP = {"linear_kernel": "lm_head"}


@dataclass(frozen=True)
class ProfileRow:
    """One kernel (operator, on a CPU) in one step; or the whole, or the time when nothing ran."""

    phase: str  # decode or prefill
    batch: int  # requests
    kernel: str
    count: float
    us: float
    share: float  # of the step
    mbytes: float | None = None  # that must be moved at least
    gflops: float | None = None
    floor_us: float | None = None
    floor_share: float | None = None  # floor / time


def run_profile(
    config: EngineConfig, batches: Sequence[int], prompt: int, csv: Path | None
) -> None:
    """Print a table of a prefill and of each decode step, and write the CSV.

    Raises ConfigError if the sizes don't fit.
    """
    if not batches or min(*batches, prompt) < 1:
        shown = ",".join(map(str, batches))
        raise ConfigError(f"--batch is {shown}, --prompt {prompt}; all must be at least 1")
    engine = Engine(replace(config, max_num_seqs=max(batches), enable_prefix_caching=False))
    console, name = Console(), device_name(engine)
    rows = profile_prefill(engine, prompt)
    console.print(profile_table(rows, f"{name}: a prompt of {prompt} tokens"))
    for batch in batches:
        decode = profile_decode(engine, batch, prompt)
        title = f"{name}: one token for each of {batch} requests, after {prompt}"
        console.print(profile_table(decode, title))
        rows += decode
        if csv:
            write_csv(csv, rows)


def profile_decode(engine: Engine, batch: int, prompt: int) -> list[ProfileRow]:
    """Rows of one decode step, the mean of NUM_STEPS."""
    with decoding(engine, batch, prompt):
        if engine.model.device.type == "cpu":
            return cpu_rows("decode", batch, lambda: take_steps(engine, CPU_STEPS), CPU_STEPS)
        num_traced = NUM_STEPS + 2
        spans = gpu_spans(lambda: take_steps(engine, num_traced))
    steps = split_steps(spans, num_traced)[1:]  # the first waits for the profiler
    size = floors.Step(batch, 1, prompt + num_traced / 2)
    return gpu_rows("decode", size, steps, engine.model.config, find_gpu(device_name(engine)))


def profile_prefill(engine: Engine, prompt: int) -> list[ProfileRow]:
    """Rows of the step that computes one prompt, which was computed once before."""
    finish(engine, prompt)
    if engine.model.device.type == "cpu":
        return cpu_rows("prefill", 1, lambda: finish(engine, prompt), 1)
    step = one_step(gpu_spans(lambda: finish(engine, prompt)))
    size = floors.Step(1, prompt, 0)
    return gpu_rows("prefill", size, [step], engine.model.config, find_gpu(device_name(engine)))


@contextmanager
def decoding(engine: Engine, batch: int, prompt: int) -> Iterator[None]:
    """An engine in which so many requests have got their first tokens, and go on."""
    room = engine.max_model_len - prompt
    # the first to come writes while the last ones' prompts are computed
    steps_before = batch + batch * prompt // engine.config.max_num_batched_tokens
    wanted = steps_before + 2 * NUM_STEPS
    if room < wanted:
        raise ConfigError(f"--prompt is {prompt}; {engine.max_model_len - wanted} fit the model")
    left = set(add_requests(engine, batch, prompt, wanted))
    while left:
        left -= {o.request_id for o in step(engine) if o.token_ids}
    take_steps(engine, 2)
    yield
    engine.abort(list(engine.requests))
    take_steps(engine, 2)


def add_requests(engine: Engine, batch: int, prompt: int, max_tokens: int) -> list[str]:
    """Queue random prompts, answered greedily; their ids."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    prompts = random_prompts(engine.model.config, batch, prompt)
    for i, token_ids in enumerate(prompts):
        engine.add_request(AddRequest(str(i), token_ids, params, time.monotonic()))
    return [str(i) for i in range(batch)]


def step(engine: Engine) -> list[RequestOutput]:
    """One step. Raises ConfigError for a request that can't run."""
    outputs = engine.step()
    for output in outputs:
        if output.error is not None:
            raise ConfigError(output.error)
    return outputs


def take_steps(engine: Engine, count: int) -> None:
    """So many steps."""
    for _ in range(count):
        step(engine)


def finish(engine: Engine, prompt: int) -> None:
    """Compute one prompt and its first token."""
    add_requests(engine, 1, prompt, max_tokens=1)
    while engine.has_work():
        step(engine)


def gpu_spans(run: Callable[[], None]) -> list[Span]:
    """Kernels and copies of a run, as they started."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    spans = [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events() or []
        if event.device_type == DeviceType.CUDA
    ]
    return sorted(spans, key=lambda span: span.start)


def gpu_rows(
    phase: str, size: floors.Step, steps: Sequence[Step], config: GptOssConfig, gpu: Gpu | None
) -> list[ProfileRow]:
    """Means over the steps: a row a kernel, the longest first, then the idle times and the whole.

    Kernels that several ops use have a row for each op, if they can be told apart.
    """
    work = step_work(config, size)
    totals: dict[str, list[float]] = {}
    for step in steps:
        named = name_ops(step.kernels, OPS_OF_LAYER, config.num_hidden_layers, LAST_OP)
        for kernel in named:
            totals.setdefault(kernel.name, []).append(kernel.added_us)
    whole = sum(step.us for step in steps) / len(steps)

    def row(name: str, times: Sequence[float], of: Work | None = None) -> ProfileRow:
        us = sum(times) / len(steps)
        floor = 1e6 * of.floor_s(gpu) if of and gpu else None
        return ProfileRow(
            phase,
            size.num_seqs,
            name,
            count=len(times) / len(steps),
            us=us,
            share=us / whole,
            mbytes=None if of is None else of.bytes / 1e6,
            gflops=None if of is None else of.flops / 1e9,
            floor_us=floor,
            floor_share=None if floor is None else floor / us,
        )

    kernels = [row(name, t, work.get(name.split()[-1])) for name, t in totals.items()]
    return [
        *sorted(kernels, key=lambda r: -r.us),
        row("nothing, within a step", [step.between_kernels_us for step in steps]),
        row("nothing, between steps", [step.between_steps_us for step in steps]),
        row("the whole step", [step.us for step in steps], floors.total(work)),
    ]


def cpu_rows(phase: str, batch: int, run: Callable[[], None], num_steps: int) -> list[ProfileRow]:
    """Torch's operators by their own time, without that of the operators they call."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    ops = [(op.key, op.count, op.self_cpu_time_total) for op in profiler.key_averages()]
    whole = sum(us for _, _, us in ops)
    rows = [
        ProfileRow(phase, batch, name, count / num_steps, us / num_steps, us / whole)
        for name, count, us in sorted(ops, key=lambda op: -op[2])
    ]
    return [*rows, ProfileRow(phase, batch, "all operators", 1, whole / num_steps, 1.0)]


def profile_table(rows: Sequence[ProfileRow], title: str) -> Table:
    """What takes half a percent of the step or more, and the time when nothing ran."""
    table = Table(title=title)
    table.add_column("kernel", overflow="fold")
    has_work = any(row.mbytes is not None for row in rows)
    of_work = ("MB", "GFLOP", "floor us", "of floor") if has_work else ()
    for column in ("count", "us", "share", *of_work):
        table.add_column(column, justify="right")
    for row in rows:
        if row.share < 0.005 and not row.kernel.startswith("nothing"):
            continue
        numbers = (row.mbytes, row.gflops, row.floor_us)
        work = [
            *("" if n is None else f"{n:.1f}" for n in numbers),
            "" if row.floor_share is None else f"{row.floor_share:.0%}",
        ]
        cells = [f"{row.count:g}", f"{row.us:.1f}", f"{row.share:.1%}"]
        table.add_row(row.kernel, *cells, *(work if has_work else ()))
    return table
