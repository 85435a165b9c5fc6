"""From a checkpoint's directory to a model that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from headrace.config import ConfigError
from headrace.models.batch import Batch, KVLayout
from headrace.models.config import GptOssConfig, read_config
from headrace.models.gpt_oss import GptOss
from headrace.models.gpt_oss_weights import load_gpt_oss
from headrace.models.weights import Checkpoint, Progress

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Model(Protocol):
    """What the engine knows of a model."""

    config: GptOssConfig
    device: torch.device
    dtype: torch.dtype
    kv_layout: KVLayout

    def forward(self, batch: Batch) -> Tensor:
        """Logits of batch.output_rows, [num_outputs, vocab_size] float32."""
        ...


def load_model(
    path: Path,
    device: str = "cpu",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> Model:
    """Load the checkpoint in a directory of Hugging Face layout.

    device: cpu, cuda or auto (cuda if there is one). dtype: float32, bfloat16 or auto (float32 on
    the CPU, bfloat16 elsewhere). progress is called with (bytes read, bytes in all).
    Raises ConfigError naming the flag, the field or the tensor at fault.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    if dtype not in _DTYPES:
        raise ConfigError(f"--dtype is {dtype}; it must be auto or {' or '.join(_DTYPES)}")
    config = read_config(path)
    checkpoint = Checkpoint(path, device, progress)
    return GptOss(config, load_gpt_oss(config, checkpoint, _DTYPES[dtype]))
