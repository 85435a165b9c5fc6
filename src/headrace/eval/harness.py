"""lm-eval as a library: one model of one server answers the tasks."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import aiohttp

from headrace.config import ConfigError
from headrace.eval.config import EvalConfig

OUR_TASKS = Path(str(resources.files("headrace") / "data" / "eval" / "tasks"))


@dataclass(frozen=True)
class Score:
    """A metric's mean over n questions, and its standard error (None: lm-eval gives none)."""

    value: float
    stderr: float | None
    n: int


@dataclass(frozen=True)
class Answers:
    """What one model's run gave."""

    scores: dict[str, Score]  # "task metric,filter" -> score
    questions: dict[str, str]  # task -> hash of its prompts and answers, in order
    generation: dict[str, Any]  # task -> the fields of its requests


def need_lm_eval() -> None:
    """Raise ConfigError where the harness is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("headrace eval needs lm-eval: pip install 'headrace[eval]'")


def load_tasks(config: EvalConfig) -> Any:
    """Return lm-eval's task manager, after it has loaded the tasks with their data.

    Its own tasks are indexed (20 s) only if a name isn't among ours and those of --include-path.
    Raises ConfigError for unknown tasks and for data that can't be had.
    """
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval.api.task").setLevel(logging.ERROR)
    folders = [str(path) for path in (OUR_TASKS, config.include_path) if path]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not set(config.tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=folders)
    unknown = sorted(set(config.tasks) - set(manager.all_tasks))
    if unknown:
        raise ConfigError(f"--tasks {' '.join(unknown)}: lm-eval has no such task")
    try:
        manager.load(list(config.tasks))
    except Exception as error:  # a task may be code, and may download: anything can go wrong
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"--tasks {' '.join(config.tasks)} can't be loaded: {reason}") from error
    return manager


def ask(config: EvalConfig, manager: Any, url: str, model: str, tokenizer: Path | None) -> Answers:
    """Let a model answer all tasks of load_tasks.

    Raises ConfigError when the server refuses a request, or fails it three times, and for tasks
    that can't be asked in this way.
    """
    import lm_eval

    kind = "local-chat-completions" if config.apply_chat_template else "local-completions"
    path = "/v1/chat/completions" if config.apply_chat_template else "/v1/completions"
    arguments: dict[str, Any] = {
        "model": model,
        "base_url": url + path,
        "num_concurrent": config.num_concurrent,
        "tokenized_requests": False,
        "tokenizer_backend": "huggingface" if tokenizer else None,
        "seed": config.seed,
    }
    if tokenizer:
        arguments["tokenizer"] = str(tokenizer)
    try:
        results = lm_eval.simple_evaluate(
            model=kind,
            model_args=arguments,
            tasks=list(config.tasks),
            task_manager=manager,
            limit=config.limit,
            num_fewshot=config.num_fewshot,
            gen_kwargs=config.gen_kwargs or None,
            apply_chat_template=config.apply_chat_template,
            fewshot_random_seed=config.seed,
        )
    except (aiohttp.ClientError, OSError) as error:
        raise ConfigError(f"{model} at {url} can't be asked: {error}") from None
    except NotImplementedError as error:  # scores of given answers, over the chat's endpoint
        raise ConfigError(f"lm-eval: {error}") from None
    except AssertionError as error:
        if tokenizer:
            raise
        raise ConfigError(f"lm-eval: {error} Give --tokenizer DIR.") from None
    return read_answers(results)


def read_answers(results: dict[str, Any]) -> Answers:
    """Pick what matters out of lm-eval's results."""
    scores = {}
    for task, values in results["results"].items():
        for name, value in values.items():
            metric, _, filter_name = name.partition(",")
            if not filter_name or metric.endswith("_stderr"):
                continue
            stderr = values.get(f"{metric}_stderr,{filter_name}")
            n = results["n-samples"].get(task, {}).get("effective", values.get("sample_len", 0))
            known = isinstance(stderr, int | float)
            scores[f"{task} {name}"] = Score(float(value), float(stderr) if known else None, n)
    samples, configs = results["samples"], results["configs"]
    return Answers(
        scores,
        {task: hash_of(lines) for task, lines in samples.items()},
        {task: configs[task].get("generation_kwargs") for task in samples},
    )


def hash_of(samples: list[dict[str, Any]]) -> str:
    """Return one short hash of all prompts and answers."""
    whole = hashlib.sha256()
    for sample in sorted(samples, key=lambda s: s["doc_id"]):
        whole.update(f"{sample['prompt_hash']} {sample['target_hash']}\n".encode())
    return whole.hexdigest()[:16]
