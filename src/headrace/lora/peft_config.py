"""adapter_config.json: what of it counts for the arithmetic, and what we cannot do."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import regex

from headrace.config import ConfigError

# Fields that say nothing about the arithmetic of inference, or that are read below.
_HARMLESS = frozenset(
    {
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
        *("revision", "inference_mode", "lora_dropout", "megatron_core", "runtime_config"),
        *("qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"),
        *("target_modules", "target_parameters", "exclude_modules"),
        *("layers_to_transform", "layers_pattern", "bias", "ensure_weight_tying"),
    }
)
# Values of init_lora_weights that leave the base weights alone. After any other the file's tensors
# may not be the whole change.
_HARMLESS_INITS = ("none", "true", "false", "gaussian", "eva", "orthogonal", "mica")
_PATIENCE = 1.0  # seconds for a pattern and a name: a few us are usual, backtracking has no end
_LARGEST = 3e38  # the tables of the kernels keep scales in float32
_REASONS = {
    "use_dora": "DoRA is not supported",
    "modules_to_save": "whole modules cannot be replaced, only low-rank changes are applied",
    "lora_bias": "biases are not supported",
    "trainable_token_indices": "trained tokens are not supported",
    "layer_replication": "layers cannot be replicated",
    "alora_invocation_tokens": "activated LoRA is not supported",
    "fan_in_fan_out": "no layer of this model is stored that way",
}

T = TypeVar("T")


@dataclass(frozen=True)
class PeftConfig:
    """The fields of adapter_config.json that the reader needs; names as there."""

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: tuple[str, ...] | str  # a string is a pattern for whole names
    target_parameters: tuple[str, ...]
    exclude_modules: tuple[str, ...] | str
    layers_to_transform: tuple[int, ...]  # (): all

    def rank(self, key: str) -> int:
        """The rank of a module or parameter: of the first pattern that matches its name, or r."""
        return _by_pattern(self.rank_pattern, key, self.r)

    def scale(self, key: str, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        alpha = _by_pattern(self.alpha_pattern, key, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets_parameter(self, key: str) -> bool:
        """Whether target_parameters names this one."""
        return _ends_with_one(key, self.target_parameters)

    def targets_module(self, key: str) -> bool:
        """Whether target_modules names this one and nothing excludes it."""
        layer = re.search(r"\.layers\.(\d+)\.", f".{key}")
        in_layers = layer is not None and int(layer[1]) in self.layers_to_transform
        if self.layers_to_transform and not in_layers and key not in self.target_modules:
            return False  # PEFT takes a whole name in any layer
        return _names(self.target_modules, key) and not _names(self.exclude_modules, key)


def parse_peft_config(raw: Mapping[str, Any]) -> PeftConfig:
    """Type the fields that count. Raises ConfigError with every reason, each naming its field."""
    problems = list(_problems(raw))
    if problems:
        raise ConfigError("adapter_config.json: " + "; ".join(problems))
    layers = raw.get("layers_to_transform")
    return PeftConfig(
        r=raw.get("r", 8),
        lora_alpha=raw.get("lora_alpha", 8),
        use_rslora=bool(raw.get("use_rslora")),
        rank_pattern=raw.get("rank_pattern") or {},
        alpha_pattern=raw.get("alpha_pattern") or {},
        target_modules=_names_field(raw, "target_modules"),
        target_parameters=tuple(raw.get("target_parameters") or ()),
        exclude_modules=_names_field(raw, "exclude_modules"),
        layers_to_transform=(layers,) if isinstance(layers, int) else tuple(layers or ()),
    )


def _problems(raw: Mapping[str, Any]) -> Iterator[str]:
    if raw.get("peft_type") != "LORA":
        yield f"peft_type is {raw.get('peft_type')!r}; it must be 'LORA'"
    if not _is_rank(raw.get("r", 8)):
        yield f"r is {raw['r']!r}; it must be a whole number of at least 1"
    if not _is_number(raw.get("lora_alpha", 8)):
        yield f"lora_alpha is {raw['lora_alpha']!r}; it must be a number that float32 holds"
    for field, (wanted, is_good) in _SHAPES.items():
        if raw.get(field) and not is_good(raw[field]):
            yield f"{field} is {raw[field]!r}; it must be {wanted}"
    if raw.get("bias", "none") != "none":
        yield f"bias is {raw['bias']!r}: biases are not supported"
    init = raw.get("init_lora_weights", True)
    if str(init).lower() not in _HARMLESS_INITS:
        yield (
            f"init_lora_weights is {init!r}, which may change the base weights too; "
            "save the adapter converted to plain LoRA"
        )
    for field, value in raw.items():
        if value and field not in _HARMLESS:
            # ascii: a name may hold what no answer can be encoded with
            name = field if field.isprintable() else ascii(field)
            yield f"{name} is {value!r}: {_REASONS.get(field, 'this field is not known here')}"


def _by_pattern(patterns: Mapping[str, T], key: str, default: T) -> T:
    for pattern, value in patterns.items():
        if _matches(regex.match, _end_of_name(pattern), key):
            return value
    return default


def _end_of_name(pattern: str) -> str:
    """PEFT's, to the letter: what a pattern means, and whether it can be read, depends on it."""
    return rf"(.*\.)?({pattern})$"


def _names(names: tuple[str, ...] | str, key: str) -> bool:
    if not isinstance(names, str):
        return _ends_with_one(key, names)
    if names.lower() == "all-linear":  # the LM head is not among them
        return key.endswith(("q_proj", "k_proj", "v_proj", "o_proj"))
    return _matches(regex.fullmatch, names, key)


def _matches(match: Callable[..., Any], pattern: str, key: str) -> bool:
    """Whether regex.match or regex.fullmatch finds the pattern; meanwhile other threads go on."""
    try:
        return match(pattern, key, timeout=_PATIENCE, concurrent=True) is not None
    except TimeoutError:
        raise ConfigError(
            f"adapter_config.json: {pattern!r} takes longer than {_PATIENCE} s to match {key}; "
            "write it without repetitions in repetitions"
        ) from None


def _ends_with_one(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.endswith(f".{name}") for name in names)


def _names_field(raw: Mapping[str, Any], field: str) -> tuple[str, ...] | str:
    value = raw.get(field) or ()
    return value if isinstance(value, str) else tuple(value)


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _LARGEST


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)  # as PEFT does; what it takes means the same to regex, which has a timeout
        regex.compile(text)
    except (re.error, regex.error, OverflowError, RecursionError):
        return False
    return True


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(entry) is kind for entry in value)


def _are_names(value: Any) -> bool:
    return _is_pattern(value) if isinstance(value, str) else _is_list(value, str)


def _are_patterns(value: Any, is_good: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(
        _is_pattern(_end_of_name(pattern)) and is_good(number) for pattern, number in value.items()
    )


_NAMES = "a list of names or one regular expression"
_SHAPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "use_rslora": ("true or false", lambda value: value is True),
    "rank_pattern": (
        "regular expressions with whole numbers of at least 1",
        lambda value: _are_patterns(value, _is_rank),
    ),
    "alpha_pattern": (
        "regular expressions with numbers that float32 holds",
        lambda value: _are_patterns(value, _is_number),
    ),
    "target_modules": (_NAMES, _are_names),
    "exclude_modules": (_NAMES, _are_names),
    "target_parameters": ("a list of names", lambda value: _is_list(value, str)),
    "layers_to_transform": (
        "a whole number or a list of them",
        lambda value: type(value) is int or _is_list(value, int),
    ),
}
