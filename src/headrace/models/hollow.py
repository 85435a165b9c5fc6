"""A model of zeros that launches the kernels of a checkpoint's, at once and in little memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from headrace.models.config import GptOssConfig, read_config
from headrace.models.gpt_oss import GptOss
from headrace.models.gpt_oss_weights import Shapes, has_packed_experts, read_gpt_oss, tensor_shapes
from headrace.models.weights import Checkpoint


class Zeros:
    """Stands in for a checkpoint: tensors of the right shapes."""

    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        self._shapes = shapes
        self._device = device

    def prefetch(self, names: Iterable[str]) -> None:
        """There is nothing to fetch."""

    def read(self, name: str) -> Tensor:
        """Zeros of the dtype that checkpoints have."""
        is_packed = name.endswith(("_blocks", "_scales"))
        dtype = torch.uint8 if is_packed else torch.bfloat16
        return torch.zeros(self._shapes[name], dtype=dtype, device=self._device)


def hollow_model(path: Path, device: torch.device) -> GptOss:
    """The model of a checkpoint's directory with one layer of each kind, in the GPU's layout.

    Its kernels can be compiled while the weights of the true one are read. Raises ConfigError as
    `load_model` does for a config.json or a file that can't be read.
    """
    config = one_layer_of_each_kind(read_config(path))
    is_mxfp4 = has_packed_experts(Checkpoint(path))
    zeros = Zeros(tensor_shapes(config, is_mxfp4), device)
    return GptOss(config, read_gpt_oss(config, zeros, is_mxfp4, torch.bfloat16, gpu_layout=True))


def one_layer_of_each_kind(config: GptOssConfig) -> GptOssConfig:
    """The config without layers that are like an earlier one."""
    kinds = tuple(dict.fromkeys(config.layer_types))
    return replace(config, num_hidden_layers=len(kinds), layer_types=kinds)
