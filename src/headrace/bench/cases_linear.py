"""The dense layers of gpt-oss and its normalisation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from headrace.bench.case import NUM_INPUTS, NUM_WEIGHT_SETS, Case
from headrace.ops.linear import linear
from headrace.ops.norm import rms_norm

OPS = ("linear", "rms_norm")
HIDDEN = 2880
EPS = 1e-5
CHECKED_ROWS = 64


@dataclass(frozen=True)
class Layer:
    """One of the model's dense layers."""

    name: str
    out_features: int
    in_features: int
    bias: bool = True
    residual: bool = False
    out_dtype: torch.dtype = torch.bfloat16
    most_tokens: int = 1 << 20  # more are never asked of it at once


LAYERS = (
    Layer("qkv", 5120, HIDDEN),
    Layer("output", HIDDEN, 4096, residual=True),
    Layer("lm_head", 201088, HIDDEN, False, out_dtype=torch.float32, most_tokens=128),
)


@dataclass(frozen=True)
class Calls:
    """What the calls of one case read and write: call i takes input i % 8, weight i % 3."""

    inputs: Sequence[Tensor]  # each [num_tokens, in_features]
    weights: Sequence[Tensor]  # each [out_features, in_features]
    bias: Tensor | None  # [out_features]
    residual: Tensor | None  # [num_tokens, out_features]
    out: Tensor  # [num_tokens, out_features]

    def run(self, i: int) -> Tensor:
        """The public op."""
        x, weight = self.operands(i)
        return linear(x, weight, self.bias, self.residual, self.out)

    def operands(self, i: int) -> tuple[Tensor, Tensor]:
        """x and weight of call i."""
        return self.inputs[i % len(self.inputs)], self.weights[i % len(self.weights)]

    def check(self) -> None:
        """Its first and last rows against float64."""
        self.out.fill_(float("nan"))
        self.check_result(self.run(0))

    def check_result(self, out: Tensor) -> None:
        """Those rows of call 0's result: bfloat16 is rounded once, float32 as sums of it are."""
        x, weight = self.operands(0)
        rows = torch.cat([torch.arange(len(x))[:CHECKED_ROWS], torch.arange(len(x))[-1:]])
        expected = x[rows].double() @ weight.double().T
        for term in (self.bias, None if self.residual is None else self.residual[rows]):
            if term is not None:
                expected += term
        rtol = 1.01 * 2**-8 if out.dtype == torch.bfloat16 else 0.0
        torch.testing.assert_close(out[rows].double(), expected, rtol=rtol, atol=5e-4)


def cases(sizes: Sequence[int], device: torch.device) -> Iterator[Case]:
    """The three dense layers, then the normalisation."""
    for layer in LAYERS:
        weights = random_weights(layer, device)
        for num_tokens in sizes:
            if num_tokens <= layer.most_tokens:
                yield linear_case(layer, random_calls(layer, weights, num_tokens))
    for num_tokens in sizes:
        yield norm_case(num_tokens, device)


def linear_case(layer: Layer, calls: Calls) -> Case:
    """Weights, inputs, residual and result once; 2 FLOPs a weight and token."""
    num_tokens = len(calls.out)
    moved = (calls.weights[0], calls.inputs[0], calls.bias, calls.residual, calls.out)
    return Case(
        "linear",
        {"layer": layer.name},
        num_tokens,
        run=calls.run,
        check=calls.check,
        num_bytes=sum(t.nbytes for t in moved if t is not None),
        num_flops=2 * num_tokens * layer.out_features * layer.in_features,
        num_calls=6 if layer.name == "lm_head" else 24,
    )


def norm_case(num_tokens: int, device: torch.device) -> Case:
    """Read once, written once."""
    inputs = [_normal(num_tokens, HIDDEN, device=device) for _ in range(NUM_INPUTS)]
    outs = [torch.empty_like(x) for x in inputs]
    weight = _normal(HIDDEN, std=0.1, device=device) + 1

    def run(i: int) -> Tensor:
        return rms_norm(inputs[i % NUM_INPUTS], weight, EPS, outs[i % NUM_INPUTS])

    def check() -> None:
        x = inputs[0].double()
        expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.double()
        torch.testing.assert_close(run(0).double(), expected, rtol=1.01 * 2**-8, atol=1e-6)

    num_bytes = inputs[0].nbytes + outs[0].nbytes
    return Case("rms_norm", {}, num_tokens, run, check, num_bytes, 0.0, num_calls=64)


def random_weights(layer: Layer, device: torch.device) -> list[Tensor]:
    """So many of them that none is in L2 when its turn comes again."""
    count = 1 if layer.name == "lm_head" else NUM_WEIGHT_SETS
    shape = (layer.out_features, layer.in_features)
    return [_normal(*shape, std=layer.in_features**-0.5, device=device) for _ in range(count)]


def random_calls(layer: Layer, weights: Sequence[Tensor], num_tokens: int) -> Calls:
    """Random inputs for these weights."""
    normal = partial(_normal, device=weights[0].device)
    return Calls(
        [normal(num_tokens, layer.in_features) for _ in range(NUM_INPUTS)],
        weights,
        normal(layer.out_features) if layer.bias else None,
        normal(num_tokens, layer.out_features) if layer.residual else None,
        normal(num_tokens, layer.out_features).to(layer.out_dtype),
    )


def _normal(*shape: int, std: float = 1.0, device: torch.device) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=device) * std
