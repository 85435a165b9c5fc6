"""POST /v1/chat/completions: messages and tools in; reasoning, content and tool calls out."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any

from headrace.engine.messages import RequestOutput, SamplingParams, TokenLogprobs
from headrace.server.errors import bad_request
from headrace.server.harmony import Delta, HarmonyParser, PlainParser
from headrace.server.protocol import ChatRequest, NamedToolChoice, PromptFields
from headrace.server.responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatLogprobs,
    ChatMessage,
    ChatResponse,
    ChatTokenLogprob,
    CompletionTokensDetails,
    FunctionDelta,
    PromptTokensDetails,
    ToolCallDelta,
    TopLogprob,
    Usage,
)
from headrace.server.serving import Serving, with_seed
from headrace.server.stream import StopStrings, merge
from headrace.server.tokenizer import Tokenizer


def render_prompt(
    serving: Serving, request: PromptFields, tools: list[Any], add_generation_prompt: bool = True
) -> list[int]:
    """Return the conversation's token ids, by the model's chat template."""
    template = serving.model.chat_template
    if template is None:
        raise bad_request("this model has no chat template; use /v1/completions", "messages")
    text = template.render(
        [template_message(message.model_dump()) for message in request.messages],
        [tool.model_dump(exclude_none=True) for tool in tools],
        request.reasoning_effort,
        add_generation_prompt,
    )
    return serving.encode(text, "messages")


def template_message(message: dict[str, Any]) -> dict[str, Any]:
    """Bring a message into the form that Hugging Face's templates read."""
    message = {key: value for key, value in message.items() if value not in (None, [])}
    if isinstance(message.get("content"), list):
        message["content"] = "\n".join(part["text"] for part in message["content"])
    message.setdefault("content", "")
    if "reasoning" in message:
        message.setdefault("reasoning_content", message.pop("reasoning"))
    # gpt-oss's own template calls reasoning "thinking", and refuses it beside both content and
    # tool calls, though models write all three; ours reads reasoning_content.
    if "reasoning_content" in message and not (message["content"] and "tool_calls" in message):
        message["thinking"] = message["reasoning_content"]
    for call in message.get("tool_calls", []):
        call["function"]["arguments"] = parsed_arguments(call["function"]["arguments"])
    return message


def parsed_arguments(arguments: str) -> Any:
    """Parse a call's arguments, for templates dump them; a model's broken JSON stays text."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def tools_on_offer(serving: Serving, request: ChatRequest) -> list[Any]:
    """Return the tools that the model may call; 400 for a choice that can't be kept."""
    tools, choice = request.tools or [], request.tool_choice
    if tools and not serving.config.enable_tools:
        raise bad_request("tools: this server runs with --no-enable-tools", "tools")
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise bad_request("tools: two functions have the same name", "tools")
    if isinstance(choice, NamedToolChoice) and choice.function.name not in names:
        text = f"tool_choice: {choice.function.name!r} is not one of the tools"
        raise bad_request(text, "tool_choice")
    if choice == "required" and len(tools) != 1:
        raise bad_request(
            f"tool_choice: 'required' is only possible with exactly one tool, not {len(tools)}; "
            "choosing among several needs constrained decoding, which this server doesn't have. "
            "Name a function, or use 'auto'",
            "tool_choice",
        )
    return [] if choice == "none" else tools


def forced_function(request: ChatRequest, tools: list[Any]) -> str | None:
    """Name the function that must be called."""
    if isinstance(request.tool_choice, NamedToolChoice):
        return request.tool_choice.function.name
    return tools[0].function.name if request.tool_choice == "required" else None


