"""The sum over a token's slots and the next norm, in Triton's interpreter and on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headrace.ops.norm import NextNorm, rms_norm
from headrace.ops.weighted_sum_kernel import weighted_sum

gpu = pytest.mark.gpu
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton on a CPU")
EPS = 1e-2


def exact(y: Tensor, ids: Tensor, local: range, residual: Tensor | None) -> Tensor:
    """By the formula, in float64."""
    slots = y.double().view(*ids.shape, y.shape[1])
    held = (ids >= local.start) & (ids < local.stop)
    total = torch.where(held[..., None], slots, 0.0).sum(1)
    return total if residual is None else total + residual.double()


def exact_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


class Sum:
    """Slots of so many tokens; those of experts that are not held here were never written."""

    def __init__(self, num_tokens: int, hidden: int, top_k: int, local: range, device: str) -> None:
        generator = torch.Generator(device).manual_seed(num_tokens)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, generator=generator).to(dtype)

        self.local = local
        self.ids = torch.randint(
            0, 8, (num_tokens, top_k), device=device, generator=generator, dtype=torch.int32
        )
        held = (self.ids >= local.start) & (self.ids < local.stop)
        self.y = random(num_tokens * top_k, hidden)
        self.y[~held.view(-1)] = float("nan")
        self.residual, self.weight = random(num_tokens, hidden), random(hidden)

    def run(self, rows: slice = slice(None), norm: bool = True) -> tuple[Tensor, Tensor]:
        ids, residual = self.ids[rows], self.residual[rows]
        y = self.y.view(*self.ids.shape, self.y.shape[1])[rows].flatten(0, 1)
        out, normed = torch.full_like(residual, float("nan")), torch.zeros_like(residual)
        next_norm = NextNorm(self.weight, EPS, normed) if norm else None
        assert weighted_sum(y, ids, self.local, residual, out, next_norm) is out
        return out, normed


@interpreted
@pytest.mark.parametrize(
    ("num_tokens", "hidden", "top_k"), [(0, 64, 4), (1, 7, 1), (3, 1500, 4), (2, 2880, 8)]
)
@pytest.mark.parametrize("local", [range(8), range(2, 6)])
def test_equals_float64(num_tokens: int, hidden: int, top_k: int, local: range) -> None:
    step = Sum(num_tokens, hidden, top_k, local, "cpu")
    out, normed = step.run()
    close = {"rtol": 1e-5, "atol": 1e-5}
    expected = exact(step.y, step.ids, local, step.residual)
    torch.testing.assert_close(out.double(), expected, **close)
    torch.testing.assert_close(normed.double(), exact_norm(expected, step.weight), **close)
    assert torch.equal(step.run(norm=False)[0], out)
    wrong = exact(step.y, step.ids, local, None), exact_norm(expected, step.weight.roll(1))
    for got, bad in zip((out, normed), wrong, strict=True):
        if num_tokens:
            with pytest.raises(AssertionError):
                torch.testing.assert_close(got.double(), bad, **close)


@interpreted
def test_in_place_of_the_residual() -> None:
    step = Sum(3, 96, 2, range(8), "cpu")
    expected, _ = step.run()
    got = step.residual
    weighted_sum(step.y, step.ids, step.local, got, got)
    assert torch.equal(got, expected)


@gpu
def test_gpu_equals_float64_and_a_row_its_own_bits() -> None:
    step = Sum(4096, 2880, 4, range(8), "cuda")
    out, normed = step.run()
    expected = exact(step.y, step.ids, step.local, step.residual)
    torch.testing.assert_close(out.double(), expected, rtol=1.01 * 2**-8, atol=1e-6)
    close = {"rtol": 1.01 * 2**-8, "atol": 1e-6}
    torch.testing.assert_close(normed.double(), exact_norm(out, step.weight), **close)
    assert not torch.equal(normed, rms_norm(out, step.weight, 1e-1))
    assert torch.equal(step.run(norm=False)[0], out)
    for num_tokens in (1, 2, 3, 7, 16, 17, 129, 1000):
        rows = slice(5, 5 + num_tokens)
        for got, whole in zip(step.run(rows), (out, normed), strict=True):
            assert torch.equal(got, whole[rows])
