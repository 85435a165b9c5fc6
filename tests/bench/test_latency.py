from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from headrace.bench import latency as module
from headrace.bench.floors import GPUS, Step
from headrace.bench.latency import (
    Answer,
    Figure,
    Latency,
    LatencyRow,
    Question,
    Workload,
    WrongResult,
    check,
    check_adapter,
    engine_config,
    floor_ms,
    measure,
    parse_sizes,
    prefill_table,
    random_prompts,
    random_questions,
    run,
    run_latency,
    tpot_table,
)
from headrace.bench.results import write_csv
from headrace.bench.synth import SIZES, write_synthetic
from headrace.config import ConfigError, EngineConfig
from headrace.engine.engine import Engine
from headrace.files import BUNDLED_MODEL
from headrace.models.config import parse_config

WORKLOAD = Workload((1, 3), prompt=20, output=6)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    path = tmp_path_factory.mktemp("synth") / "tiny"
    write_synthetic(path, SIZES["tiny"], seed=0)
    config = EngineConfig(model=path, device="cpu", max_model_len=64)
    return Engine(engine_config(config, WORKLOAD, path))


def questions(engine: Engine, count: int, length: int = 20) -> list[Question]:
    return random_questions(engine.model.config, Workload((count,), length, 1))


def test_each_batch_size_gets_a_row(engine: Engine, tmp_path: Path) -> None:
    measured = list(measure(engine, WORKLOAD))
    assert [m.batch for m in measured] == [1, 3]
    assert all(0 < m.tpot.ms < 1e4 and 0 < m.prefill.ms < 1e4 for m in measured)
    write_csv(tmp_path / "new" / "latency.csv", [m.row(WORKLOAD) for m in measured])
    header, first, _ = (tmp_path / "new" / "latency.csv").read_text().splitlines()
    assert header == "adapters,rank,batch,prompt,tpot_ms,prefill_ms,floor_ms,peer_ms"
    assert first.startswith("0,0,1,20,")
    assert first.endswith(",,")  # no floor and no peer for a CPU


def test_all_requests_run_to_full_length_at_once(engine: Engine) -> None:
    prompts = questions(engine, 3)
    steps = engine.stats().num_steps
    _, answers = run(engine, prompts, 7, logprobs=True)
    assert engine.stats().num_steps - steps <= 7 + 1
    assert [len(a.token_ids) for a in answers] == [7] * 3
    assert [len(a.logprobs) for a in answers] == [7] * 3


def test_prompts_are_the_same_in_every_batch(engine: Engine) -> None:
    config = engine.model.config
    few, many = random_prompts(config, 2, 50), random_prompts(config, 5, 50)
    assert many[:2] == few
    assert len({tuple(p) for p in many}) == 5
    assert not {i for p in many for i in p} & set(config.eos_token_id)


def test_other_tokens_than_before_are_an_error(engine: Engine) -> None:
    prompts = questions(engine, 2)
    right = check(engine, prompts, 7, [])
    check(engine, prompts, 7, right[:1])
    wrong = [*right[0].token_ids[:4], right[0].token_ids[4] + 1, *right[0].token_ids[5:]]
    with pytest.raises(WrongResult, match="batch 2, request 0: token 4 is"):
        check(engine, prompts, 7, [Answer(wrong, [])])


def test_the_same_tokens_for_other_prompts_are_an_error(engine: Engine) -> None:
    prompt = questions(engine, 1)
    with pytest.raises(WrongResult, match="the same tokens for all"):
        check(engine, prompt * 2, 7, [])


def test_logprobs_that_are_not_finite_are_an_error(engine: Engine) -> None:
    norm = engine.model.weights.norm
    kept = norm.clone()
    norm.fill_(math.nan)
    with pytest.raises(WrongResult, match="batch 1, request 0: log-probabilities"):
        check(engine, questions(engine, 1), 3, [])
    norm.copy_(kept)


def test_a_prompt_that_does_not_fit(engine: Engine) -> None:
    with pytest.raises(ConfigError, match="64"):
        list(measure(engine, Workload((1,), prompt=70, output=6)))


@pytest.mark.parametrize("sizes", [((), 1, 1), ((0,), 1, 1), ((1,), 0, 1), ((1,), 1, 0)])
def test_sizes_below_one(sizes: tuple[tuple[int, ...], int, int]) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        Workload(*sizes)


def test_batches_on_the_command_line() -> None:
    assert parse_sizes("1,2, 16") == (1, 2, 16)
    with pytest.raises(ConfigError, match="--batch is 1;2"):
        parse_sizes("1;2")


