import pytest
import torch

from headrace.ops import embedding_kernel
from headrace.ops.embedding import embed

EMBEDDING = torch.randn(50, 37, generator=torch.Generator().manual_seed(1))
SAMPLED = torch.tensor([40, 41, 42])


def test_known_ids() -> None:
    assert torch.equal(embed(torch.tensor([3, 49, 3]), EMBEDDING), EMBEDDING[[3, 49, 3]])


@pytest.mark.parametrize("op", [embed, embedding_kernel.embed])
def test_ids_of_the_step_before(op) -> None:
    ids = torch.tensor([3, -1, 0, -3, -2])
    out = torch.empty(5, 37)
    assert op(ids, EMBEDDING, SAMPLED, out) is out
    assert torch.equal(out, EMBEDDING[[3, 40, 0, 42, 41]])
    assert not torch.equal(out, EMBEDDING[[3, 41, 0, 42, 41]])


def test_no_tokens() -> None:
    out = torch.empty(0, 37)
    assert embedding_kernel.embed(torch.empty(0, dtype=torch.int64), EMBEDDING, None, out) is out


def test_a_wrong_out_is_named() -> None:
    with pytest.raises(ValueError, match=r"out has shape \(2, 36\); this call needs .*\(2, 37\)"):
        embedding_kernel.embed(torch.tensor([1, 2]), EMBEDDING, None, torch.empty(2, 36))
