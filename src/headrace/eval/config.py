"""What `headrace eval` is told; flags as lm-eval names them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.config import ConfigError, check_flags, flag


@dataclass(frozen=True)
class EvalConfig:
    """Which models answer which questions, and how."""

    tasks: tuple[str, ...] = flag(
        ("headrace_bundled",), "names of lm-eval's tasks, groups or tags, such as gsm8k"
    )
    base_url: str = flag("", "a running server (default: one is started on MODEL)")
    model: str = flag("", "name of the base on that server (default: the first it lists)")
    lora_modules: tuple[str, ...] = flag(
        (), "adapters: names on the running server; NAME=PATH for the one that is started"
    )
    limit: int | None = flag(None, "only the first questions of each task", low=1)
    num_fewshot: int | None = flag(None, "examples before a question (default: the task's)", low=0)
    apply_chat_template: bool = flag(False, "ask over /v1/chat/completions, not /v1/completions")
    gen_kwargs: str = flag("", "fields of every request, as in max_gen_toks=512,temperature=0")
    include_path: Path | None = flag(None, "directory of more task files")
    tokenizer: Path | None = flag(
        None, "directory of the tokenizer, for tasks that score given answers (default: as served)"
    )
    num_concurrent: int = flag(16, "requests in flight", low=1)
    seed: int = flag(1234, "seed of the examples' choice and of sampling")
    output_path: Path | None = flag(None, "JSON file to write")
    compare: Path | None = flag(None, "such a file, shown beside if its settings are the same")

    def __post_init__(self) -> None:
        check_flags(self)
        if not self.tasks:
            raise ConfigError("--tasks needs a name")

    @property
    def settings(self) -> dict[str, Any]:
        """What two runs must share to be compared, as far as it is known before a run."""
        from importlib.metadata import version

        return {
            "lm_eval": version("lm_eval"),
            "tasks": sorted(self.tasks),
            "limit": self.limit,
            "num_fewshot": self.num_fewshot,
            "apply_chat_template": self.apply_chat_template,
            "gen_kwargs": self.gen_kwargs,
            "seed": self.seed,
        }
