from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from headrace.ops.rope import (
    apply_rope,
    rope_and_cache,
    rope_cos_sin,
    rope_inv_freq,
    yarn_attention_factor,
    yarn_inv_freq,
)

GPT_OSS = {
    "head_dim": 64,
    "theta": 150000.0,
    "factor": 32.0,
    "original_context": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
}


@pytest.mark.parametrize("i", [0, 8, 9, 17, 18, 31])
def test_yarn_frequencies_of_gpt_oss(i: int) -> None:
    """The bounds are 8.0928 and 17.3980: pure original up to 8, pure interpolated from 18 on."""
    low, high = (64 * math.log(4096 / (t * 2 * math.pi)) / 2 / math.log(150000) for t in (32, 1))
    assert (round(low, 4), round(high, 4)) == (8.0928, 17.3980)
    original = 150000 ** (-2 * i / 64)
    ramp = min(max((i - low) / (high - low), 0), 1)
    expected = original / 32 * ramp + original * (1 - ramp)
    got = yarn_inv_freq(**GPT_OSS)[i].item()
    assert got == pytest.approx(expected, rel=1e-12)
    if i <= 8:
        assert got == pytest.approx(original, rel=1e-12)
    if i >= 18:
        assert got == pytest.approx(original / 32, rel=1e-12)


def test_rounded_bounds_are_noticed() -> None:
    """The usual YaRN rounds its bounds outwards; gpt-oss does not."""
    exact, rounded = yarn_inv_freq(**GPT_OSS), yarn_inv_freq(**GPT_OSS | {"truncate": True})
    assert torch.equal(exact[:9], rounded[:9])
    assert (exact[9:17] / rounded[9:17] - 1).abs().min() > 1e-3


def test_an_empty_ramp_is_a_step() -> None:
    got = yarn_inv_freq(**GPT_OSS | {"beta_slow": 32.0})
    freq = rope_inv_freq(64, 150000.0)
    assert_close(got, torch.where(torch.arange(32) > 8, freq / 32, freq))


def test_attention_factor() -> None:
    assert yarn_attention_factor(32.0) == pytest.approx(1.34657, abs=1e-5)
    assert yarn_attention_factor(1.0) == 1.0


def test_rotation_turns_pairs_of_the_two_halves() -> None:
    """As complex numbers: (a + ib) e^(i position f), times the attention factor."""
    x = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    positions, freq = torch.tensor([0, 5, 1000]), rope_inv_freq(8, 100.0)
    got = apply_rope(x, *rope_cos_sin(positions, freq.float(), 1.25))
    turned = torch.complex(x[..., :4], x[..., 4:]).to(torch.complex128)
    turned = turned * 1.25 * torch.exp(1j * positions[:, None] * freq)[:, None]
    expected = torch.cat((turned.real, turned.imag), -1)
    assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
    interleaved = x.unflatten(-1, (4, 2)).transpose(-1, -2).flatten(-2)
    wrong = apply_rope(interleaved, *rope_cos_sin(positions, freq.float(), 1.25))
    with pytest.raises(AssertionError):
        assert_close(wrong.double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(got[0], x[0] * 1.25)


def test_bfloat16_is_turned_in_float32() -> None:
    x = torch.randn(4, 1, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    rope = rope_cos_sin(torch.arange(4), yarn_inv_freq(**GPT_OSS).float(), 1.0)
    assert torch.equal(apply_rope(x, *rope), apply_rope(x.float(), *rope).bfloat16())


def test_rope_and_cache_splits_turns_and_writes() -> None:
    qkv = torch.randn(3, (4 + 2 + 2) * 8, generator=torch.Generator().manual_seed(0))
    rope = rope_cos_sin(torch.tensor([7, 0, 9]), rope_inv_freq(8, 100.0).float(), 1.25)
    cache = torch.full((2, 2, 4, 2, 8), torch.nan)
    out = torch.full((3, 4, 8), torch.nan)
    assert rope_and_cache(qkv, *rope, cache, torch.tensor([5, -1, 2]), 4, 2, out=out) is out
    heads = qkv.view(3, 8, 8)
    assert torch.equal(out, apply_rope(heads[:, :4], *rope))
    keys, values = cache.flatten(1, 2)
    assert torch.equal(keys[[5, 2]], apply_rope(heads[:, 4:6], *rope)[[0, 2]])
    assert torch.equal(values[[5, 2]], heads[[0, 2], 6:])
    assert cache.flatten(1, 2)[:, [0, 1, 3, 4, 6, 7]].isnan().all()
    alone = rope_and_cache(qkv[:1], *(t[:1] for t in rope), cache, torch.tensor([5]), 4, 2)
    assert torch.equal(alone, out[:1])
