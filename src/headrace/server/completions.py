"""POST /v1/completions: text or token ids in, text out."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from headrace.engine.messages import RequestOutput, SamplingParams, TokenLogprobs
from headrace.server.errors import bad_request
from headrace.server.protocol import MAX_SEQUENCES, CompletionRequest
from headrace.server.responses import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionResponse,
    PromptTokensDetails,
    Usage,
)
from headrace.server.serving import Serving, with_seed
from headrace.server.stream import StopStrings, merge
from headrace.server.tokenizer import IncrementalDetokenizer, Tokenizer


class Completion:
    """One HTTP request: every prompt with its n choices, numbered prompt by prompt."""

    def __init__(self, serving: Serving, request: CompletionRequest) -> None:
        self._serving = serving
        self._request = request
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._prompts = [
            serving.fit_prompt(ids, request.truncate_prompt_tokens, "prompt")
            for ids in prompt_token_ids(serving, request)
        ]
        if len(self._prompts) * request.n > MAX_SEQUENCES:
            raise bad_request(
                f"n: {len(self._prompts)} prompts times n={request.n} is more than "
                f"{MAX_SEQUENCES} sequences",
                "n",
            )
        self._params = [self._sampling_params(ids) for ids in self._prompts]
        self._num_tokens = [0] * (len(self._prompts) * request.n)
        self._num_cached = [0] * len(self._prompts)

    def _sampling_params(self, prompt: list[int]) -> SamplingParams:
        request = self._request
        wanted = 16 if request.max_tokens is None else request.max_tokens
        max_tokens = self._serving.fit_output(wanted, len(prompt))
        scored = request.logprobs if request.echo else None
        if max_tokens == 0 and scored is None:
            scored = 0  # the engine takes a request without output only for its prompt's scores
        return self._serving.sampling_params(
            request, max_tokens, logprobs=request.logprobs, prompt_logprobs=scored
        )

    async def respond(self) -> CompletionResponse:
        """Wait for all choices."""
        choices: dict[int, CompletionChoice] = {}
        async with aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                whole = choices.get(piece.index)
                choices[piece.index] = join(whole, piece) if whole else piece
        return self._response([choices[i] for i in sorted(choices)], self._usage())

    async def stream(self) -> AsyncGenerator[CompletionResponse, None]:
        """Yield pieces of the choices as they come."""
        async with aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                yield self._response([piece])
        if self._request.include_usage:
            yield self._response([], self._usage())

    def _pieces(self) -> AsyncGenerator[CompletionChoice, None]:
        n = self._request.n
        return merge([self._choice(i // n, i) for i in range(len(self._prompts) * n)])

    async def _choice(self, prompt: int, index: int) -> AsyncGenerator[CompletionChoice, None]:
        """Yield one choice in pieces, the last one with its finish_reason."""
        serving, token_ids = self._serving, self._prompts[prompt]
        params = with_seed(self._params[prompt], index % self._request.n)
        text = ChoiceText(serving.tokenizer, self._request, token_ids)
        timer = serving.timer(len(token_ids), params)
        async with aclosing(
            serving.generate(self._request.model, token_ids, params, timer)
        ) as outputs:
            async for output in outputs:
                self._num_tokens[index] += len(output.token_ids)
                self._num_cached[prompt] = max(self._num_cached[prompt], output.num_cached_tokens)
                piece = text.take(output)
                piece.index = index
                if piece.finish_reason == "stop":
                    timer.finish_reason = "stop"
                if piece.text or piece.logprobs or piece.finish_reason:
                    yield piece
                if piece.finish_reason:
                    return

    def _usage(self) -> Usage:
        prompt_tokens, num_tokens = sum(map(len, self._prompts)), sum(self._num_tokens)
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=num_tokens,
            total_tokens=prompt_tokens + num_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._num_cached)),
        )

    def _response(
        self, choices: list[CompletionChoice], usage: Usage | None = None
    ) -> CompletionResponse:
        return CompletionResponse(
            id=self._id,
            object="text_completion",
            created=self._created,
            model=self._request.model,
            choices=choices,
            **{"usage": usage} if usage else {},
        )


def prompt_token_ids(serving: Serving, request: CompletionRequest) -> list[list[int]]:
    """Make every form of `prompt` a list of token lists."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [serving.encode(prompt, "prompt")]
    if isinstance(prompt[0], int):
        return [prompt]
    return [serving.encode(p, "prompt") if isinstance(p, str) else p for p in prompt]