def test_the_command_writes_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(__file__).parents[2] / "src/headrace/data/tiny"
    config = EngineConfig(model=model, device="cpu", max_model_len=64)
    assert run_latency(config, Workload((1, 2), 10, 4), tmp_path / "latency.csv") == 0
    assert "cpu: 10 tokens in, 4 out" in capsys.readouterr().out
    assert len((tmp_path / "latency.csv").read_text().splitlines()) == 3


def test_a_run_cut_short_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_short(engine: Engine, workload: Workload) -> Iterator[Latency]:
        yield next(measure(engine, workload))
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "measure", cut_short)
    config = EngineConfig(model=BUNDLED_MODEL, device="cpu", max_model_len=64)
    with pytest.raises(KeyboardInterrupt):
        run_latency(config, Workload((1, 2), 10, 4), tmp_path / "latency.csv")
    assert len((tmp_path / "latency.csv").read_text().splitlines()) == 2


def test_requests_have_adapters_in_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_synthetic(tmp_path / "tiny", SIZES["tiny"], seed=0)
    config = EngineConfig(model=tmp_path / "tiny", device="cpu", max_model_len=64)
    workload = Workload((1, 3), prompt=10, output=4, adapters=2, rank=4)
    asked = random_questions(parse_config(SIZES["tiny"]), workload)
    assert [question.adapter for question in asked] == ["0", "1", "0"]
    csv = tmp_path / "latency.csv"
    base = [LatencyRow(0, 0, 1, 10, 1.0, 2.0, None, None), LatencyRow(2, 4, 1, 10, 0, 0, 0, 0)]
    write_csv(csv, base)
    assert run_latency(config, workload, csv) == 0
    assert "2 adapters of rank 4" in capsys.readouterr().out
    lines = csv.read_text().splitlines()
    assert lines[1] == "0,0,1,10,1.0,2.0,,"
    assert [line[:9] for line in lines[2:]] == ["2,4,1,10,", "2,4,3,10,"]
    assert not lines[2].startswith("2,4,1,10,0,0")


def test_adapters_that_the_engine_does_not_know(engine: Engine) -> None:
    with pytest.raises(ConfigError, match="not loaded"):
        check_adapter(engine, Question([1, 2, 3], "0"))
    check_adapter(engine, Question([1, 2, 3], None))


@pytest.mark.parametrize(("adapters", "rank"), [(0, 8), (2, 0)])
def test_adapters_need_a_rank(adapters: int, rank: int) -> None:
    with pytest.raises(ConfigError, match="give both"):
        Workload((1,), 1, 1, adapters, rank)


def test_the_table_has_floors_shares_and_ratios() -> None:
    config = parse_config(SIZES["20b"])
    workload = Workload((1,), 512, 128)
    floor = floor_ms(config, Step(1, 1, 576), workload, GPUS[0])
    assert floor == pytest.approx(1.25, rel=0.01)
    adapted = floor_ms(config, Step(1, 1, 576), Workload((1,), 512, 128, 2, 64), GPUS[0])
    assert adapted == pytest.approx(1.33, rel=0.01)
    assert floor_ms(config, Step(1, 1, 576), workload, None) is None
    tpot, prefill = Figure(2.0, 1.25, 3.2), Figure(10.0, None, None)
    latency = Latency(1, tpot, prefill)
    assert tpot.cells() == ["2.00", "1.25", "62%", "3.20", "0.62"]
    assert latency.row(workload) == LatencyRow(0, 0, 1, 512, 2.0, 10.0, 1.25, 3.2)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(tpot_table([latency], ""), prefill_table([latency], 512, ""))
    lines = [line.replace("│", " ").split() for line in console.export_text().splitlines()]
    assert ["1", "2.00", "1.25", "62%", "3.20", "0.62", "500"] in lines
    assert ["1", "10.00", "51,200"] in lines


@pytest.mark.gpu
@pytest.mark.parametrize(("adapters", "rank"), [(0, 0), (2, 8)])
def test_on_the_gpu_a_request_gets_the_same_tokens_at_every_batch_size(
    tmp_path: Path, adapters: int, rank: int
) -> None:
    write_synthetic(tmp_path / "tiny", SIZES["tiny"], seed=0)
    config = EngineConfig(model=tmp_path / "tiny", device="cuda", kv_cache_memory=100_000_000)
    workload = Workload((1, 2, 5, 16), prompt=100, output=40, adapters=adapters, rank=rank)
    assert run_latency(config, workload, tmp_path / "latency.csv") == 0
    assert len((tmp_path / "latency.csv").read_text().splitlines()) == 5
