"""An engine that replays given token ids, to put words into the model's mouth."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
from fastapi import FastAPI

from headrace.config import ServerConfig
from headrace.engine.messages import AddRequest, EngineReady, RequestOutput, TokenLogprobs
from headrace.engine.phases import StartReport
from headrace.server.app import create_app
from headrace.server.chat_template import ChatTemplate
from headrace.server.model_info import ModelInfo
from headrace.server.tokenizer import Tokenizer

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}<|start|>assistant"


class ScriptedEngine:
    """Answers request i with scripts[i], one token a step; keeps what it was asked."""

    dead_reason = None
    is_alive = True
    ready = EngineReady(max_model_len=4096, num_pages=[64], block_size=16, start=StartReport({}))

    def __init__(self, *scripts: Sequence[int]) -> None:
        self._scripts = list(scripts)
        self.requests: list[AddRequest] = []
        self.num_closed_early = 0

    async def generate(self, request: AddRequest) -> AsyncIterator[RequestOutput]:
        script = self._scripts[len(self.requests)]
        self.requests.append(request)
        try:
            for position, token in enumerate(script):
                stops = token in request.params.stop_token_ids
                last = stops or position == len(script) - 1
                yield RequestOutput(
                    request.request_id,
                    [token],
                    logprobs=[TokenLogprobs([token, 1], [-0.5, -1.5], 1)]
                    if request.params.logprobs is not None
                    else None,
                    finish_reason=("stop" if stops else "length") if last else None,
                    stop_token_id=token if stops else None,
                )
                if last:
                    return
        except GeneratorExit:
            self.num_closed_early += 1
            raise


def scripted_app(
    engine: ScriptedEngine, tokenizer: Tokenizer, template: str | None = TEMPLATE, **info: Any
) -> FastAPI:
    eos = tuple(tokenizer.special_ids[t] for t in ("<|return|>", "<|call|>", "<|endoftext|>"))
    values = {
        "name": "scripted",
        "root": "",
        "vocab_size": 500,
        "eos_token_ids": eos,
        "is_harmony": True,
        "chat_template": ChatTemplate(template, tokenizer.quote) if template else None,
        "sampling_defaults": {},
    }
    model = ModelInfo(**values | info)
    return create_app(engine, tokenizer, ServerConfig(), model)  # type: ignore[arg-type]


def connect(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
