"""Figures of timelines that are short enough to be worked out by hand."""

from __future__ import annotations

import math

import pytest

from headrace.bench.serve_metrics import Summary, Timeline, per_second, summarize, table

# start, chunks, tokens in, tokens out; TTFT / ITL / E2EL / TPOT in ms stand beside
TIMELINES = [
    Timeline(10.0, [10.2, 10.3, 10.5], 10, 3),  # 200 / 100, 200 / 500 / 300 : 2 = 150
    Timeline(10.5, [10.6, 11.6], 20, 5),  # 100 / 1000 / 1100 / 1000 : 4 = 250
    Timeline(11.0, [11.4], 5, 1),  # 400 / none / 400 / none
    Timeline(12.25, [12.5, 12.75, 14.25], 7, 3),  # 250 / 250, 1500 / 2000 / 1750 : 2 = 875
]
GOALS = {"ttft": 250.5, "e2el": 1200.0}  # kept to by the first two

TABLE = """\
============ Serving Benchmark Result ============
Successful requests:                     4         
Failed requests:                         1         
Maximum request concurrency:             3         
Request rate configured (RPS):           2.50      
Benchmark duration (s):                  5.00      
Total input tokens:                      42        
Total generated tokens:                  12        
Request throughput (req/s):              0.80      
Request goodput (req/s):                 0.40      
Output token throughput (tok/s):         2.40      
Peak output token throughput (tok/s):    4.00      
Peak concurrent requests:                2.00      
Total token throughput (tok/s):          10.80     
---------------Time to First Token----------------
Mean TTFT (ms):                          237.50    
Median TTFT (ms):                        225.00    
P99 TTFT (ms):                           395.50    
-----Time per Output Token (excl. 1st token)------
Mean TPOT (ms):                          425.00    
Median TPOT (ms):                        250.00    
P99 TPOT (ms):                           862.50    
---------------Inter-token Latency----------------
Mean ITL (ms):                           610.00    
Median ITL (ms):                         250.00    
P99 ITL (ms):                            1480.00   
----------------End-to-end Latency----------------
Mean E2EL (ms):                          1000.00   
Median E2EL (ms):                        800.00    
P99 E2EL (ms):                           1973.00   
=================================================="""


def four_requests() -> Summary:
    return summarize(TIMELINES, failed=1, duration=5.0, goals=GOALS)


def test_the_table_is_the_fields_line_for_line() -> None:
    metrics = ("ttft", "tpot", "itl", "e2el")
    assert table(four_requests(), metrics, (99.0,), 3, 2.5) == TABLE


def test_lines_that_were_not_asked_for_are_left_out() -> None:
    summary = summarize(TIMELINES, failed=0, duration=5.0, goals={})
    text = table(summary, ("tpot",), (50.0, 99.9), None, math.inf)
    assert "P99.9 TPOT (ms):                         873.75" in text  # 250 + 0.998 * 625
    for absent in ("concurrency", "configured", "goodput", "TTFT", "ITL", "E2EL"):
        assert absent not in text


def test_json_has_the_fields_names() -> None:
    result = four_requests().to_json(["ttft", "itl"], [25, 99.9])
    assert (result["completed"], result["failed"]) == (4, 1)
    assert result["total_output_tokens"] == 12
    assert result["request_goodput"] == pytest.approx(0.4)
    assert result["max_concurrent_requests"] == 2
    # deviations from 237.5: -37.5, -137.5, 162.5, 12.5; their squares' mean is 11718.75
    assert result["std_ttft_ms"] == pytest.approx(math.sqrt(11718.75))
    assert result["p25_ttft_ms"] == pytest.approx(175.0)  # 3/4 of the way from 100 to 200
    assert result["p99.9_itl_ms"] == pytest.approx(1498.0)  # 1000 + 0.996 * 500
    assert "mean_tpot_ms" not in result


def test_a_goal_is_kept_by_a_lone_token_and_missed_by_one_metric() -> None:
    assert [t.keeps_to({"tpot": 250.5}) for t in TIMELINES] == [True, True, True, False]
    assert [t.keeps_to(GOALS) for t in TIMELINES] == [True, True, False, False]


def test_seconds_count_chunks_and_requests() -> None:
    chunks, requests = per_second(TIMELINES)
    assert chunks.tolist() == [4, 2, 2, 0, 1]
    assert requests.tolist() == [2, 2, 1, 1, 1]


def test_nothing_succeeded() -> None:
    summary = summarize([], failed=3, duration=1.0, goals=GOALS)
    assert summary.request_throughput == summary.mean("ttft") == summary.request_goodput == 0
    assert "Failed requests:                         3" in table(summary, ("ttft",), (99,), 1, 1.0)