class Chat:
    """One HTTP request and its n answers."""

    def __init__(self, serving: Serving, request: ChatRequest) -> None:
        self._serving = serving
        self._request = request
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        tools = tools_on_offer(serving, request)
        self._tools = [tool.function.name for tool in tools]
        self._forced = self._forced_header(forced_function(request, tools))
        prompt = render_prompt(serving, request, tools) + self._forced
        self._prompt = serving.fit_prompt(prompt, request.truncate_prompt_tokens, "messages")
        self._params = self._sampling_params()
        self._num_tokens = [0] * request.n
        self._num_reasoning = [0] * request.n
        self._num_cached = 0

    def _forced_header(self, function: str | None) -> list[int]:
        """Return what the model is made to begin with: the header of a call."""
        if function is None:
            return []
        if not self._serving.model.is_harmony:
            raise bad_request("tool_choice: this model doesn't speak harmony", "tool_choice")
        header = f"<|channel|>commentary to=functions.{function} <|constrain|>json<|message|>"
        return self._serving.encode(header, "tool_choice")

    def _sampling_params(self) -> SamplingParams:
        request = self._request
        field = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        max_tokens = self._serving.fit_output(getattr(request, field), len(self._prompt), field)
        alternatives = request.top_logprobs or 0
        return self._serving.sampling_params(
            request, max_tokens, logprobs=alternatives if request.logprobs else None
        )

    async def respond(self) -> ChatResponse:
        """Wait for all answers."""
        answers = [Answer() for _ in range(self._request.n)]
        async with aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                answers[piece.index].add(piece)
        return ChatResponse(
            id=self._id,
            object="chat.completion",
            created=self._created,
            model=self._request.model,
            choices=[answer.choice(index) for index, answer in enumerate(answers)],
            usage=self._usage(),
        )

    async def stream(self) -> AsyncGenerator[ChatChunk, None]:
        """Yield each answer's pieces as they come, its role with its first token."""
        async with aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                yield self._chunk([piece])
        if self._request.include_usage:
            yield self._chunk([], self._usage())

    def _pieces(self) -> AsyncGenerator[ChatChunkChoice, None]:
        return merge([self._choice(index) for index in range(self._request.n)])

    async def _choice(self, index: int) -> AsyncGenerator[ChatChunkChoice, None]:
        """Yield one answer in pieces: its role once there is a token, at last its finish_reason."""
        params = with_seed(self._params, index)
        parser = self._parser()
        reader = AnswerReader(self._serving.tokenizer, self._request, parser, index)
        timer = self._serving.timer(len(self._prompt), params)
        role = ChatMessage(role="assistant", content="")
        opening = [ChatChunkChoice(index=index, delta=role, finish_reason=None)]
        for token_id in self._forced:
            opening += reader.pieces(parser.feed(token_id))
        async with aclosing(
            self._serving.generate(self._request.model, self._prompt, params, timer)
        ) as outputs:
            async for output in outputs:
                self._num_tokens[index] += len(output.token_ids)
                self._num_cached = max(self._num_cached, output.num_cached_tokens)
                pieces, opening = opening + reader.take(output), []
                for piece in pieces:
                    yield piece
                self._num_reasoning[index] = parser.num_reasoning_tokens
                if reader.finish_reason is not None:
                    if reader.finish_reason != output.finish_reason:
                        timer.finish_reason = "stop"
                    break
        yield reader.last_piece()

    def _parser(self) -> HarmonyParser | PlainParser:
        if self._serving.model.is_harmony:
            return HarmonyParser(self._serving.tokenizer, self._tools)
        return PlainParser(self._serving.tokenizer)

    def _usage(self) -> Usage:
        num_tokens = sum(self._num_tokens)
        return Usage(
            prompt_tokens=len(self._prompt),
            completion_tokens=num_tokens,
            total_tokens=len(self._prompt) + num_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self._num_cached),
            completion_tokens_details=CompletionTokensDetails(
                reasoning_tokens=sum(self._num_reasoning)
            ),
        )

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> ChatChunk:
        return ChatChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._request.model,
            choices=choices,
            **{"usage": usage} if usage else {},
        )


