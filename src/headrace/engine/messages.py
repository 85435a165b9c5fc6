"""What the server and the engine process say to each other: msgpack over ZeroMQ."""

from __future__ import annotations

import msgspec

from headrace.engine.phases import StartReport


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose tokens, after validation; the engine trusts these values.

    logprobs/prompt_logprobs: number of alternatives to report beside the chosen token, None = none.
    stop strings live in the server, which holds the detokenizer.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    allowed_token_ids: list[int] | None = None
    seed: int | None = None
    stop_token_ids: list[int] = []  # the server adds the model's eos ids unless ignore_eos
    logprobs: int | None = None
    prompt_logprobs: int | None = None


class AddRequest(msgspec.Struct, frozen=True, tag="add"):
    """Queue a request. max_tokens may be 0 when only prompt logprobs are wanted."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_time: float  # time.monotonic() of the server, same host
    adapter: str | None = None


class AbortRequest(msgspec.Struct, frozen=True, tag="abort"):
    """Forget these requests and free their pages; unknown ids are ignored."""

    request_ids: list[str]


class LoadAdapter(msgspec.Struct, frozen=True, tag="load_adapter"):
    """Read a PEFT directory and serve it under a name; answered by an AdapterReply."""

    name: str
    path: str
    in_place: bool = False  # replace the adapter of that name, for requests that come later


class UnloadAdapter(msgspec.Struct, frozen=True, tag="unload_adapter"):
    """Forget an adapter once its requests are done; answered by an AdapterReply."""

    name: str


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Finish nothing, free everything, exit 0."""


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities at one position: the token itself first, then the top alternatives."""

    token_ids: list[int]  # [0] is the chosen (or prompt) token, [1:] the top-k in falling order
    logprobs: list[float]
    rank: int  # rank of the chosen token, 1 = most likely


class RequestOutput(msgspec.Struct, frozen=True, tag="output"):
    """News of one request after one engine step."""

    request_id: str
    token_ids: list[int]  # new tokens since the last output
    logprobs: list[TokenLogprobs] | None = None  # one per new token, when asked for
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # once, with the first output
    finish_reason: str | None = None  # "stop" | "length" | "abort" | "error"
    stop_token_id: int | None = None  # the stop token that ended it (it is also in token_ids)
    error: str | None = None  # with finish_reason "error": text for the user
    status: int = 400  # HTTP's, with the error: whose fault it is
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache
    queued_s: float = 0.0  # with the first token: time between arrival and first scheduling


class AdapterReply(msgspec.Struct, frozen=True, tag="adapter"):
    """How a LoadAdapter or UnloadAdapter ended."""

    name: str
    error: str | None = None
    not_found: bool = False  # the error is that there is nothing of that name or path


class EngineStats(msgspec.Struct, frozen=True, tag="stats"):
    """Counters since start and gauges of now; sent at most a few times a second and when idle."""

    num_running: int
    num_waiting: int
    kv_cache_usage: float  # 0..1
    num_preemptions: int
    prefix_cache_queries: int  # tokens looked up
    prefix_cache_hits: int  # tokens found
    num_steps: int
    iteration_tokens: list[int] = []  # tokens of each step since the last EngineStats
    running_adapters: list[str] = []  # those with requests at the scheduler
    waiting_adapters: list[str] = []  # those with requests that wait for a slot
    num_adapter_copies: int = 0  # to the device


class EngineReady(msgspec.Struct, frozen=True, tag="ready"):
    """Sent once, when the model is loaded and the cache allocated."""

    max_model_len: int
    num_pages: list[int]  # per KV group
    block_size: int
    start: StartReport
    max_loras: int = 0  # 0: no adapters are served


class EngineLoading(msgspec.Struct, frozen=True, tag="loading"):
    """How far the checkpoint is read: done of total, in the loader's own units."""

    done: int
    total: int


class EngineDead(msgspec.Struct, frozen=True, tag="dead"):
    """The last words of an engine that cannot go on."""

    reason: str
    caller_mistake: bool = False  # wrong flags or a bad checkpoint: the reason says what to change


ToEngine = AddRequest | AbortRequest | LoadAdapter | UnloadAdapter | Shutdown
FromEngine = RequestOutput | AdapterReply | EngineStats | EngineReady | EngineLoading | EngineDead
