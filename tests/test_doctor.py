"""What `headrace doctor` takes for the sizes of the bundled model is what its files say."""

from math import prod

import pytest
from safetensors import safe_open

from headrace.doctor import KNOWN_MODELS
from headrace.files import BUNDLED_MODEL
from headrace.models.config import read_config


def test_the_bundled_models_sizes() -> None:
    [known] = [model for model in KNOWN_MODELS if model.name == "bundled"]
    file, config = BUNDLED_MODEL / "model.safetensors", read_config(BUNDLED_MODEL)
    num_params = 0
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            size = prod(tensors.get_slice(name).get_shape())
            num_params += size * (2 if name.endswith("_blocks") else not name.endswith("_scales"))
    assert known.num_params == pytest.approx(num_params, rel=0.01)
    assert known.mxfp4_bytes == pytest.approx(file.stat().st_size, rel=0.01)
    num_full = config.layer_types.count("full_attention")
    values = 2 * num_full * config.num_key_value_heads * config.head_dim
    assert known.kv_values_per_token == values
