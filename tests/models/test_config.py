from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headrace.config import ConfigError
from headrace.models.config import parse_config, read_config
from tests.checkpoints import YARN, tiny_config

GPT_OSS_20B: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "quantization_config": {"quant_method": "mxfp4"},
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}


def test_the_20b_model() -> None:
    config = parse_config(GPT_OSS_20B)
    assert config.layer_types == ("sliding_attention", "full_attention") * 12
    assert config.rope_theta == 150000.0
    assert config.swiglu_alpha == 1.702
    assert config.eos_token_id == [200002]
    assert config.yarn is not None
    assert (config.yarn.factor, config.yarn.truncate) == (32.0, False)


def test_rope_parameters_of_newer_files_say_the_same() -> None:
    old = parse_config(tiny_config())
    new = tiny_config(rope_parameters=YARN | {"rope_theta": 150000.0})
    del new["rope_scaling"], new["rope_theta"]
    assert parse_config(new) == old
    assert parse_config(tiny_config(rope_scaling=None)).yarn is None


def test_truncate_is_the_default_of_yarn() -> None:
    yarn = {name: value for name, value in YARN.items() if name != "truncate"}
    assert parse_config(tiny_config(rope_scaling=yarn)).yarn.truncate is True


def test_eos_ids_come_from_the_generation_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    assert read_config(tmp_path).eos_token_id == [2]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert read_config(tmp_path).eos_token_id == [7, 9]
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 1.0}))
    assert read_config(tmp_path).eos_token_id == [2]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["LlamaForCausalLM"]}, "architectures is ['LlamaForCausalLM']"),
    ({"architectures": None}, "architectures is None"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; it must be silu"),
    ({"hidden_size": None}, "hidden_size is None"),
    ({"hidden_size": "64"}, "hidden_size is '64'"),
    ({"hidden_size": 0}, "hidden_size is 0; it must be a number above 0"),
    ({"sliding_window": -4}, "sliding_window is -4"),
    ({"attention_bias": 1}, "attention_bias is 1; it must be a value of type bool"),
    ({"head_dim": 15}, "head_dim is 15; it must be even"),
    ({"num_attention_heads": 5}, "num_attention_heads is 5; it must be a multiple of"),
    ({"num_experts_per_tok": 6}, "num_experts_per_tok is 6; it must be at most"),
    ({"layer_types": ["full_attention"]}, "layer_types is ['full_attention']"),
    ({"layer_types": ["full_attention", "mamba"]}, "layer_types is 'mamba'"),
    ({"rope_scaling": YARN | {"rope_type": "llama3"}}, "rope_type is 'llama3'"),
    ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'"),
    ({"rope_scaling": YARN | {"mscale": 2.0}}, "mscale is 2.0"),
    ({"rope_scaling": YARN | {"factor": None}}, "factor is None"),
    ({"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ({"eos_token_id": "end"}, "eos_token_id is 'end'"),
]


@pytest.mark.parametrize(("wrong", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_a_wrong_field_is_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(tiny_config() | wrong)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_field_is_named() -> None:
    config = tiny_config()
    del config["num_local_experts"]
    with pytest.raises(ConfigError, match="num_local_experts is None"):
        parse_config(config)
