"""headrace bench serve from flags to table, against a scripted server."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from typer.testing import CliRunner, Result

from headrace.bench.commands import app
from headrace.bench.serve import arrivals
from headrace.files import BUNDLED_MODEL
from tests.bench.fake_server import FakeServer, Script, completion

MODELS = ({"id": "m"}, {"id": "cats"}, {"id": "dogs"})


def bench(server: FakeServer | str, *flags: object) -> Result:
    url = server if isinstance(server, str) else server.url
    flags = ("--base-url", url, "--tokenizer", BUNDLED_MODEL, "--random-input-len", 9, *flags)
    return CliRunner().invoke(app, ["serve", *map(str, flags)])


def answer_all(i: int, body: dict[str, Any]) -> list[bytes]:
    return completion(body["max_tokens"])


def test_a_run_is_counted_and_saved(tmp_path: Path) -> None:
    flags = ("--num-prompts", 12, "--random-output-len", 4, "--num-warmups", 3)
    flags += ("--save-detailed", "--result-dir", tmp_path, "--result-filename", "r.json")
    with FakeServer(answer_all, MODELS) as server:
        result = bench(server, *flags, "--temperature", 0, "--extra-body", '{"seed": 5}')
    assert result.exit_code == 0, result.output
    assert "Successful requests:                     12" in result.output
    assert "Total input tokens:                      108" in result.output
    assert "Total generated tokens:                  48" in result.output
    assert "goodput" not in result.output
    assert len(server.bodies) == 15
    prompts = [tuple(body["prompt"]) for body in server.bodies]
    assert set(prompts[:3]) == {prompts[0]}  # warm-ups
    assert prompts.count(prompts[0]) == 4  # and the first request, which comes in any order
    assert len(set(prompts)) > 10
    for body in server.bodies:
        assert (body["model"], body["temperature"], body["seed"]) == ("m", 0.0, 5)
        assert body["ignore_eos"] is True
    saved = json.loads((tmp_path / "r.json").read_text())
    assert (saved["completed"], saved["total_output_tokens"]) == (12, 48)
    assert (saved["request_rate"], saved["num_prompts"]) == ("inf", 12)
    assert saved["model"] == "m"
    assert saved["output_lens"] == [4] * 12
    assert [len(itls) for itls in saved["itls"]] == [3] * 12
    assert saved["generated_texts"][0] == " t0 t1 t2 t3"
    assert saved["p99_ttft_ms"] >= saved["median_ttft_ms"] > 0


def test_no_more_than_the_wanted_requests_are_in_flight() -> None:
    async def slowly(i: int) -> AsyncIterator[bytes]:
        for piece in completion(3):
            await asyncio.sleep(0.01)
            yield piece

    with FakeServer(lambda i, body: slowly(i)) as server:
        result = bench(server, "--num-prompts", 10, "--max-concurrency", 3)
    assert result.exit_code == 0, result.output
    assert server.most_open == 3
    assert "Maximum request concurrency:             3" in result.output


def test_failures_are_counted_with_their_reasons() -> None:
    def script(i: int, body: dict[str, Any]) -> Any:
        if i % 2:
            error = {"error": {"message": f"out of pages {i % 4}", "code": 503}}
            return web.json_response(error, status=503)
        return completion(2)

    with FakeServer(script) as server:
        result = bench(server, "--num-prompts", 10)
    assert result.exit_code == 1
    assert "Successful requests:                     5" in result.output
    assert "Failed requests:                         5" in result.output
    assert "Failed 3x: HTTP 503: out of pages 1" in result.output
    assert "Failed 2x: HTTP 503: out of pages 3" in result.output


def test_only_the_first_ten_reasons_are_shown() -> None:
    with FakeServer(lambda i, body: web.Response(status=500, text=f"bug {i}")) as server:
        result = bench(server, "--num-prompts", 13)
    assert result.exit_code == 1
    assert result.output.count("Failed 1x: HTTP 500: bug") == 10
    assert "3 other reasons" in result.output


def test_tokens_are_counted_from_the_text_where_the_server_does_not() -> None:
    with FakeServer(lambda i, body: completion(3, usage=False)) as server:
        result = bench(server, "--num-prompts", 1)
    # " t0 t1 t2" in the bundled vocabulary: " t", "0" and so on
    assert "Total generated tokens:                  6" in result.output


@pytest.mark.parametrize("assignment", ["random", "round-robin"])
def test_adapters_share_the_requests(assignment: str) -> None:
    with FakeServer(answer_all, MODELS) as server:
        flags = ("--lora-modules", "cats", "dogs", "--lora-assignment", assignment)
        result = bench(server, *flags, "--num-prompts", 40, "--num-warmups", 1)
    assert result.exit_code == 0, result.output
    assert server.bodies[0]["model"] == "m"  # the warm-up
    asked = Counter(body["model"] for body in server.bodies[1:])
    assert set(asked) == {"cats", "dogs"}
    assert (asked["cats"] == 20) == (assignment == "round-robin")


@pytest.mark.parametrize(("limit", "share"), [("1e9", 1), ("0", 0)])
def test_goodput_counts_what_kept_to_all_goals(limit: str, share: int) -> None:
    with FakeServer(answer_all) as server:
        result = bench(server, "--num-prompts", 6, "--goodput", f"ttft:{limit}", "e2el:1e9")
    lines = dict(line.rsplit(maxsplit=1) for line in result.output.splitlines() if ":" in line)
    throughput = float(lines["Request throughput (req/s):"])
    assert float(lines["Request goodput (req/s):"]) == share * throughput


def test_plots_are_written(tmp_path: Path) -> None:
    with FakeServer(answer_all) as server:
        result = bench(server, "--num-prompts", 3, "--plot", "--result-dir", tmp_path)
    assert result.exit_code == 0, result.output
    names = sorted(path.name.rsplit("-", 1)[1] for path in tmp_path.iterdir())
    assert names == ["latencies.png", "throughput.png"]
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--model", "nobody"), "--model nobody: the server has only m, cats, dogs"),
        (("--lora-modules", "cats", "cows"), "--lora-modules cows"),
        (("--goodput", "ttft"), "--goodput ttft"),
        (("--goodput", "itl:3"), "--goodput is 'itl'"),
        (("--percentile-metrics", "ttft,speed"), "'speed'"),
        (("--metric-percentiles", "50,101"), "'101'"),
        (("--extra-body", "[1]"), "--extra-body"),
        (("--request-rate", 0), "--request-rate is 0"),
        (("--dataset-name", "sharegpt"), "needs --dataset-path"),
        (("--backend", "grpc"), "--backend"),
        (("--num-prompts", 0), "--num-prompts is 0"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_sent(
    flags: tuple[object, ...], reason: str
) -> None:
    with FakeServer(answer_all, MODELS) as server:
        result = bench(server, *flags)
    assert result.exit_code == 1  # an exception: the command line turns it into status 2
    assert reason in str(result.exception)
    assert server.bodies == []


def test_a_server_that_is_not_there() -> None:
    result = bench("http://127.0.0.1:9")
    assert "can't reach a server at http://127.0.0.1:9" in str(result.exception)


@pytest.mark.parametrize(("status", "reason"), [(401, "OPENAI_API_KEY"), (503, "503")])
def test_a_server_that_does_not_list_its_models(status: int, reason: str) -> None:
    with FakeServer(answer_all, status=status) as server:
        assert reason in str(bench(server).exception)


def test_the_tokenizer_is_found_where_the_model_lies() -> None:
    models = ({"id": "tiny", "root": str(BUNDLED_MODEL)},)
    with FakeServer(answer_all, models) as server:
        result = CliRunner().invoke(app, ["serve", "--base-url", server.url, "--num-prompts", "1"])
        assert result.exit_code == 0, result.output
    with FakeServer(answer_all) as server:
        result = CliRunner().invoke(app, ["serve", "--base-url", server.url])
        assert "--tokenizer" in str(result.exception)


def test_arrivals() -> None:
    assert arrivals(5, np.inf, 1.0, 0) is None
    poisson = arrivals(20_000, 4.0, 1.0, 0)
    assert poisson[-1] == pytest.approx(5000)
    gaps = np.diff(poisson)
    assert (gaps >= 0).all()
    assert gaps.std() == pytest.approx(0.25, rel=0.03)  # of an exponential: its mean
    even = np.diff(arrivals(20_000, 4.0, 100.0, 0))
    assert even.std() == pytest.approx(0.025, rel=0.03)  # mean / sqrt(shape)
    assert (arrivals(9, 4.0, 1.0, 3) == arrivals(9, 4.0, 1.0, 3)).all()


def test_requests_keep_to_their_arrival_times() -> None:
    script: Script = answer_all
    with FakeServer(script) as server:
        flags = ("--num-prompts", 8, "--request-rate", 40, "--random-output-len", 1)
        result = bench(server, *flags)
    lines = dict(line.rsplit(maxsplit=1) for line in result.output.splitlines() if ":" in line)
    assert lines["Request rate configured (RPS):"] == "40.00"
    assert float(lines["Benchmark duration (s):"]) >= 0.2  # 8 / 40
