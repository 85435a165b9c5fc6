"""What every route shares: the engine, the tokenizer, the model, and a request's way through."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, cast

import msgspec

from headrace.config import ServerConfig
from headrace.engine.client import EngineClient
from headrace.engine.messages import AddRequest, EngineStats, RequestOutput, SamplingParams
from headrace.server.adapters import AdapterMetrics, ServedAdapters
from headrace.server.errors import ApiError, bad_request
from headrace.server.metrics import Metrics, RequestTimer
from headrace.server.model_info import ModelInfo
from headrace.server.protocol import SamplingFields
from headrace.server.tokenizer import Tokenizer

API_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
UNIT_DEFAULTS = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}


class Serving:
    """One served model."""

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: Tokenizer,
        config: ServerConfig,
        model: ModelInfo,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.config = config
        self.model = model
        self.metrics = Metrics(model.name, engine.ready)
        self.adapters = ServedAdapters(engine, model.name, model.adapters)
        self.adapter_metrics = AdapterMetrics(
            self.metrics.registry, engine.ready.max_loras, self.adapters
        )
        self.draining = False
        self.num_in_flight = 0
        engine.on_stats = self._on_stats

    def _on_stats(self, stats: EngineStats) -> None:
        self.metrics.on_stats(stats)
        self.adapter_metrics.on_stats(stats)

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and output together."""
        return self.engine.ready.max_model_len

    def check_model(self, name: str | None) -> None:
        """Raise 404 unless this is the model or an adapter (None: whatever is served)."""
        if name is not None and name != self.model.name and name not in self.adapters:
            raise ApiError(404, f"The model `{name}` does not exist.", "model")

    def check_ready(self) -> None:
        """Raise 503 while draining, 500 once the engine is dead."""
        if self.draining:
            raise ApiError(503, "the server is shutting down and takes no new requests")
        if not self.engine.is_alive:
            raise self.dead_engine_error()

    def dead_engine_error(self) -> ApiError:
        """Build the error of requests whose engine is gone."""
        return ApiError(500, f"the engine is gone: {self.engine.dead_reason or 'it ended'}")

    def cut_off_error(self) -> ApiError:
        """Build the error of what was under way when the engine went."""
        if self.draining:
            return ApiError(503, "the server was shut down before this request was done")
        return self.dead_engine_error()

    def encode(self, text: str, param: str) -> list[int]:
        """Tokenize a caller's text, or raise 400 naming its field."""
        try:
            return self.tokenizer.encode(text)
        except ValueError as error:
            raise bad_request(f"{param}: {error}", param) from None

    def check_tokens(self, token_ids: list[int], param: str) -> None:
        """Raise 400 when an id is not in the model's vocabulary."""
        largest = max(token_ids, default=0)
        if largest >= self.model.vocab_size:
            limit = self.model.vocab_size - 1
            raise bad_request(f"{param}: token id {largest} is over the largest, {limit}", param)

    def fit_prompt(self, token_ids: list[int], truncate: int | None, param: str) -> list[int]:
        """Truncate from the left if asked to; raise 400 when empty or too long even so."""
        token_ids = token_ids[-truncate:] if truncate else token_ids
        self.check_tokens(token_ids, param)
        if not token_ids:
            raise bad_request(f"{param}: the prompt is empty", param)
        if len(token_ids) > self.max_model_len:
            raise bad_request(
                f"{param}: the prompt has {len(token_ids)} tokens, but this model's maximum "
                f"context length is {self.max_model_len} tokens",
                param,
            )
        return token_ids

    def fit_output(
        self, max_tokens: int | None, num_prompt_tokens: int, param: str = "max_tokens"
    ) -> int:
        """Return how many tokens may be generated (None: all that fit), or raise 400."""
        room = self.max_model_len - num_prompt_tokens
        wanted = max(room, 1) if max_tokens is None else max_tokens
        if wanted > room:
            raise bad_request(
                f"{param}: the prompt has {num_prompt_tokens} tokens and {wanted} more are "
                f"wanted, but this model's maximum context length is {self.max_model_len} tokens",
                param,
            )
        return wanted

    def sampling_params(
        self,
        request: SamplingFields,
        max_tokens: int,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        """Complete a request's values by the model's and the API's defaults."""
        defaults = API_DEFAULTS | UNIT_DEFAULTS | self.model.sampling_defaults
        values: dict[str, Any] = {}
        for name, default in defaults.items():
            value = getattr(request, name)
            values[name] = default if value is None else value
        bias = {int(i): b for i, b in (request.logit_bias or {}).items()}
        self.check_tokens(list(bias), "logit_bias")
        self.check_tokens(request.allowed_token_ids or [], "allowed_token_ids")
        self.check_tokens(request.stop_token_ids or [], "stop_token_ids")
        if request.min_tokens > max_tokens:
            text = f"min_tokens: {request.min_tokens} is more than max_tokens, {max_tokens}"
            raise bad_request(text, "min_tokens")
        eos = () if request.ignore_eos else self.model.eos_token_ids
        return SamplingParams(
            **values | {"top_k": max(values["top_k"], 0)},
            max_tokens=max_tokens,
            min_tokens=request.min_tokens,
            logit_bias=bias,
            allowed_token_ids=request.allowed_token_ids,
            seed=request.seed,
            stop_token_ids=list(dict.fromkeys([*(request.stop_token_ids or []), *eos])),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    async def generate(
        self,
        model: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        timer: RequestTimer,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Run one sequence on the engine; closing the generator aborts it there.

        Raises ApiError 500 when the engine dies, 503 when it takes no more requests.
        """
        adapter = None if model == self.model.name else model
        arrival = time.monotonic()
        request = AddRequest(uuid.uuid4().hex, prompt_token_ids, params, arrival, adapter)
        self.num_in_flight += 1
        try:
            async with aclosing(outputs_of(self.engine, request)) as outputs:
                async for output in outputs:
                    timer.on_output(output)
                    self.adapter_metrics.on_output(adapter, output)
                    if output.finish_reason == "error":
                        raise self.engine_error(output)
                    yield output
        finally:
            self.num_in_flight -= 1
            timer.finish()
            self.adapter_metrics.finished(adapter)

    def timer(self, num_prompt_tokens: int, params: SamplingParams) -> RequestTimer:
        """Start to time a sequence."""
        return RequestTimer(self.metrics, num_prompt_tokens, params.max_tokens)

    def engine_error(self, output: RequestOutput) -> ApiError:
        """Say whose fault an engine's error is."""
        if self.draining or not self.engine.is_alive:
            return self.cut_off_error()
        param = "model" if output.status == 404 else None
        return ApiError(output.status, output.error or "refused by the engine", param)


def outputs_of(engine: EngineClient, request: AddRequest) -> AsyncGenerator[RequestOutput, None]:
    """The client's generator, typed as what it is, so that it can be closed."""
    return cast(AsyncGenerator[RequestOutput, None], engine.generate(request))


def with_seed(params: SamplingParams, choice: int) -> SamplingParams:
    """Give choice i of n its own seed: seed + i, wrapped to what generators take."""
    if params.seed is None:
        return params
    return msgspec.structs.replace(params, seed=(params.seed + choice) % 2**63)
