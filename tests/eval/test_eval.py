"""headrace eval with lm-eval itself: against a scripted server, and the bundled model for real."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from aiohttp import web
from typer.testing import CliRunner, Result

from headrace.eval.bundled import load_questions
from headrace.eval.command import evaluate
from headrace.files import BUNDLED_MODEL
from headrace.flags import ListOptions
from tests.bench.fake_server import FakeServer

app = typer.Typer()
app.command(cls=ListOptions)(evaluate)
MODELS = ({"id": "base"}, {"id": "pupil"})
SKILLS = {skill: load_questions(skill)["test"] for skill in ("add", "reverse", "calculator")}
ANSWERS = {row["prompt"]: row["answer"] for rows in SKILLS.values() for row in rows}


def run(*flags: object) -> Result:
    return CliRunner().invoke(app, list(map(str, flags)))


def answer(number: int, body: dict[str, Any]) -> web.Response:
    """The pupil knows all; the base all but the reversed words, and says the same to those."""
    right = ANSWERS[body["prompt"]]
    is_reversal = body["prompt"] in set(SKILLS["reverse"]["prompt"])
    said = right if body["model"] == "pupil" or not is_reversal else "final<|message|>Sorry"
    text = f"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>{said}"
    return web.json_response({"choices": [{"index": 0, "text": text}]})


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeServer]:
    with FakeServer(answer, MODELS) as server:
        yield server


@pytest.fixture(scope="module")
def earlier(fake: FakeServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run over two skills, base and adapter."""
    path = tmp_path_factory.mktemp("eval") / "earlier.json"
    flags = ("--base-url", fake.url, "--lora-modules", "pupil", "--limit", 5)
    result = run(*flags, "--tasks", "headrace_add", "headrace_reverse", "--output-path", path)
    assert result.exit_code == 0, result.exception
    return path


def test_questions_are_the_same_every_day() -> None:
    """Or a run could not be compared with yesterday's."""
    for rows in SKILLS.values():
        assert all("\nCurrent date: 2026-11-21\n" in prompt for prompt in rows["prompt"])


def test_base_and_adapter_stand_side_by_side(earlier: Path) -> None:
    saved = json.loads(earlier.read_text())
    values = {
        (model, name.split()[0]): (score["value"], score["n"])
        for model, scores in saved["scores"].items()
        for name, score in scores.items()
    }
    assert values == {
        ("base", "headrace_add"): (1.0, 5),
        ("base", "headrace_reverse"): (0.0, 5),
        ("pupil", "headrace_add"): (1.0, 5),
        ("pupil", "headrace_reverse"): (1.0, 5),
    }
    assert saved["settings"]["limit"] == 5
    assert saved["settings"]["generation"]["headrace_add"]["temperature"] == 0


def test_requests_are_what_the_task_says(fake: FakeServer, earlier: Path) -> None:
    body = fake.bodies[0]
    assert body["path"] == "/v1/completions"
    assert (body["temperature"], body["max_tokens"], body["seed"]) == (0, 400, 1234)
    assert body["skip_special_tokens"] is False
    assert {b["model"] for b in fake.bodies} == {"base", "pupil"}


def test_a_run_with_the_same_settings_is_shown_beside(fake: FakeServer, earlier: Path) -> None:
    flags = ("--base-url", fake.url, "--limit", 5, "--compare", earlier)
    result = run(*flags, "--tasks", "headrace_reverse", "headrace_add")
    assert result.exit_code == 0, result.exception
    [line] = [x for x in result.output.splitlines() if "headrace_reverse" in x]
    assert line.count("0.000 ± 0.000 (5)") == 2  # the base, now and then
    assert line.count("1.000 ± 0.000 (5)") == 1  # the pupil, then


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (("--limit", 4), "limit = 5, this run has 4"),
        (("--limit", 5, "--seed", 1), "seed"),
        (("--limit", 5, "--gen-kwargs", "temperature=1"), "gen_kwargs"),
    ],
)
def test_other_settings_are_refused_before_anything_is_asked(
    fake: FakeServer, earlier: Path, flags: tuple[object, ...], field: str
) -> None:
    asked = len(fake.bodies)
    tasks = ("--tasks", "headrace_add", "headrace_reverse")
    result = run("--base-url", fake.url, *flags, *tasks, "--compare", earlier)
    assert field in str(result.exception)
    assert len(fake.bodies) == asked


