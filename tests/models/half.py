"""A model as Triton's interpreter can run it: float16, for it has no bfloat16."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor

from headrace.models import Model
from headrace.models.gpt_oss import GptOss, LayerWeights
from headrace.ops.mxfp4 import MXFP4Weight
from headrace.ops.mxfp4_kernel import RowOrder, prepare


def in_half(model: Model) -> GptOss:
    """The model in float16 with experts in the GPU's layout."""
    assert isinstance(model, GptOss)
    weights = model.weights

    def half(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.half() if value.is_floating_point() else value
        if is_dataclass(value) and not isinstance(value, type):
            changes = {f.name: half(getattr(value, f.name)) for f in fields(value)}
            return replace(value, **changes)
        return value

    def for_gpu(layer: LayerWeights) -> LayerWeights:
        experts = layer.moe.experts
        assert isinstance(experts.gate_up, MXFP4Weight)
        assert isinstance(experts.down, MXFP4Weight)
        pairs, plain = RowOrder.INTERLEAVED, RowOrder.PLAIN
        prepared = replace(
            experts,
            gate_up=prepare(experts.gate_up.blocks, experts.gate_up.scales, pairs),
            down=prepare(experts.down.blocks, experts.down.scales, plain),
        )
        return replace(layer, moe=replace(layer.moe, experts=prepared))

    layers = tuple(half(for_gpu(layer)) for layer in weights.layers)
    return GptOss(model.config, half(replace(weights, layers=layers)))
