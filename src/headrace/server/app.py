"""The routes."""

from __future__ import annotations

import asyncio
import hmac
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel

import headrace
from headrace.config import ServerConfig
from headrace.engine.client import EngineClient, EngineDeadError
from headrace.server.chat import Chat, render_prompt
from headrace.server.completions import Completion
from headrace.server.errors import ApiError, documented, install_handlers
from headrace.server.model_info import ModelInfo
from headrace.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    LoadAdapterRequest,
    PromptFields,
    TokenizeRequest,
    UnloadAdapterRequest,
)
from headrace.server.responses import (
    ChatResponse,
    CompletionResponse,
    DetokenizeResponse,
    HealthResponse,
    ModelCard,
    ModelList,
    TokenizeResponse,
    VersionResponse,
)
from headrace.server.serving import Serving
from headrace.server.stream import EventStream, until_disconnect
from headrace.server.tokenizer import Tokenizer

EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
EVENTS: dict[str, Any] = {"content": {"text/event-stream": {"schema": EVENT}}}
GENERATE = documented(400, 401, 404, 500, 503) | {200: EVENTS}
TEXT: dict[str, Any] = {"content": {"text/plain": {"schema": {"type": "string"}}}}
CHANGE = documented(400, 401, 404, 500, 503) | {200: TEXT}
bearer = HTTPBearer(auto_error=False, description="an API key, where the server has some")


def create_app(
    engine_client: EngineClient,
    tokenizer: Tokenizer,
    server_config: ServerConfig,
    model_info: ModelInfo,
) -> FastAPI:
    """Build the API of one served model; the engine must be started."""
    app = Api(title="Headrace", version=headrace.__version__, redirect_slashes=False)
    app.state.serving = Serving(engine_client, tokenizer, server_config, model_info)
    install_handlers(app)
    app.add_exception_handler(EngineDeadError, on_dead_engine)
    app.include_router(monitoring)
    app.include_router(api)
    return app


class Api(FastAPI):
    """FastAPI, but its document knows that invalid requests get 400."""

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document without the 422 that FastAPI adds to every route."""
        document = super().openapi()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for unused in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(unused, None)
        return document


def serving_of(request: Request) -> Serving:
    """Find what create_app put together."""
    serving: Serving = request.app.state.serving
    return serving


async def on_dead_engine(request: Request, error: Exception) -> Response:
    """Answer a request whose engine went away before it was done."""
    return serving_of(request).cut_off_error().response()


def check_key(
    request: Request, credentials: HTTPAuthorizationCredentials | None = Depends(bearer)
) -> None:
    """Raise 401 unless the request has one of the server's keys, or there are none."""
    keys = serving_of(request).config.api_key
    given = credentials.credentials.encode() if credentials else b""
    matches = [hmac.compare_digest(given, key.encode()) for key in keys]
    if keys and not any(matches):
        raise ApiError(401, "this server needs an API key: Authorization: Bearer KEY")


monitoring = APIRouter()
api = APIRouter(dependencies=[Depends(check_key)])


@monitoring.get("/health", responses={503: {"model": HealthResponse, "description": "Not ready"}})
async def health(request: Request) -> HealthResponse:
    """Whether requests can be taken: 503 while draining, and when the engine is gone."""
    serving = serving_of(request)
    if not serving.engine.is_alive:
        state = HealthResponse(status="dead", reason=serving.dead_engine_error().message)
    elif serving.draining:
        state = HealthResponse(status="draining", reason="the server is shutting down")
    else:
        return HealthResponse(status="ok")
    return JSONResponse(state.model_dump(), 503)  # type: ignore[return-value]


@monitoring.get(
    "/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}}
)
async def metrics(request: Request) -> Response:
    """Prometheus metrics, under vLLM's names."""
    text = serving_of(request).metrics.render()
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


@api.get("/version", responses=documented(401))
async def version() -> VersionResponse:
    """The server's version."""
    return VersionResponse(version=headrace.__version__)


