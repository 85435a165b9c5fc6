from __future__ import annotations

import pytest
import torch

from headrace.ops.kv_write import write_kv


def test_each_token_lands_in_its_slot_and_nothing_else_changes() -> None:
    cache = torch.full((2, 5, 4, 2, 3), -1.0)
    k = torch.arange(18.0).view(3, 2, 3)
    v = k + 100
    write_kv(cache, k, v, torch.tensor([5 * 4 - 1, 0, 6]))
    expected = torch.full_like(cache, -1.0)
    for token, (page, offset) in enumerate([(4, 3), (0, 0), (1, 2)]):
        expected[0, page, offset], expected[1, page, offset] = k[token], v[token]
    assert torch.equal(cache, expected)


def test_strided_keys_and_values() -> None:
    """The model hands over views into its fused qkv."""
    cache = torch.zeros(2, 2, 2, 1, 4)
    qkv = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    write_kv(cache, qkv[:, 1:2], qkv[:, 2:], torch.tensor([3, 1]))
    assert torch.equal(cache[0, 1, 1], qkv[0, 1:2])
    assert torch.equal(cache[1, 0, 1], qkv[1, 2:])


def test_shapes_that_do_not_fit_are_a_bug() -> None:
    with pytest.raises(AssertionError, match=r"k\.shape"):
        write_kv(torch.zeros(2, 2, 2, 2, 4), *torch.zeros(2, 1, 1, 4), torch.tensor([0]))


def test_a_token_without_a_slot_is_skipped() -> None:
    cache = torch.zeros(2, 2, 2, 1, 4)
    k, v = torch.randn(2, 3, 1, 4, generator=torch.Generator().manual_seed(0))
    write_kv(cache, k, v, torch.tensor([3, -1, 1]))
    assert torch.equal(cache.flatten(1, 2)[:, [3, 1]], torch.stack((k[[0, 2]], v[[0, 2]])))
    assert not cache.flatten(1, 2)[:, [0, 2]].any()
