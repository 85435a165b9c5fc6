"""Messages to prompt text, by the checkpoint's own Jinja template."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from headrace.config import ConfigError
from headrace.files import read_json
from headrace.server.errors import bad_request


class ChatTemplate:
    """Renders a conversation with Hugging Face's conventions for templates.

    now: what a template that names the day takes it from.
    """

    def __init__(
        self,
        source: str,
        quote: Callable[[str], str],
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = to_json
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template is not valid Jinja: {error}") from None
        self._quote = quote

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        reasoning_effort: str | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Return the prompt's text; special tokens in the callers' text are quoted.

        Raises ApiError 400 when the template refuses the conversation.
        """
        given: dict[str, Any] = {"reasoning_effort": reasoning_effort} if reasoning_effort else {}
        try:
            return self._template.render(
                messages=self._quoted(messages),
                tools=self._quoted(tools) if tools else None,
                add_generation_prompt=add_generation_prompt,
                **given,
            )
        except RecursionError:
            raise bad_request("messages or tools are nested too deeply", "messages") from None
        except Exception as error:  # a template is a program: any input may break it anyhow
            reason = f"the model's chat template can't render this conversation: {error}"
            raise bad_request(reason, "messages") from None

    def _quoted(self, value: Any) -> Any:
        """Quote every string in a tree of dicts and lists."""
        if isinstance(value, str):
            return self._quote(value)
        if isinstance(value, dict):
            return {self._quote(key): self._quoted(item) for key, item in value.items()}
        return [self._quoted(item) for item in value] if isinstance(value, list) else value


def to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """Dump JSON as Hugging Face's templates expect it: no HTML escapes, no ASCII escapes."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def raise_exception(message: str) -> None:
    """Let a template refuse a conversation."""
    raise jinja2.TemplateError(message)


def load_template_source(model_dir: Path, is_harmony: bool) -> str | None:
    """Find the checkpoint's template; without one, ours if the vocabulary speaks harmony."""
    path = model_dir / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    source = read_json(model_dir / "tokenizer_config.json", missing_ok=True).get("chat_template")
    if isinstance(source, list):  # several named templates
        source = next((t["template"] for t in source if t.get("name") == "default"), None)
    if isinstance(source, str):
        return source
    ours = resources.files("headrace") / "data" / "harmony.jinja"
    return ours.read_text(encoding="utf-8") if is_harmony else None
