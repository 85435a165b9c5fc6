"""What the API needs to know of a checkpoint beside its weights."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from headrace.config import ConfigError, ServerConfig
from headrace.files import parse_module, read_json
from headrace.server.chat_template import ChatTemplate, load_template_source
from headrace.server.harmony import speaks_harmony
from headrace.server.protocol import SamplingFields
from headrace.server.tokenizer import Tokenizer

CHAT_STOPS = ("<|return|>", "<|call|>", "<|endoftext|>")
SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class ModelInfo:
    """A served model: its name, limits, stop tokens and sampling defaults."""

    name: str
    root: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    is_harmony: bool
    chat_template: ChatTemplate | None
    sampling_defaults: dict[str, Any]
    adapters: tuple[tuple[str, Path], ...] = ()  # (name, directory) of those loaded at start
    created: int = field(default_factory=lambda: int(time.time()))


def load_model_info(
    model_dir: Path, tokenizer: Tokenizer, config: ServerConfig, lora_modules: Iterable[str] = ()
) -> ModelInfo:
    """Read config.json, generation_config.json and the chat template.

    Raises ConfigError naming the file that is missing or wrong, or the adapter whose name is taken.
    """
    model_config = read_json(model_dir / "config.json")
    vocab_size = model_config.get("vocab_size")
    if not isinstance(vocab_size, int):
        raise ConfigError(
            f"{model_dir / 'config.json'}: vocab_size is {vocab_size!r}; it must be an integer"
        )
    generation_file = model_dir / "generation_config.json"
    generation = read_json(generation_file, missing_ok=True)
    eos = generation.get("eos_token_id", model_config.get("eos_token_id")) or []
    is_harmony = speaks_harmony(tokenizer)
    chat_stops = [tokenizer.special_ids.get(name) for name in CHAT_STOPS] if is_harmony else []
    source = load_template_source(model_dir, is_harmony)
    defaults = {} if config.generation_config == "none" else sampling_defaults(generation)
    check_defaults(defaults, generation_file)
    name = config.served_model_name or model_dir.resolve().name
    adapters = tuple(parse_module(module) for module in lora_modules)
    if name in dict(adapters):
        raise ConfigError(
            f"--lora-modules {name}: this is the base model's name; "
            "give the adapter another one, or the model by --served-model-name"
        )
    return ModelInfo(
        name=name,
        adapters=adapters,
        root=str(model_dir),
        vocab_size=vocab_size,
        eos_token_ids=unique_ids([*([eos] if isinstance(eos, int) else eos), *chat_stops]),
        is_harmony=is_harmony,
        chat_template=ChatTemplate(source, tokenizer.quote) if source else None,
        sampling_defaults=defaults,
    )


def sampling_defaults(generation: dict[str, Any]) -> dict[str, Any]:
    """Pick what requests that don't say otherwise get; do_sample false means greedy."""
    greedy = {"temperature": 0.0} if generation.get("do_sample") is False else {}
    given = {k: v for k, v in generation.items() if k in SAMPLING_DEFAULTS and v is not None}
    return greedy | given


def check_defaults(defaults: dict[str, Any], path: Path) -> None:
    """ConfigError for a value that no request may send: the engine trusts what it gets."""
    for name, value in defaults.items():
        try:
            SamplingFields.model_validate({"model": "", name: value})
        except ValidationError as error:
            raise ConfigError(
                f"{path}: {name} is {value!r}: {error.errors()[0]['msg']}; correct it, or give "
                "--generation-config none"
            ) from None


def unique_ids(ids: list[int | None]) -> tuple[int, ...]:
    """Drop None and repetitions, keep the order."""
    return tuple(dict.fromkeys(i for i in ids if i is not None))