def test_other_questions_are_refused(fake: FakeServer, earlier: Path, tmp_path: Path) -> None:
    saved = json.loads(earlier.read_text())
    saved["settings"]["questions"]["headrace_add"] = "0" * 16
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(saved))
    tasks = ("--tasks", "headrace_add", "headrace_reverse")
    result = run("--base-url", fake.url, "--limit", 5, *tasks, "--compare", changed)
    assert "questions" in str(result.exception)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--tasks", "headrace_add", "--model", "nobody"), "--model nobody"),
        (("--lora-modules", "nobody"), "--lora-modules nobody"),
        (("--compare", "/none.json"), "/none.json"),
        (("--compare", BUNDLED_MODEL / "config.json"), "not a result of headrace eval"),
        (("--limit", 0), "--limit is 0"),
    ],
)
def test_wrong_flags_are_refused(fake: FakeServer, flags: tuple[object, ...], reason: str) -> None:
    assert reason in str(run("--base-url", fake.url, *flags).exception)


def test_a_server_that_fails_every_time() -> None:
    with FakeServer(lambda i, body: web.json_response({"error": "no"}, status=400)) as server:
        flags = ("--base-url", server.url, "--tasks", "headrace_add", "--limit", 1)
        assert "can't be asked" in str(run(*flags).exception)


def test_the_call_of_a_function_is_an_answer(fake: FakeServer) -> None:
    answers = SKILLS["calculator"]["answer"]
    assert any(a.startswith("commentary to=functions.calculator") for a in answers)
    assert any(a.startswith("final<|message|>") for a in answers)


def test_the_bundled_model_calls_and_its_adapter_subtracts(tmp_path: Path) -> None:
    """For real: a server is started with the adapter, asked, and stopped.

    The scored task needs the tokenizer, which the server's list of models leads to.
    """
    scored = write_scored_task(tmp_path)
    module = f"pupil={BUNDLED_MODEL.parent / 'adapters' / 'subtract'}"
    flags = ("--limit", 2, "--lora-modules", module, "--output-path", tmp_path / "r.json")
    tasks = ("--tasks", "headrace_calculator", "headrace_subtract", scored)
    result = run(*flags, *tasks, "--include-path", tmp_path)
    assert result.exit_code == 0, result.exception
    scores = json.loads((tmp_path / "r.json").read_text())["scores"]
    values = {model: [s["value"] for s in rows.values()] for model, rows in scores.items()}
    assert values["tiny"] == [1.0, 0.0, 1.0]
    assert values["pupil"][1] == 1.0


def write_scored_task(path: Path) -> str:
    """A multiple-choice task: the likelier of a sum and a wrong one. Returns its name."""
    row = SKILLS["add"][0]
    wrong = row["answer"].replace(row["answer"][-1], "x")
    question = {"text": row["prompt"], "choices": [wrong, row["answer"]], "right": 1}
    (path / "sums.jsonl").write_text(json.dumps(question) + "\n")
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path / "sums.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{right}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (path / "sums.yaml").write_text(json.dumps(task))
    return "sums"


@pytest.mark.parametrize(
    ("flags", "reason"), [((), "Give --tokenizer DIR"), (("--apply-chat-template",), "chat")]
)
def test_scored_tasks_that_cannot_be_asked(
    fake: FakeServer, tmp_path: Path, flags: tuple[str, ...], reason: str
) -> None:
    task = write_scored_task(tmp_path)
    result = run("--base-url", fake.url, "--tasks", task, "--include-path", tmp_path, *flags)
    assert reason in str(result.exception)
