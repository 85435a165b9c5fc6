"""A checkpoint of zeros, for tests that look at launches and not at numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from headrace.bench.synth import SIZES
from headrace.models.config import GptOssConfig, parse_config
from headrace.models.gpt_oss import GptOss
from headrace.models.gpt_oss_weights import Shapes, read_gpt_oss, tensor_shapes


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


def one_layer_of_each_kind(config: GptOssConfig) -> GptOssConfig:
    """The config without layers that are like an earlier one."""
    kinds = tuple(dict.fromkeys(config.layer_types))
    return replace(config, num_hidden_layers=len(kinds), layer_types=kinds)


def narrow_20b() -> GptOss:
    """gpt-oss-20b in the GPU's layout, on the CPU, for launches that lead to its kernels.

    The widths on which the choice of kernels depends are its own; one layer of each kind, fewer
    words and narrower experts take less memory.
    """
    config = one_layer_of_each_kind(parse_config(SIZES["20b"]))
    config = replace(config, vocab_size=20480, intermediate_size=192)
    zeros = Zeros(tensor_shapes(config, True), torch.device("cpu"))
    return GptOss(config, read_gpt_oss(config, zeros, True, torch.bfloat16, gpu_layout=True))
