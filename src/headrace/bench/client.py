"""A streaming client that only notes when each chunk came.

It is written on aiohttp because a benchmark's client must not be what is measured: httpx 0.28 took
85 us of CPU for a chunk of a stream, aiohttp 3.14 with the parsing below 25, on one core.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from headrace.bench.datasets import Sample
from headrace.bench.model_list import api_headers

CONNECT_TIMEOUT = 30  # seconds; an answer itself may take any time
MAX_REASON = 300  # characters of an error that are kept


class Delta(msgspec.Struct):
    """What a chat's chunk adds; servers have two names for reasoning."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    @property
    def text(self) -> str:
        """What is said, aloud or not."""
        return self.reasoning_content or self.reasoning or self.content or ""


class Choice(msgspec.Struct):
    """What a chunk adds, to a completion or to a chat."""

    text: str | None = None
    delta: Delta | None = None


class Usage(msgspec.Struct):
    """The server's own count of tokens."""

    completion_tokens: int | None = None


class Chunk(msgspec.Struct):
    """One event of a stream; other fields are skipped."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


decode_chunk = msgspec.json.Decoder(Chunk).decode


@dataclass
class Outcome:
    """What became of one request. Times are of time.perf_counter, in seconds."""

    prompt_len: int
    model: str
    start: float = 0.0  # just before the request is sent
    chunk_times: list[float] = field(default_factory=list)  # of the chunks that bring choices
    usage_tokens: int | None = None  # generated tokens, if the server counts them
    text: str = ""
    error: str = ""  # why it failed; empty: it did not

    @property
    def succeeded(self) -> bool:
        """Whether a whole answer came."""
        return not self.error


class Client:
    """Sends requests to one endpoint and reads their streams."""

    def __init__(self, endpoint: str, is_chat: bool, fields: dict[str, Any]) -> None:
        self._endpoint = endpoint
        self._is_chat = is_chat
        self._fields = fields

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT),
            headers=api_headers(),
            trust_env=True,
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._session.close()

    def body(self, sample: Sample, model: str) -> dict[str, Any]:
        """Return the JSON of a request."""
        if self._is_chat:
            what: dict[str, Any] = {
                "messages": [{"role": "user", "content": sample.prompt}],
                "max_completion_tokens": sample.output_len,
            }
        else:
            what = {
                "prompt": sample.prompt,
                "max_tokens": sample.output_len,
                "repetition_penalty": 1.0,
            }
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        return {"model": model, **what, **stream, **self._fields}

    async def send(self, sample: Sample, model: str) -> Outcome:
        """Send one request and read its stream to the end; never raises for what goes wrong."""
        outcome = Outcome(sample.prompt_len, model)
        body = msgspec.json.encode(self.body(sample, model))
        headers = {"Content-Type": "application/json"}
        outcome.start = time.perf_counter()
        try:
            async with self._session.post(self._endpoint, data=body, headers=headers) as response:
                if response.status != 200:
                    outcome.error = f"HTTP {response.status}: {reason(await response.read())}"
                else:
                    await read_stream(response.content, outcome)
        except (TimeoutError, aiohttp.ClientError, OSError, msgspec.DecodeError) as error:
            outcome.error = f"{type(error).__name__}: {error}"[:MAX_REASON]
        return outcome


async def read_stream(stream: aiohttp.StreamReader, outcome: Outcome) -> None:
    """Note each event of a stream of server-sent events."""
    texts: list[str] = []
    rest, is_done = b"", False
    async for data in stream.iter_any():
        now = time.perf_counter()
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            event = line[5:].strip()
            is_done = event == b"[DONE]"
            if not is_done:
                note(decode_chunk(event), now, outcome, texts)
    outcome.text = "".join(texts)
    if not outcome.error and not outcome.chunk_times:
        outcome.error = "the stream ended without a token"
    elif not outcome.error and not is_done:
        outcome.error = "the stream broke off before [DONE]"


def note(chunk: Chunk, now: float, outcome: Outcome, texts: list[str]) -> None:
    """Add one event to the outcome."""
    if chunk.error is not None:
        outcome.error = f"in the stream: {error_message(chunk.error)}"[:MAX_REASON]
    if chunk.usage is not None:
        outcome.usage_tokens = chunk.usage.completion_tokens
    if chunk.choices:
        outcome.chunk_times.append(now)
        choice = chunk.choices[0]
        texts.append(choice.delta.text if choice.delta else choice.text or "")


def reason(body: bytes) -> str:
    """Return what an error's body says."""
    try:
        said = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return body.decode(errors="replace")[:MAX_REASON]
    error = said.get("error", said) if isinstance(said, dict) else said
    return error_message(error)[:MAX_REASON]


def error_message(error: Any) -> str:
    """Return the message of OpenAI's error object, or all that there is."""
    return str(error.get("message", error) if isinstance(error, dict) else error)
