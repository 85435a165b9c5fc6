from __future__ import annotations

import pytest
import torch

from headrace.bench.cases_sampling import (
    KINDS,
    random_logits,
    random_rows,
    sample_case,
    score_case,
)

CPU = torch.device("cpu")
VOCAB = 3000


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_tokens_are_noticed(kind: str) -> None:
    torch.manual_seed(0)
    rows = random_rows(kind, random_logits(5, VOCAB, CPU))
    case = sample_case(kind, rows)
    case.check()
    right = case.run(0).clone()  # type: ignore[attr-defined]
    for wrong in (right - 1, right.roll(1), case.run(1)):
        with pytest.raises(AssertionError):
            rows.check_tokens(wrong)


def test_bytes() -> None:
    rows = random_rows("top_p", random_logits(3, VOCAB, CPU))
    case = sample_case("top_p", rows)
    assert (case.name, case.num_tokens) == ("sample kind=top_p", 3)
    assert case.num_bytes == 3 * VOCAB * 4


def test_wrong_logprobs_are_noticed() -> None:
    torch.manual_seed(0)
    rows = random_rows("greedy", random_logits(4, VOCAB, CPU))
    case = score_case(rows)
    case.check()
    ids, logprobs, _ = rows.score(0)
    rows.check_logprobs(ids, logprobs)
    with pytest.raises(AssertionError):
        rows.check_logprobs(ids, logprobs + 1e-4)
    with pytest.raises(AssertionError):
        rows.check_logprobs(ids.roll(1, 1), logprobs)
    with pytest.raises(AssertionError):
        rows.check_logprobs(*rows.score(1)[:2])
