"""RoPE's kernels against the plain computation: interpreted at small sizes, real ones on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from headrace.ops import rope, rope_kernel
from headrace.ops.rope import rope_inv_freq

gpu = pytest.mark.gpu
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton on a CPU")


def random_step(num_tokens: int, heads: int, kv_heads: int, head_dim: int, device: str) -> dict:
    """Arguments of rope_and_cache, but for out; token 1 has no slot."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    angles = torch.rand(num_tokens, 1, head_dim // 2, device=device) * 6
    pages, page = num_tokens // 4 + 2, 8
    slots = torch.randperm(pages * page, device=device)[:num_tokens]
    slots[1:2] = -1
    return {
        "qkv": torch.randn(num_tokens, (heads + 2 * kv_heads) * head_dim, device=device).to(dtype),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "kv_cache": torch.randn(2, pages, page, kv_heads, head_dim, device=device).to(dtype),
        "slots": slots,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
    }


def check(step: dict) -> Tensor:
    """Every element of the cache and of q, against the reference on the CPU; returns q."""
    qkv, cache, heads = step["qkv"], step["kv_cache"], step["num_heads"]
    expected_cache = cache.clone().cpu()
    on_cpu = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in step.items()}
    expected = rope.rope_and_cache(**on_cpu | {"kv_cache": expected_cache})
    before = cache.clone()
    out = torch.full((len(qkv), heads, cache.shape[-1]), torch.nan).to(qkv)
    assert rope_kernel.rope_and_cache(**step, out=out) is out
    tolerance = {"rtol": 0.01, "atol": 0.01} if qkv.is_cuda else {"rtol": 1e-5, "atol": 1e-5}
    assert_close(out.cpu(), expected, **tolerance)
    assert_close(cache.cpu(), expected_cache, **tolerance)
    with pytest.raises(AssertionError):
        assert_close(cache.cpu(), before.cpu(), **tolerance)
    untouched = torch.ones(cache.shape[1] * cache.shape[2], dtype=torch.bool)
    untouched[on_cpu["slots"][on_cpu["slots"] >= 0]] = False
    assert torch.equal(cache.flatten(1, 2)[:, untouched], before.flatten(1, 2)[:, untouched])
    values = qkv.view(len(qkv), -1, cache.shape[-1])[:, -step["num_kv_heads"] :].cpu()
    slot = on_cpu["slots"][0]
    assert torch.equal(cache[1].flatten(0, 1)[slot].cpu(), values[0])
    return out


@interpreted
@pytest.mark.parametrize(
    ("num_tokens", "heads", "kv_heads", "head_dim"), [(1, 4, 2, 16), (5, 13, 2, 64), (3, 5, 1, 6)]
)
def test_interpreted(num_tokens: int, heads: int, kv_heads: int, head_dim: int) -> None:
    check(random_step(num_tokens, heads, kv_heads, head_dim, "cpu"))


@interpreted
def test_interpreted_cos_sin() -> None:
    positions, freq = torch.tensor([0, 5, 1000]), rope_inv_freq(20, 100.0).float()
    out = torch.full((3, 1, 10), torch.nan), torch.full((3, 1, 10), torch.nan)
    rope_kernel.rope_cos_sin(positions, freq, 1.25, out)
    for got, expected in zip(out, rope.rope_cos_sin(positions, freq, 1.25), strict=True):
        assert_close(got, expected)
    with pytest.raises(AssertionError):
        assert_close(out[0], out[1])


@interpreted
def test_no_tokens() -> None:
    step = random_step(0, 4, 2, 16, "cpu")
    assert rope_kernel.rope_and_cache(**step, out=torch.empty(0, 4, 16)).shape == (0, 4, 16)


@interpreted
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qkv", lambda t: t[:, 1:], r"qkv is torch.float32 \(3, 127\)"),
        ("qkv", lambda t: t.T.contiguous().T, r"strides \(1, 3\)"),
        ("cos", lambda t: t.double(), "cos is torch.float64"),
        ("slots", lambda t: t.int(), "slots is torch.int32"),
        ("slots", lambda t: t[1:], r"slots is torch.int64 \(2,\)"),
        ("kv_cache", lambda t: t[:, :, :, :1], r"kv_cache has shape \(2, 2, 8, 1, 16\)"),
    ],
)
def test_wrong_arguments_are_named(name, change, message) -> None:
    step = random_step(3, 4, 2, 16, "cpu")
    step[name] = change(step[name])
    with pytest.raises(ValueError, match=message):
        rope_kernel.rope_and_cache(**step, out=torch.empty(3, 4, 16))


@gpu
@pytest.mark.parametrize("num_tokens", [1, 2, 64, 1000])
def test_gpt_oss_sizes(num_tokens: int) -> None:
    step = random_step(num_tokens, 64, 8, 64, "cuda")
    out = check(step)
    alone = {k: v[:1] if k in ("qkv", "cos", "sin", "slots") else v for k, v in step.items()}
    assert torch.equal(rope.rope_and_cache(**alone), out[:1])


@gpu
def test_cos_sin_of_long_contexts() -> None:
    positions = torch.arange(0, 131072, 37)
    freq = rope_inv_freq(64, 150000.0).float()
    expected = rope.rope_cos_sin(positions, freq, 1.25)
    got = rope.rope_cos_sin(positions.cuda(), freq.cuda(), 1.25)
    for mine, theirs in zip(got, expected, strict=True):
        assert_close(mine.cpu(), theirs, rtol=0, atol=2e-6)
