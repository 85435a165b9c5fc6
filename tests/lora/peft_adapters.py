"""Adapters as PEFT itself makes them, on transformers' model of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.oracles import transformers_model

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def peft_model(model: Path, seed: int, is_transposed: bool = True, **config: Any) -> Any:
    """transformers' model with a random adapter that moves the logits.

    is_transposed: whether the experts tell PEFT of their layout. In transformers 4 they don't.
    """
    from peft import LoraConfig, get_peft_model

    base = transformers_model(model)
    experts = [layer.mlp.experts for layer in base.model.layers]
    for module in experts:
        module.is_transposed = is_transposed
    wrapped = get_peft_model(base, LoraConfig(**config))
    for module in experts:
        module.is_transposed = True
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            # an update of about a fifth of the weights' size, whatever the rank
            std = 0.2 * parameter.shape[-1] ** -0.5 if "lora_B" in name else 0.3
            parameter.data = torch.randn(parameter.shape, generator=generator) * std
    return wrapped.eval()


def loaded_by_peft(model: Path, adapter: Path) -> Any:
    """transformers' model with an adapter from its files."""
    from peft import PeftModel

    return PeftModel.from_pretrained(transformers_model(model), adapter).eval()


def save(wrapped: Any, path: Path) -> Path:
    """PEFT's own files."""
    wrapped.save_pretrained(path)
    return path


@torch.inference_mode()
def peft_logits(wrapped: Any, tokens: list[int]) -> Tensor:
    return wrapped(torch.tensor([tokens])).logits[0]
