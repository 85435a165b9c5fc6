"""The bundled model's questions as a data set of lm-eval: a rendered prompt, and the one answer."""

from __future__ import annotations

import json
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

from headrace.files import BUNDLED_MODEL
from headrace.server.chat_template import ChatTemplate, load_template_source
from headrace.server.tokenizer import load_tokenizer

DATA = Path(str(resources.files("headrace") / "data"))
DAY = datetime(2026, 11, 21)  # of every prompt: runs of different days have the same questions
HEADERS = {
    "content": "final<|message|>",
    "call": "commentary to=functions.calculator <|constrain|>json<|message|>",
}


def load_questions(skill: str, **metadata: Any) -> dict[str, Any]:
    """Return the questions of one skill, split `test`: `prompt` and `answer`, both in harmony.

    The answer is all that must follow the model's last `<|channel|>`.
    """
    from datasets import Dataset

    tokenizer = load_tokenizer(BUNDLED_MODEL)
    source = load_template_source(BUNDLED_MODEL, is_harmony=True)
    assert source is not None
    template = ChatTemplate(source, tokenizer.quote, lambda: DAY)
    rows = []
    for line in (DATA / "eval" / f"{skill}.jsonl").read_text(encoding="utf-8").splitlines():
        question = json.loads(line)
        [(kind, text)] = question["expected"].items()
        rows.append(
            {"prompt": render(template, **question["request"]), "answer": HEADERS[kind] + text}
        )
    return {"test": Dataset.from_list(rows)}


def render(
    template: ChatTemplate,
    messages: list[dict[str, Any]],
    reasoning_effort: str,
    tools: list[dict[str, Any]] | None = None,
) -> str:
    """Write a question's conversation as the server would."""
    said = [{k: v for k, v in m.items() if v is not None} for m in messages]
    return template.render([{"content": ""} | m for m in said], tools, reasoning_effort)
