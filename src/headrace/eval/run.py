"""An evaluation from start to end: the server, the questions, the scores side by side."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from rich.console import Console

import headrace
from headrace.bench.model_list import choose_model, find_tokenizer, wait_for_models
from headrace.bench.server_process import lora_flags, running_server
from headrace.config import ConfigError
from headrace.eval.config import EvalConfig
from headrace.eval.harness import ask, load_tasks, need_lm_eval
from headrace.eval.results import (
    Evaluation,
    check_comparable,
    read_evaluation,
    score_table,
    write_evaluation,
)
from headrace.files import parse_module

START_TIMEOUT = 600  # seconds for a server of our own
WIDE = 1000  # columns: a file has no edge to wrap at


def run_eval(config: EvalConfig, checkpoint: Path) -> None:
    """Ask every model, print the scores, write them, show them beside those of --compare.

    Raises ConfigError for tasks, models or files that aren't there, a server that fails, and an
    older run with other settings: before anything is asked, if they are known by then.
    """
    need_lm_eval()
    before = read_evaluation(config.compare) if config.compare else None
    if before and config.compare:
        check_comparable(config.settings, before.settings, config.compare)
    manager = load_tasks(config)
    with server(checkpoint, config) as (url, models, tokenizer):
        answers = {model: ask(config, manager, url, model, tokenizer) for model in models}
    first = answers[models[0]]
    evaluation = Evaluation(
        settings=config.settings | {"questions": first.questions, "generation": first.generation},
        scores={model: answer.scores for model, answer in answers.items()},
        about={
            "date": f"{datetime.now():%Y-%m-%d %H:%M}",
            "headrace": headrace.__version__,
            "checkpoint": config.base_url or str(checkpoint),
        },
    )
    if config.output_path:
        write_evaluation(config.output_path, evaluation)
    columns = dict(evaluation.scores)
    if before and config.compare:
        check_comparable(evaluation.settings, before.settings, config.compare)
        columns |= {f"{name} ({config.compare.stem})": s for name, s in before.scores.items()}
    Console(width=None if sys.stdout.isatty() else WIDE).print(score_table(columns))


@contextlib.contextmanager
def server(checkpoint: Path, config: EvalConfig) -> Iterator[tuple[str, list[str], Path | None]]:
    """Yield the URL of the server to ask, its models (the base first) and their tokenizer."""
    with contextlib.ExitStack() as stack:
        url, adapters = config.base_url.rstrip("/"), config.lora_modules
        if not url:
            flags = lora_flags(config.lora_modules)
            url = stack.enter_context(running_server(checkpoint, flags, START_TIMEOUT))
            adapters = tuple(parse_module(module)[0] for module in config.lora_modules)
        models = asyncio.run(wait_for_models(url))
        base, tokenizer = choose_model(models, config.model, adapters), config.tokenizer
        if tokenizer is None:  # few tasks need it
            with contextlib.suppress(ConfigError):
                tokenizer = find_tokenizer(models, base)
        yield url, [base, *adapters], tokenizer
