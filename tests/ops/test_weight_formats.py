"""Whatever stands in FORMATS survives its round trips: a new format is tested by being there."""

from __future__ import annotations

from dataclasses import fields, is_dataclass

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from headrace.ops.mxfp4_kernel import RowOrder
from headrace.ops.weight_formats import FORMATS, WeightFormat, dequantized, in_gpu_layout

SHAPES = [(2, 96, 160), (1, 64, 128), (3, 6, 32)]  # [num_experts, out_features, in_features]
form_names = pytest.mark.parametrize("name", FORMATS)


def random_weight(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def tensors_of(packed: object) -> list[Tensor]:
    if is_dataclass(packed):
        return [getattr(packed, field.name) for field in fields(packed)]
    assert isinstance(packed, Tensor)
    return [packed]


def survives(form: WeightFormat, packed: object, order: RowOrder) -> bool:
    back = form.restore(form.prepare(packed, order))
    return all(map(torch.equal, tensors_of(back), tensors_of(packed)))


@form_names
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", RowOrder)
def test_gpu_layout_and_back(name: str, shape: tuple[int, ...], order: RowOrder) -> None:
    form = FORMATS[name]
    packed = form.quantize(random_weight(shape))
    assert isinstance(packed, form.checkpoint_type)
    on_gpu = form.prepare(packed, order)
    assert isinstance(on_gpu, form.gpu_type)
    assert survives(form, packed, order)
    # which dimension of the packed weight is N: never a padded or a halved one
    assert (on_gpu.num_experts, on_gpu.out_features, on_gpu.in_features) == shape


@form_names
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_back(name: str, shape: tuple[int, ...]) -> None:
    form, weight = FORMATS[name], random_weight(shape)
    packed = form.quantize(weight)
    values = form.dequantize(packed, torch.float32)
    assert values.shape == weight.shape
    again = form.dequantize(form.quantize(values), torch.float32)
    assert torch.equal(again, values)  # what the format holds, it holds exactly
    assert 0 < (values - weight).norm() / weight.norm() < 0.15
    for layout in (packed, form.prepare(packed, RowOrder.INTERLEAVED)):
        assert torch.equal(dequantized(layout, torch.float32), values)


@form_names
def test_a_changed_bit_is_noticed(name: str) -> None:
    form = FORMATS[name]
    packed = form.quantize(random_weight((2, 96, 160)))
    on_gpu = form.prepare(packed, RowOrder.INTERLEAVED)
    first = tensors_of(packed)[0].clone()
    bits = getattr(on_gpu, "words", getattr(on_gpu, "values", None)).view(torch.int16)
    bits.flatten()[1234] ^= 1
    assert not torch.equal(tensors_of(form.restore(on_gpu))[0], first)


@form_names
def test_a_checkpoints_weight_finds_its_format(name: str) -> None:
    packed = FORMATS[name].quantize(random_weight((2, 96, 160)))
    assert isinstance(in_gpu_layout(packed, RowOrder.INTERLEAVED), FORMATS[name].gpu_type)


def test_a_transposed_dense_weight_is_stored_contiguously() -> None:
    weight = random_weight((2, 160, 96)).bfloat16().transpose(1, 2)
    on_gpu = in_gpu_layout(weight, RowOrder.PLAIN)
    assert on_gpu.values.is_contiguous()
    assert torch.equal(on_gpu.values, weight)


def test_an_unknown_layout_is_named() -> None:
    with pytest.raises(ValueError, match=r"a list is in no known format; there are \['mxfp4'"):
        in_gpu_layout([1.0], RowOrder.PLAIN)
    with pytest.raises(ValueError, match=r"a list is in no known format; there are \['mxfp4'"):
        dequantized([1.0], torch.float32)
