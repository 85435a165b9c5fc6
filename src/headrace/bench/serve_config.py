"""What `headrace bench serve` is told, under the names that the field's clients use."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.config import ConfigError, check_choice, check_flags, flag

ENDPOINTS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}
DATASETS = ("random", "sharegpt", "custom")
METRICS = ("ttft", "tpot", "itl", "e2el")
INF = math.inf


@dataclass(frozen=True)
class ServeBenchConfig:
    """A load: on which server, of what requests, how fast they come, and what is reported."""

    backend: str = flag(
        "openai",
        "openai: /v1/completions; openai-chat: /v1/chat/completions",
        choices=tuple(ENDPOINTS),
    )
    base_url: str = flag("", "the server's URL, in place of --host and --port")
    host: str = flag("127.0.0.1", "the server's address")
    port: int = flag(8000, "the server's port", low=1, high=65535)
    endpoint: str = flag("", "path of the API (default: by --backend)")
    model: str = flag("", "name of the model (default: the first that the server lists)")
    tokenizer: Path | None = flag(
        None, "directory of the model's tokenizer (default: where the server says the model lies)"
    )
    ready_check_timeout_sec: float = flag(0, "seconds to wait for the server to answer", low=0)

    dataset_name: str = flag("random", "random, sharegpt or custom", choices=DATASETS)
    dataset_path: Path | None = flag(None, "file of --dataset-name sharegpt or custom")
    num_prompts: int = flag(1000, "how many requests to send", low=1)
    seed: int = flag(0, "seed of the data, of the arrivals and of the adapters' choice")
    random_input_len: int = flag(1024, "random: tokens of a prompt", low=1)
    random_output_len: int = flag(128, "random: tokens to generate", low=1)
    random_range_ratio: float = flag(
        0.0, "random: lengths are uniform in len * (1 - r) ... len * (1 + r)", low=0, high=1
    )
    random_prefix_len: int = flag(0, "random: tokens that all prompts begin with", low=0)
    sharegpt_output_len: int | None = flag(
        None, "sharegpt: tokens to generate (default: as long as the answer in the file)", low=1
    )
    custom_output_len: int = flag(256, "custom: tokens to generate, where a line says none", low=1)
    oversample: bool = flag(True, "draw prompts again when the file has too few")

    request_rate: float = flag(INF, "requests per second (inf: all at once)", low=0)
    burstiness: float = flag(
        1.0, "shape of the gamma distribution of the arrivals' gaps (1: Poisson arrivals)", low=0
    )
    max_concurrency: int | None = flag(None, "most requests in flight", low=1)
    num_warmups: int = flag(
        0, "requests before the clock starts: the first prompt, repeated, to the base", low=0
    )

    ignore_eos: bool = flag(False, "generate on to the wanted length (random: always)")
    temperature: float | None = flag(None, "sent if given; 0 is greedy", low=0)
    top_p: float | None = flag(None, "sent if given", low=0, high=1)
    top_k: int | None = flag(None, "sent if given", low=-1)
    min_p: float | None = flag(None, "sent if given", low=0, high=1)
    extra_body: str = flag("", "JSON object of more fields to send")
    lora_modules: tuple[str, ...] = flag((), "adapters: each request asks for one of them")
    lora_assignment: str = flag(
        "random", "random or round-robin", choices=("random", "round-robin")
    )

    percentile_metrics: str = flag("ttft,tpot,itl", "which of ttft, tpot, itl, e2el to report")
    metric_percentiles: str = flag("99", "percentiles to report, as in 50,90,99")
    goodput: tuple[str, ...] = flag((), "METRIC:MILLISECONDS that a good request keeps to")
    save_result: bool = flag(False, "write the result as JSON")
    save_detailed: bool = flag(False, "write every request's times and text too")
    plot: bool = flag(False, "write PNG plots beside the result")
    result_dir: Path = flag(Path(), "where --save-result and --plot write")
    result_filename: str = flag("", "name of the JSON file (default: made of rate, model, time)")

    def __post_init__(self) -> None:
        check_flags(self)
        for name in ("request_rate", "burstiness"):
            if not getattr(self, name) > 0:
                flag_name = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag_name} is {getattr(self, name):g}; it must be over 0")
        if self.dataset_name != "random" and self.dataset_path is None:
            raise ConfigError(f"--dataset-name {self.dataset_name} needs --dataset-path FILE")
        _ = self.metrics, self.percentiles, self.goals, self.extra_fields  # refuse them now

    @property
    def url(self) -> str:
        """The server's URL, without a path."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return self.base_url.rstrip("/") or f"http://{host}:{self.port}"

    @property
    def path(self) -> str:
        """The API's path."""
        return self.endpoint or ENDPOINTS[self.backend]

    @property
    def is_chat(self) -> bool:
        """Whether prompts are sent as messages."""
        return self.backend == "openai-chat"

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics to print, in the table's order."""
        names = [part.strip() for part in self.percentile_metrics.split(",") if part.strip()]
        for name in names:
            check_choice("--percentile-metrics", name, METRICS)
        return tuple(name for name in METRICS if name in names)

    @property
    def percentiles(self) -> tuple[float, ...]:
        """The percentiles to print."""
        values = []
        for part in self.metric_percentiles.split(","):
            value = number(part)
            if value is None or not 0 <= value <= 100:
                raise ConfigError(f"--metric-percentiles: {part!r} is no number of 0 to 100")
            values.append(value)
        return tuple(values)

    @property
    def goals(self) -> dict[str, float]:
        """What a good request keeps to: metric -> milliseconds."""
        goals = {}
        for pair in self.goodput:
            name, _, limit = pair.partition(":")
            check_choice("--goodput", name, ("ttft", "tpot", "e2el"))
            value = number(limit)
            if value is None or not value >= 0:
                raise ConfigError(f"--goodput {pair}: give METRIC:MILLISECONDS, such as ttft:200")
            goals[name] = value
        return goals

    @property
    def extra_fields(self) -> dict[str, Any]:
        """The fields that go into every request beside prompt, length and model."""
        try:
            extra = json.loads(self.extra_body or "{}")
        except ValueError as error:
            raise ConfigError(f"--extra-body is not JSON: {error}") from None
        if not isinstance(extra, dict):
            raise ConfigError(f"--extra-body is {self.extra_body}; it must be a JSON object")
        sampling = {n: getattr(self, n) for n in ("temperature", "top_p", "top_k", "min_p")}
        fields = {name: value for name, value in sampling.items() if value is not None}
        if self.ignore_eos or self.dataset_name == "random":
            fields["ignore_eos"] = True
        return fields | extra


def number(text: str) -> float | None:
    """Return the number that text says, None if it says none."""
    try:
        return float(text)
    except ValueError:
        return None