@api.get("/v1/models", responses=documented(401))
async def models(request: Request) -> ModelList:
    """The served model, and the adapters of it."""
    serving = serving_of(request)
    names = [serving.model.name, *(adapter.name for adapter in serving.adapters)]
    return ModelList(data=[model_card(serving, name) for name in names])


@api.get("/v1/models/{model:path}", responses=documented(401, 404))
async def model(request: Request, model: str) -> ModelCard:
    """One served model."""
    serving_of(request).check_model(model)
    return model_card(serving_of(request), model)


def model_card(serving: Serving, name: str) -> ModelCard:
    """Describe the served model or one of its adapters."""
    info, length = serving.model, serving.max_model_len
    if name == info.name:
        return ModelCard(id=name, created=info.created, root=info.root, max_model_len=length)
    found = serving.adapters[name]
    return ModelCard(
        id=name, created=found.created, root=found.path, parent=info.name, max_model_len=length
    )


@api.post("/v1/load_lora_adapter", responses=CHANGE)
async def load_lora_adapter(request: Request, body: LoadAdapterRequest) -> Response:
    """Serve an adapter under a name of its own."""
    serving = serving_of(request)
    serving.check_ready()
    await serving.adapters.load(body.lora_name, body.lora_path, body.load_inplace)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@api.post("/v1/unload_lora_adapter", responses=CHANGE)
async def unload_lora_adapter(request: Request, body: UnloadAdapterRequest) -> Response:
    """Serve an adapter no longer; its running requests are finished."""
    serving = serving_of(request)
    serving.check_ready()
    await serving.adapters.unload(body.lora_name)
    serving.adapter_metrics.forget(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


@api.post("/v1/completions", response_model=CompletionResponse, responses=GENERATE)
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Complete a text, or several."""
    return await answer(request, body, Completion)


@api.post("/v1/chat/completions", response_model=ChatResponse, responses=GENERATE)
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Answer a conversation."""
    return await answer(request, body, Chat)


async def answer(request: Request, body: Any, kind: type[Chat] | type[Completion]) -> Response:
    """Check, then stream or wait; a client that leaves takes its sequences with it."""
    serving = serving_of(request)
    serving.check_model(body.model)
    serving.check_ready()
    # In a thread: a prompt of megabytes takes a second to tokenize, and nobody else waits for it.
    work: Chat | Completion = await asyncio.to_thread(kind, serving, body)
    serving.metrics.n.observe(body.n)
    if body.stream:
        return EventStream(work.stream())
    result: BaseModel | None = await until_disconnect(request.receive, work.respond())
    content = result.model_dump_json(exclude_unset=True) if result else ""
    return Response(content, media_type="application/json")


@api.post("/tokenize", responses=documented(400, 401, 404))
def tokenize(request: Request, body: TokenizeRequest) -> TokenizeResponse:
    """Text, or a conversation, to token ids."""
    serving = serving_of(request)
    serving.check_model(body.model)
    if body.prompt is not None:
        ids = serving.encode(body.prompt, "prompt")
    else:
        assert body.messages is not None
        conversation = PromptFields(
            messages=body.messages, tools=body.tools, reasoning_effort=body.reasoning_effort
        )
        ids = render_prompt(serving, conversation, body.tools or [], body.add_generation_prompt)
    texts = [serving.tokenizer.token_text(i) for i in ids] if body.return_token_strs else None
    return TokenizeResponse(
        count=len(ids), max_model_len=serving.max_model_len, tokens=ids, token_strs=texts
    )


@api.post("/detokenize", responses=documented(400, 401, 404))
def detokenize(request: Request, body: DetokenizeRequest) -> DetokenizeResponse:
    """Token ids to text."""
    serving = serving_of(request)
    serving.check_model(body.model)
    serving.check_tokens(body.tokens, "tokens")
    return DetokenizeResponse(prompt=serving.tokenizer.decode(body.tokens))
