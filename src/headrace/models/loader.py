"""From a checkpoint's directory to a model that runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from headrace.config import ConfigError
from headrace.models.batch import Batch, KVLayout
from headrace.models.config import GptOssConfig, read_config
from headrace.models.file_reader import FileReader
from headrace.models.gpt_oss import GptOss
from headrace.models.gpt_oss_weights import (
    blank_gpt_oss,
    check_gpt_oss,
    load_gpt_oss,
    read_gpt_oss,
)
from headrace.models.weights import Checkpoint, Progress

GPU_LAYOUT_RATIO = 1.05  # of the checkpoint's bytes: padded columns, and a layer on its way
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Model(Protocol):
    """What the engine knows of a model."""

    config: GptOssConfig
    device: torch.device
    dtype: torch.dtype
    kv_layout: KVLayout

    def reserve(self, max_num_tokens: int, max_num_outputs: int, max_lora_rank: int = 0) -> None:
        """Take the memory that the largest step needs; until then every step allocates its own."""
        ...

    def base_tensor(self, name: str) -> Tensor:
        """The embedding or the LM head, by the checkpoint's name."""
        ...

    def first_layers(self) -> Model:
        """A model of as many layers as launch every kernel that this one does."""
        ...

    def forward(self, batch: Batch) -> Tensor:
        """Logits of batch.output_rows, [num_outputs, vocab_size] float32."""
        ...


def load_model(
    path: Path,
    device: str = "cpu",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> Model:
    """Load the checkpoint in a directory of Hugging Face layout: `open_model`, and all is read."""
    model, read_weights = open_model(path, device, dtype, progress)
    read_weights()
    return model


def open_model(
    path: Path,
    device: str = "cpu",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> tuple[Model, Callable[[], None]]:
    """Check a checkpoint; its model, and the function that reads the weights.

    On the GPU the model's weights are zeros until then: its forward launches the same kernels. On
    the CPU there is nothing left to read.

    device: cpu, cuda or auto (cuda if there is one). dtype: float32, bfloat16 or auto (float32 on
    the CPU, bfloat16 elsewhere). progress is called with (bytes read, bytes in all).
    Raises ConfigError naming the flag, the field or the tensor at fault; so does the function.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):  # another than the first GPU: by CUDA_VISIBLE_DEVICES
        raise ConfigError(f"--device is {device}; it must be auto, cpu or cuda")
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    if dtype not in _DTYPES:
        raise ConfigError(f"--dtype is {dtype}; it must be auto or {' or '.join(_DTYPES)}")
    if device != "cpu" and dtype == "float32":
        raise ConfigError("--dtype float32 needs --device cpu; the GPU computes in bfloat16")
    if device != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"--device is {device}, but torch finds no GPU; give --device cpu")
    config = read_config(path)
    if device == "cpu":
        weights = load_gpt_oss(config, Checkpoint(path, None, progress), _DTYPES[dtype], False)
        return GptOss(config, weights), lambda: None
    reader = FileReader(torch.device(device))
    checkpoint = Checkpoint(path, reader, progress)
    is_mxfp4 = check_gpt_oss(config, checkpoint)
    _check_memory(checkpoint)
    model = GptOss(config, blank_gpt_oss(config, is_mxfp4, torch.device(device)))

    def read_weights() -> None:
        with closing(reader):
            model.weights = read_gpt_oss(
                config, checkpoint, is_mxfp4, torch.bfloat16, gpu_layout=True
            )

    return model, read_weights


def _check_memory(checkpoint: Checkpoint) -> None:
    """Raise ConfigError, before reading, if the GPU can't hold the weights."""
    free, total = torch.cuda.mem_get_info()
    if free < checkpoint.num_bytes * GPU_LAYOUT_RATIO:
        raise ConfigError(
            f"{checkpoint.path} has {checkpoint.num_bytes / 1e9:.1f} GB of weights, and of the "
            f"GPU's {total / 1e9:.1f} GB {free / 1e9:.1f} are free; stop what else runs on it, "
            "or take a smaller model or a larger GPU"
        )