class AnswerReader:
    """One answer's tokens to message deltas, up to its stop string."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        request: ChatRequest,
        parser: HarmonyParser | PlainParser,
        index: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._request = request
        self._parser = parser
        self._index = index
        self._stops = StopStrings(request.stop_strings)
        self._scores: list[TokenLogprobs] = []  # of ordinary tokens
        self._num_tokens = 0
        self._stop_reason: int | str | None = None
        self.finish_reason: str | None = None

    def take(self, output: RequestOutput) -> list[ChatChunkChoice]:
        """Return the pieces that one engine step adds; sets finish_reason at the end."""
        deltas: list[Delta] = []
        for position, token_id in enumerate(output.token_ids):
            self._num_tokens += 1
            if output.logprobs and token_id not in self._tokenizer.special_tokens:
                self._scores.append(output.logprobs[position])
            deltas += self._parser.feed(token_id)
        if output.finish_reason is not None:
            deltas += self._parser.finish()
            self.finish_reason = output.finish_reason
            if output.stop_token_id in (self._request.stop_token_ids or []):
                self._stop_reason = output.stop_token_id
        return self.pieces(deltas)

    def pieces(self, deltas: Iterable[Delta]) -> list[ChatChunkChoice]:
        """Turn the parser's deltas into the API's; stop strings cut `content` only."""
        found = []
        for delta in deltas:
            if self._is_call_too_many(delta):
                self.finish_reason = "stop"
                break
            found.append(self._piece(delta))
            if self._stops.found is not None:
                self.finish_reason, self._stop_reason = "stop", self._stops.found
                break
        return [piece for piece in found if piece is not None]

    def last_piece(self) -> ChatChunkChoice:
        """Return what was held back, with the finish_reason."""
        called = self._parser.num_calls > 0 and self.finish_reason == "stop"
        rest = self._stops.flush()
        return ChatChunkChoice(
            index=self._index,
            delta=ChatMessage(content=rest) if rest else ChatMessage(),
            finish_reason="tool_calls" if called else self.finish_reason,
            stop_reason=self._stop_reason,
        )

    def _is_call_too_many(self, delta: Delta) -> bool:
        return self._request.parallel_tool_calls is False and delta.call > 0

    def _piece(self, delta: Delta) -> ChatChunkChoice | None:
        """Build one delta; None when it says nothing."""
        if delta.kind == "content":
            return self._content_piece(delta)
        if delta.kind == "tool":
            return self._choice(ChatMessage(tool_calls=[call_delta(delta)]))
        if not delta.text or not self._request.include_reasoning:
            return None
        return self._choice(ChatMessage(reasoning_content=delta.text))

    def _content_piece(self, delta: Delta) -> ChatChunkChoice | None:
        armed = self._num_tokens > self._request.min_tokens
        text = self._stops.feed(delta.text, armed)
        scores = self._scores[len(self._scores) - delta.tokens :] if self._scores else []
        if not text and not scores:
            return None
        piece = self._choice(ChatMessage(content=text))
        if scores:
            logprobs = [token_logprob(self._tokenizer, each) for each in scores]
            piece.logprobs = ChatLogprobs(content=logprobs)
        return piece

    def _choice(self, delta: ChatMessage) -> ChatChunkChoice:
        return ChatChunkChoice(index=self._index, delta=delta, finish_reason=None)


def call_delta(delta: Delta) -> ToolCallDelta:
    """Build the first delta of a tool call, or a later one with more of its arguments."""
    if delta.name is None:
        return ToolCallDelta(index=delta.call, function=FunctionDelta(arguments=delta.text))
    return ToolCallDelta(
        index=delta.call,
        id=f"call_{uuid.uuid4().hex[:24]}",
        type="function",
        function=FunctionDelta(name=delta.name, arguments=delta.text),
    )


def token_logprob(tokenizer: Tokenizer, scores: TokenLogprobs) -> ChatTokenLogprob:
    """Build a token's entry; the alternatives are scores[1:]."""

    def entry(position: int) -> TopLogprob:
        raw = tokenizer.token_bytes(scores.token_ids[position])
        return TopLogprob(
            token=raw.decode("utf-8", "replace"),
            logprob=scores.logprobs[position],
            bytes=list(raw),
        )

    alternatives = [entry(position) for position in range(1, len(scores.token_ids))]
    return ChatTokenLogprob(**entry(0).model_dump(), top_logprobs=alternatives)


class Answer:
    """A whole answer, put together from its pieces."""

    def __init__(self) -> None:
        self._content = ""
        self._reasoning = ""
        self._calls: list[ToolCallDelta] = []
        self._scores: list[ChatTokenLogprob] = []
        self._last: ChatChunkChoice | None = None

    def add(self, piece: ChatChunkChoice) -> None:
        """Append a piece."""
        self._content += piece.delta.content or ""
        self._reasoning += piece.delta.reasoning_content or ""
        for delta in piece.delta.tool_calls or []:
            if delta.id is not None:
                self._calls.append(ToolCallDelta(**delta.model_dump(exclude={"index"})))
            else:
                function = self._calls[-1].function
                function.arguments = f"{function.arguments}{delta.function.arguments}"
        self._scores += piece.logprobs.content if piece.logprobs else []
        self._last = piece

    def choice(self, index: int) -> ChatChoice:
        """Return the answer; content is null only beside tool calls."""
        assert self._last is not None
        assert self._last.finish_reason is not None
        message = ChatMessage(role="assistant", content=self._content or None)
        if self._calls:
            message.tool_calls = self._calls
        elif not self._content:
            message.content = ""
        if self._reasoning:
            message.reasoning_content = self._reasoning
        return ChatChoice(
            index=index,
            message=message,
            logprobs=ChatLogprobs(content=self._scores) if self._scores else None,
            finish_reason=self._last.finish_reason,
            stop_reason=self._last.stop_reason,
        )
