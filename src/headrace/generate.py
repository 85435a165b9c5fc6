"""One question, one answer, in this process: the engine without a server."""

from __future__ import annotations

import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import Progress

from headrace.config import ConfigError, EngineConfig, ServerConfig
from headrace.engine.engine import Engine
from headrace.engine.messages import AddRequest, SamplingParams
from headrace.server.harmony import Delta, HarmonyParser, Kind, PlainParser
from headrace.server.model_info import ModelInfo, load_model_info
from headrace.server.tokenizer import load_tokenizer


def ask(
    console: Console, config: EngineConfig, question: str, max_tokens: int, temperature: float
) -> None:
    """Print the model's answer as it comes, its reasoning dimmed, then the speed."""
    tokenizer = load_tokenizer(config.model)
    model = load_model_info(config.model, tokenizer, ServerConfig())
    with Progress(console=Console(stderr=True), transient=True) as bar:
        loading = bar.add_task(f"loading {model.name}", total=None)
        engine = Engine(config, progress=lambda d, t: bar.update(loading, completed=d, total=t))
    prompt = tokenizer.encode(prompt_text(model, question))
    room = engine.max_model_len - len(prompt)
    if room < 1:
        raise ConfigError(
            f"the prompt has {len(prompt)} tokens; it must have at most "
            f"{engine.max_model_len - 1}, for --max-model-len is {engine.max_model_len}"
        )
    params = SamplingParams(
        max_tokens=min(max_tokens, room),
        temperature=temperature,
        stop_token_ids=list(model.eos_token_ids),
    )
    start, tokens = time.perf_counter(), 0
    printer = Printer(console)
    parser = HarmonyParser(tokenizer) if model.is_harmony else PlainParser(tokenizer)
    for token in run(engine, AddRequest("ask", prompt, params, time.monotonic())):
        tokens += 1
        printer.show(parser.feed(token))
    printer.show(parser.finish())
    seconds = time.perf_counter() - start
    console.print(f"\n{tokens} tokens, {tokens / seconds:.0f} tokens/s", style="dim")


def prompt_text(model: ModelInfo, question: str) -> str:
    """The question as a chat turn, or as it is where the checkpoint has no chat template."""
    if model.chat_template is None:
        return question
    return model.chat_template.render([{"role": "user", "content": question}])


def run(engine: Engine, request: AddRequest) -> Iterator[int]:
    """Step the engine until the request is answered; yields its tokens."""
    engine.add_request(request)
    while engine.has_work():
        for output in engine.step():
            if output.error is not None:
                raise ConfigError(output.error)
            yield from output.token_ids


class Printer:
    """Prints text as it comes; reasoning is dimmed, and ends with an empty line."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._kind: Kind | None = None

    def show(self, deltas: list[Delta]) -> None:
        """Print what a token added."""
        for delta in deltas:
            if self._kind not in (None, delta.kind):
                self._console.print("\n")
            self._kind = delta.kind
            style = "dim" if delta.kind == "reasoning" else None
            self._console.print(
                delta.text, end="", style=style, markup=False, highlight=False, soft_wrap=True
            )
