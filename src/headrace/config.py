"""One frozen configuration; the command line's flags are made from its fields."""

from __future__ import annotations

from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A caller's mistake in flags or files: shown as one line, exit status 2."""


def flag(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """Declare a field that becomes a flag: its default, help text, and legal range or values."""
    metadata = {"help": help, "low": low, "high": high, "choices": choices}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class EngineConfig:
    """What the engine process needs to run one model."""

    model: Path = flag(Path(), "directory of a checkpoint in Hugging Face layout")
    device: str = flag("auto", "auto, cpu or cuda")
    dtype: str = flag("auto", "auto, float32 or bfloat16 (auto: float32 on CPU, bfloat16 on CUDA)")
    max_model_len: int | None = flag(None, "longest prompt plus output, in tokens", low=1)
    max_num_seqs: int = flag(64, "most requests that run at once", low=1)
    max_num_batched_tokens: int = flag(2048, "most tokens in one step", low=1)
    kv_cache_memory: int = flag(0, "bytes of the KV cache (0: from the free memory)", low=0)
    block_size: int = flag(16, "tokens in one KV-cache page", low=1)
    enable_prefix_caching: bool = flag(True, "reuse the pages of shared prompt prefixes")
    seed: int = flag(0, "seed of requests that bring none")
    enable_lora: bool = flag(False, "serve LoRA adapters beside the model")
    lora_modules: tuple[str, ...] = flag((), "an adapter to load at start: NAME=DIRECTORY")
    max_loras: int = flag(4, "most adapters on the device at once", low=1, high=1024)
    max_lora_rank: int = flag(64, "largest rank of any target of an adapter", low=1, high=512)
    max_cpu_loras: int | None = flag(
        None, "adapters kept in CPU memory (default: max-loras)", low=1
    )
    lora_memory: int = flag(0, "bytes for adapters (0: max-loras of them at max-lora-rank)", low=0)

    def __post_init__(self) -> None:
        check_flags(self)


@dataclass(frozen=True)
class ServerConfig:
    """What the HTTP server needs beside the engine."""

    host: str = flag("127.0.0.1", "address to listen on")
    port: int = flag(8000, "port to listen on", low=0, high=65535)
    served_model_name: str = flag("", "name in the API (default: the directory's name)")
    api_key: tuple[str, ...] = flag((), "accept only requests with one of these bearer tokens")
    generation_config: str = flag(
        "auto",
        "auto: sampling defaults from generation_config.json; none: the API's own",
        choices=("auto", "none"),
    )
    drain_timeout: float = flag(30.0, "seconds that running requests get after SIGTERM", low=0)
    enable_tools: bool = flag(True, "parse and offer function calls in chat")

    def __post_init__(self) -> None:
        check_flags(self)


def check_flags(config: Any) -> None:
    """Raise ConfigError naming the flag, its value and what is allowed."""
    for f in fields(config):
        value, low, high = getattr(config, f.name), f.metadata.get("low"), f.metadata.get("high")
        choices = f.metadata.get("choices")
        if choices:
            check_choice(flag_name(f), value, choices)
        if value is None or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if (low is not None and value < low) or (high is not None and value > high):
            allowed = f"at least {low:g}" if high is None else f"{low:g} to {high:g}"
            raise ConfigError(f"{flag_name(f)} is {value}; it must be {allowed}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ConfigError naming the flag, unless the value is one of the choices."""
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")


def flag_name(f: Field[Any]) -> str:
    """The command-line spelling of a field."""
    return "--" + f.name.replace("_", "-")
