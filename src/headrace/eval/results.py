"""Scores of several models with the settings that they were made with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from headrace.config import ConfigError
from headrace.eval.harness import Score
from headrace.files import read_json


@dataclass(frozen=True)
class Evaluation:
    """One run of `headrace eval`."""

    settings: Mapping[str, Any]  # what another run must share to be compared with this one
    scores: Mapping[str, Mapping[str, Score]]  # model -> "task metric,filter" -> score
    about: Mapping[str, Any]  # when, by which version, on which server


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write it as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(evaluation), indent=1) + "\n", encoding="utf-8")


def read_evaluation(path: Path) -> Evaluation:
    """Read what write_evaluation wrote; raises ConfigError for anything else."""
    saved = read_json(path)
    try:
        scores = {
            model: {name: Score(**score) for name, score in rows.items()}
            for model, rows in saved["scores"].items()
        }
        return Evaluation(saved["settings"], scores, saved["about"])
    except (KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path} is not a result of headrace eval") from None


def check_comparable(ours: Mapping[str, Any], theirs: Mapping[str, Any], path: Path) -> None:
    """Raise ConfigError naming the first setting that differs; only ours are looked at."""
    for name, value in json.loads(json.dumps(dict(ours))).items():
        if name not in theirs or theirs[name] != value:
            raise ConfigError(
                f"{path} can't be compared: it was made with {name} = "
                f"{json.dumps(theirs.get(name))}, this run has {json.dumps(value)}"
            )


def score_table(columns: Mapping[str, Mapping[str, Score]]) -> Table:
    """Models side by side, a line for each metric: value, standard error, questions."""
    table = Table()
    table.add_column("task metric,filter")
    for name in columns:
        table.add_column(name, justify="right")
    for row in dict.fromkeys(name for scores in columns.values() for name in scores):
        table.add_row(row, *(show(scores.get(row)) for scores in columns.values()))
    return table


def show(score: Score | None) -> str:
    """Write a score as 0.985 ± 0.009 (200)."""
    if score is None:
        return ""
    error = "" if score.stderr is None else f" ± {score.stderr:.3f}"
    return f"{score.value:.3f}{error} ({score.n})"
