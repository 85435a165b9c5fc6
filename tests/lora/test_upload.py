"""Copies through blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headrace.lora import upload

SOURCES = [
    torch.arange(5 * 7.0).view(1, 5, 7),
    torch.randn(6, 4, 8).bfloat16().permute(2, 1, 0),  # the experts' B, the expert fastest
    torch.randn(9, 3).half().T[None],
    torch.randn(4, 5, 6)[2:],  # does not begin where its storage does
]


@pytest.mark.parametrize("source", SOURCES)
def test_an_upload_is_a_copy_with_the_same_strides(
    source: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "BLOCK_BYTES", 64)
    uploader = upload.Uploader(torch.device("cpu"), source.nbytes)
    before = source.clone()
    for sign in (1, -1):
        copy = uploader.upload(sign * source)
        assert torch.equal(copy, sign * before)
        assert copy.stride() == source.stride()
