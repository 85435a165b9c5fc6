from __future__ import annotations

import importlib.util
import xml.etree.ElementTree as ElementTree

import pytest

from headrace.bench.plots import (
    need_matplotlib,
    plot_curves,
    plot_latencies,
    plot_throughput,
    to_svg,
)
from headrace.bench.serve_metrics import summarize
from headrace.config import ConfigError
from tests.bench.test_serve_metrics import TIMELINES


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    need_matplotlib()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'headrace\[bench\]'"):
        need_matplotlib()


def test_latencies_are_cumulative() -> None:
    made = plot_latencies(summarize(TIMELINES, 0, 5.0, {}))
    ttft, _, itl, _ = made.axes
    x, y = ttft.lines[0].get_data()
    assert x.tolist() == pytest.approx([100, 200, 250, 400])
    assert y.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert itl.get_title() == "Inter-token Latency"


def test_throughput_is_by_the_second() -> None:
    tokens, requests = plot_throughput(TIMELINES).axes
    assert tokens.lines[0].get_ydata().tolist() == [4, 2, 2, 0, 1]
    assert requests.lines[0].get_ydata().tolist() == [2, 2, 1, 1, 1]


def test_a_run_without_an_answer_can_be_plotted() -> None:
    plot_latencies(summarize([], 1, 1.0, {}))
    plot_throughput([])


def test_curves_are_drawn_as_svg() -> None:
    made = plot_curves({"base": [(1, 2.0), (8, 3.5)], "(peer, base)": [(1, 4.0)]}, "users", "ms")
    base, peer = made.axes[0].lines
    assert (base.get_xdata().tolist(), base.get_ydata().tolist()) == ([1, 8], [2.0, 3.5])
    assert (base.get_linestyle(), peer.get_linestyle()) == ("-", "--")
    assert ElementTree.fromstring(to_svg(made)).tag.endswith("svg")
