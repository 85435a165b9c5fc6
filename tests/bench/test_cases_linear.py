from __future__ import annotations

import pytest
import torch

from headrace.bench.cases_linear import Layer, linear_case, norm_case, random_calls, random_weights

SMALL = Layer("small", 40, 24, residual=True)
CPU = torch.device("cpu")


def test_a_wrong_result_is_noticed() -> None:
    torch.manual_seed(0)
    calls = random_calls(SMALL, random_weights(SMALL, CPU), 70)
    calls.check()
    right = calls.run(0).clone()
    with pytest.raises(AssertionError):
        calls.check_result(calls.run(1))  # another input and weight
    for row, column in ((0, 3), (69, 39)):
        wrong = right.clone()
        wrong[row, column] *= 1.02
        with pytest.raises(AssertionError):
            calls.check_result(wrong)


def test_bytes_and_flops() -> None:
    case = linear_case(SMALL, random_calls(SMALL, random_weights(SMALL, CPU), 3))
    assert case.num_flops == 2 * 3 * 40 * 24
    assert case.num_bytes == 2 * (40 * 24 + 3 * 24 + 40 + 3 * 40 + 3 * 40)
    assert case.name == "linear layer=small"


def test_norm_case() -> None:
    case = norm_case(3, CPU)
    case.check()
    assert case.num_bytes == 2 * 2 * 3 * 2880
