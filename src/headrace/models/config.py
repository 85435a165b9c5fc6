"""The typed form of a checkpoint's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from headrace.config import ConfigError
from headrace.files import read_json

ARCHITECTURE = "GptOssForCausalLM"
_LAYER_TYPES = ("sliding_attention", "full_attention")

T = TypeVar("T")


@dataclass(frozen=True)
class YarnConfig:
    """How positions beyond the original context are reached; names as in config.json."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    attention_factor: float | None  # None: from factor


@dataclass(frozen=True)
class GptOssConfig:
    """A gpt-oss model; names as in config.json. Raises ConfigError naming the field."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    num_experts_per_tok: int
    sliding_window: int
    layer_types: tuple[str, ...]  # [num_hidden_layers] sliding_attention or full_attention
    max_position_embeddings: int
    rope_theta: float
    yarn: YarnConfig | None  # None: plain rope
    rms_norm_eps: float
    swiglu_alpha: float
    swiglu_limit: float
    attention_bias: bool
    tie_word_embeddings: bool
    eos_token_id: list[int]

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) in (int, float) and value <= 0:
                _refuse(name, value, "a number above 0")
        if self.num_attention_heads % self.num_key_value_heads:
            allowed = f"a multiple of num_key_value_heads ({self.num_key_value_heads})"
            _refuse("num_attention_heads", self.num_attention_heads, allowed)
        if self.head_dim % 2:
            _refuse("head_dim", self.head_dim, "even")
        if self.num_experts_per_tok > self.num_local_experts:
            allowed = f"at most num_local_experts ({self.num_local_experts})"
            _refuse("num_experts_per_tok", self.num_experts_per_tok, allowed)
        if len(self.layer_types) != self.num_hidden_layers:
            allowed = f"a list of num_hidden_layers ({self.num_hidden_layers}) entries"
            _refuse("layer_types", list(self.layer_types), allowed)
        for kind in self.layer_types:
            if kind not in _LAYER_TYPES:
                _refuse("layer_types", kind, " or ".join(_LAYER_TYPES))


def read_config(path: Path) -> GptOssConfig:
    """Read config.json, and the eos ids of generation_config.json where there is one."""
    raw = read_json(path / "config.json")
    generation = path / "generation_config.json"
    if generation.exists():
        raw["eos_token_id"] = read_json(generation).get("eos_token_id", raw.get("eos_token_id"))
    return parse_config(raw)


def parse_config(raw: Mapping[str, Any]) -> GptOssConfig:
    """Check and type the fields that the model's arithmetic depends on; others are ignored."""
    if raw.get("architectures") != [ARCHITECTURE]:
        _refuse("architectures", raw.get("architectures"), f"['{ARCHITECTURE}']")
    if raw.get("hidden_act", "silu") != "silu":
        _refuse("hidden_act", raw["hidden_act"], "silu")
    num_layers = _field(raw, "num_hidden_layers", int)
    rope = _rope_fields(raw)
    return GptOssConfig(
        vocab_size=_field(raw, "vocab_size", int),
        hidden_size=_field(raw, "hidden_size", int),
        intermediate_size=_field(raw, "intermediate_size", int),
        num_hidden_layers=num_layers,
        num_attention_heads=_field(raw, "num_attention_heads", int),
        num_key_value_heads=_field(raw, "num_key_value_heads", int),
        head_dim=_field(raw, "head_dim", int),
        num_local_experts=_field(raw, "num_local_experts", int),
        num_experts_per_tok=_field(raw, "num_experts_per_tok", int),
        sliding_window=_field(raw, "sliding_window", int),
        layer_types=tuple(
            _field(raw, "layer_types", list, [_LAYER_TYPES[i % 2] for i in range(num_layers)])
        ),
        max_position_embeddings=_field(raw, "max_position_embeddings", int),
        rope_theta=_field(rope, "rope_theta", float),
        yarn=_parse_yarn(rope),
        rms_norm_eps=_field(raw, "rms_norm_eps", float, 1e-5),
        swiglu_alpha=_field(raw, "swiglu_alpha", float, 1.702),
        swiglu_limit=_field(raw, "swiglu_limit", float, 7.0),
        attention_bias=_field(raw, "attention_bias", bool, True),
        tie_word_embeddings=_field(raw, "tie_word_embeddings", bool, False),
        eos_token_id=_parse_ids(raw.get("eos_token_id")),
    )


def _rope_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 5 writes rope_parameters; older files have rope_theta and rope_scaling."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        _refuse("rope_scaling", scaling, "an object or null")
    theta = {"rope_theta": raw["rope_theta"]} if "rope_theta" in raw else {}
    return theta | scaling


def _parse_yarn(rope: Mapping[str, Any]) -> YarnConfig | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        _refuse("rope_type", kind, "yarn or default")
    for name in ("mscale", "mscale_all_dim"):
        if rope.get(name) is not None:
            _refuse(name, rope[name], "absent (it is not implemented)")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        _refuse("partial_rotary_factor", rope["partial_rotary_factor"], "1.0")
    attention_factor = rope.get("attention_factor")
    return YarnConfig(
        factor=_field(rope, "factor", float),
        original_max_position_embeddings=_field(rope, "original_max_position_embeddings", int),
        beta_fast=_field(rope, "beta_fast", float, 32.0),
        beta_slow=_field(rope, "beta_slow", float, 1.0),
        truncate=_field(rope, "truncate", bool, True),
        attention_factor=None if attention_factor is None else float(attention_factor),
    )


def _parse_ids(value: Any) -> list[int]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int for i in ids):
        _refuse("eos_token_id", value, "an integer or a list of integers")
    return ids


def _field(raw: Mapping[str, Any], name: str, kind: type[T], default: T | None = None) -> T:
    value = raw.get(name, default)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        _refuse(name, value, f"a value of type {kind.__name__}")
    return value


def _refuse(name: str, value: Any, allowed: str) -> NoReturn:
    raise ConfigError(f"config.json: {name} is {value!r}; it must be {allowed}")
