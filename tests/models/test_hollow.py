from __future__ import annotations

from contextlib import closing
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from headrace.config import ConfigError
from headrace.models.config import read_config
from headrace.models.file_reader import FileReader
from headrace.models.gpt_oss_weights import load_gpt_oss
from headrace.models.hollow import hollow_model
from headrace.models.weights import Checkpoint
from tests.checkpoints import random_checkpoint

CPU = torch.device("cpu")


def form_of(value: Any) -> Any:
    """What kernels are compiled for: shapes, strides, dtypes and plain values; not the numbers."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if is_dataclass(value):
        return type(value), {f.name: form_of(getattr(value, f.name)) for f in fields(value)}
    return value


@pytest.mark.parametrize("experts", ["mxfp4", "dense"])
@pytest.mark.parametrize("attention_bias", [True, False])
def test_the_layers_have_the_form_of_the_checkpoints(
    tmp_path: Path, experts: str, attention_bias: bool
) -> None:
    path = random_checkpoint(
        tmp_path,
        seed=0,
        experts=experts,
        num_hidden_layers=6,
        layer_types=["full_attention"] * 3 + ["sliding_attention"] * 3,
        attention_bias=attention_bias,
    )
    hollow = hollow_model(path, CPU)
    with closing(FileReader(CPU)) as reader:
        checkpoint = Checkpoint(path, reader)
        full = load_gpt_oss(read_config(path), checkpoint, torch.bfloat16, True)
    assert [form_of(layer) for layer in hollow.weights.layers] == [form_of(full.layers[0])] * 2
    assert form_of(hollow.weights.embedding) == form_of(full.embedding)
    assert form_of(hollow.weights.lm_head) == form_of(full.lm_head)
    assert hollow.kv_layout.windows == (0, 16)
    assert hollow.kv_layout.group_of_layer == (0, 1)


def test_a_directory_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        hollow_model(tmp_path, CPU)