@dataclass
class Scored:
    """Tokens with their log-probabilities, as the legacy format wants them."""

    tokenizer: Tokenizer
    result: CompletionLogprobs

    @classmethod
    def empty(cls, tokenizer: Tokenizer) -> Scored:
        """Start without tokens."""
        nothing = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        return cls(tokenizer, nothing)

    def add(self, token_id: int, scores: TokenLogprobs | None, offset: int) -> None:
        """Append a token; the first one of a prompt has no scores."""
        result, text = self.result, self.tokenizer.token_text
        result.tokens.append(text(token_id))
        result.text_offset.append(offset)
        result.token_logprobs.append(scores.logprobs[0] if scores else None)
        # The alternatives come after the token itself, which may or may not be one of them.
        pairs = zip(scores.token_ids, scores.logprobs, strict=True) if scores else None
        result.top_logprobs.append({text(i): value for i, value in pairs} if pairs else None)


class ChoiceText:
    """One choice's tokens to text and logprobs, up to its stop string."""

    def __init__(self, tokenizer: Tokenizer, request: CompletionRequest, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        self._request = request
        self._detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
        self._stops = StopStrings(request.stop_strings)
        self._prompt = prompt if request.echo else []
        self._length = 0  # characters so far, those held back too
        self._num_tokens = 0

    def take(self, output: RequestOutput) -> CompletionChoice:
        """Return the piece that one engine step adds."""
        scored = Scored.empty(self._tokenizer)
        text = self._echo(scored, output)
        for position, token_id in enumerate(output.token_ids):
            scores = output.logprobs[position] if output.logprobs else None
            scored.add(token_id, scores, self._length)
            self._num_tokens += 1
            is_last = position == len(output.token_ids) - 1
            if not (is_last and output.stop_token_id is not None):
                text += self._show(self._detokenizer.feed(token_id))
            if self._stops.found is not None:
                break
        if output.finish_reason and self._stops.found is None:
            text += self._show(self._detokenizer.flush()) + self._stops.flush()
        return self._piece(text, scored, output)

    def _show(self, text: str) -> str:
        self._length += len(text)
        return self._stops.feed(text, armed=self._num_tokens > self._request.min_tokens)

    def _echo(self, scored: Scored, output: RequestOutput) -> str:
        """Return the prompt's text, once."""
        text = ""
        for position, token_id in enumerate(self._prompt):
            scores = output.prompt_logprobs[position] if output.prompt_logprobs else None
            scored.add(token_id, scores, self._length)
            shown = self._detokenizer.feed(token_id)
            self._length += len(shown)
            text += shown
        self._prompt = []
        # Only now: what is echoed is the prompt as it was sent.
        self._detokenizer.skip_special_tokens = self._request.skip_special_tokens
        return text

    def _piece(self, text: str, scored: Scored, output: RequestOutput) -> CompletionChoice:
        stopped = self._stops.found is not None
        piece = CompletionChoice(
            index=0,
            text=text,
            finish_reason="stop" if stopped else output.finish_reason,
            stop_reason=self._stops.found if stopped else self._stop_token(output),
        )
        if self._request.logprobs is not None and scored.result.tokens:
            piece.logprobs = scored.result
        return piece

    def _stop_token(self, output: RequestOutput) -> int | None:
        """Name the stop token only when the caller asked for it, as vLLM does."""
        asked = self._request.stop_token_ids or []
        return output.stop_token_id if output.stop_token_id in asked else None


def join(whole: CompletionChoice, piece: CompletionChoice) -> CompletionChoice:
    """Append a later piece of the same choice."""
    whole.text += piece.text
    whole.finish_reason, whole.stop_reason = piece.finish_reason, piece.stop_reason
    if piece.logprobs and whole.logprobs:
        whole.logprobs.tokens += piece.logprobs.tokens
        whole.logprobs.token_logprobs += piece.logprobs.token_logprobs
        whole.logprobs.top_logprobs += piece.logprobs.top_logprobs
        whole.logprobs.text_offset += piece.logprobs.text_offset
    elif piece.logprobs:
        whole.logprobs = piece.logprobs
    return whole
