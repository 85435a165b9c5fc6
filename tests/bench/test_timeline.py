from __future__ import annotations

import pytest

from headrace.bench.timeline import Busy, Span, name_ops, one_step, split_steps


def test_times_and_gaps_of_a_step_by_hand() -> None:
    """Ends before it starts again at 25; the third begins while the second still runs."""
    spans = [Span("a", 0, 10), Span("b", 12, 20), Span("c", 15, 23), Span("b", 25, 30)]
    step = one_step(spans, until=37)
    assert step.kernels == [Busy("a", 10), Busy("b", 8), Busy("c", 3), Busy("b", 5)]
    assert step.between_kernels_us == 2 + 2
    assert step.between_steps_us == 7
    assert step.us == 37


def test_a_kernel_within_another_adds_nothing() -> None:
    step = one_step([Span("long", 5, 100), Span("copy", 20, 30), Span("next", 100, 110)])
    assert step.kernels == [Busy("long", 95), Busy("copy", 0), Busy("next", 10)]
    assert (step.between_kernels_us, step.between_steps_us, step.us) == (0, 0, 105)


def test_steps_begin_with_a_kernel_that_runs_in_each() -> None:
    spans = []
    for i, start in enumerate((0, 100, 210, 330)):
        if i:
            spans.append(Span("sometimes", start - 3, start - 2))
        spans += [Span("embed", start, start + 4), Span("layer", start + 4, start + 20)]
        spans += [Span("layer", start + 22, start + 40), Span("sample", start + 40, start + 50)]
    steps = split_steps(reversed(spans), 4)
    assert [step.us for step in steps] == [100, 110, 120]
    assert [k.name for k in steps[0].kernels][:4] == ["embed", "layer", "layer", "sample"]
    assert [step.between_kernels_us for step in steps] == [2 + 47, 2 + 57, 2 + 67]
    assert [step.between_steps_us for step in steps] == [2, 2, 2]


def test_steps_that_begin_with_two_copies() -> None:
    spans = []
    for start in (0, 100, 210):
        spans += [Span("copy", start, start + 2), Span("copy", start + 3, start + 5)]
        spans += [Span("layer", start + 6, start + 50)]
    assert [step.us for step in split_steps(spans, 3)] == [100, 110]


def test_steps_that_cannot_be_told_apart() -> None:
    with pytest.raises(ValueError, match="ran equally often in 3 steps"):
        split_steps([Span("a", 0, 1), Span("a", 2, 3)], 3)


def test_kernels_of_several_ops_get_their_names() -> None:
    names = ["embed", *["linear", "attend", "linear", "matmul", "matmul"] * 2, "linear"]
    ops = {"linear": ("qkv", "output"), "matmul": ("gate_up", "down"), "attend": ("attention",)}
    named = name_ops([Busy(n, 1.0) for n in names], ops, 2, {"linear": "lm_head"})
    layer = "linear qkv, attend attention, linear output, matmul gate_up, matmul down"
    assert [k.name for k in named] == ["embed", *layer.split(", ") * 2, "linear lm_head"]


def test_names_that_occur_another_number_of_times_stay() -> None:
    kernels = [Busy("linear", 1.0)] * 4
    assert name_ops(kernels, {"linear": ("qkv", "output")}, 2, {"linear": "lm_head"}) == kernels
