"""A model of zeros, for tests that look at launches and not at numbers."""

from __future__ import annotations

from dataclasses import replace

import torch

from headrace.bench.synth import SIZES
from headrace.models.config import parse_config
from headrace.models.gpt_oss import GptOss
from headrace.models.gpt_oss_weights import blank_gpt_oss


def narrow_20b(num_layers: int = 2) -> GptOss:
    """gpt-oss-20b in the GPU's layout, on the CPU, for launches that lead to its kernels.

    The widths on which the choice of kernels depends are its own; few layers, fewer words and
    narrower experts take less memory.
    """
    config = parse_config(SIZES["20b"])
    kinds = config.layer_types[:num_layers]
    config = replace(config, num_hidden_layers=num_layers, layer_types=kinds)
    config = replace(config, vocab_size=20480, intermediate_size=192)
    return GptOss(config, blank_gpt_oss(config, True, torch.device("cpu")))
