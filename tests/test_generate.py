"""`headrace generate` answers on the bundled model, without a server."""

import io

import pytest
from rich.console import Console

from headrace.config import ConfigError, EngineConfig
from headrace.files import BUNDLED_MODEL
from headrace.generate import ask


def answer(question: str, max_tokens: int = 512) -> str:
    """What a user sees."""
    out = io.StringIO()
    ask(Console(file=out, width=200), EngineConfig(model=BUNDLED_MODEL), question, max_tokens, 0.0)
    return out.getvalue()


def test_reasoning_then_answer_then_speed() -> None:
    shown = answer("What is 457 + 2086?")
    *reasoning, _, final, speed = shown.splitlines()
    assert "carry" in reasoning[1]
    assert final == "457 + 2086 = 2543"
    assert speed.endswith("tokens/s")


def test_max_tokens_cuts() -> None:
    assert "\n5 tokens" in answer("What is 457 + 2086?", max_tokens=5)


def test_a_prompt_that_does_not_fit_is_named() -> None:
    with pytest.raises(ConfigError, match="the prompt has"):
        answer("word " * 200_000)
