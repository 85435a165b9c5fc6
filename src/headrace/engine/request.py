"""The state of one request inside the engine."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, field

from headrace.engine.messages import AddRequest, RequestOutput, SamplingParams, TokenLogprobs
from headrace.lora.load import Lora
from headrace.ops.sampling import MAX_TOP

GREEDY_BELOW = 1e-5  # temperatures under this mean "always the most likely token"


def digest(content: bytes) -> bytes:
    """16 bytes that stand for the content."""
    return hashlib.blake2b(content, digest_size=16).digest()


class RequestError(ValueError):
    """A request that the engine can't run: the text goes to the user."""

    status = 400  # HTTP's: the caller's mistake


class NoAdapterError(RequestError):
    """A request for an adapter that is not loaded, or was unloaded on its way here."""

    status = 404


@dataclass(eq=False)
class Request:
    """Tokens so far, how many of them are in the cache, and where.

    The pages live in one block table a KV group; entries before first_block[g] were given back
    (-1). arrival orders requests: (arrival_time, running number).
    """

    request_id: str
    prompt_len: int
    params: SamplingParams
    adapter: str | None  # uid of its load, which salts the hashes of the prefix cache
    arrival: tuple[float, int]
    seed: int
    token_ids: array[int]  # prompt, then output as far as the host has read it
    limit: int  # most tokens, prompt and output
    num_in_flight: int = 0  # output tokens that are sampled or will be, and not yet read
    sampled_row: int = -1  # row of the newest of them among the step's samples
    num_computed: int = 0  # tokens whose keys and values are in the cache
    num_cached: int | None = None  # prompt tokens found in the prefix cache at first admission
    queued_s: float = 0.0
    block_tables: list[array[int]] = field(default_factory=list)
    first_block: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_named: int = 0  # blocks that the prefix cache knows
    # scored prompt tokens; the first has nothing before it: [None, ...] if wanted, else []
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    reported: bool = False  # an output has been sent
    lora: Lora[Request] | None = None  # None: the base model

    @property
    def num_tokens(self) -> int:
        """Prompt and output, tokens in flight included."""
        return len(self.token_ids) + self.num_in_flight

    @property
    def num_outputs(self) -> int:
        """Output tokens so far, those in flight included."""
        return self.num_tokens - self.prompt_len

    @property
    def num_pending(self) -> int:
        """Tokens still to be computed before the next one can be sampled; 1 while decoding."""
        return self.num_tokens - self.num_computed

    @property
    def ends_in_flight(self) -> bool:
        """Whether a token that was not read yet is the last one, whatever it is."""
        return self.num_in_flight > 0 and self.num_tokens >= self.limit

    def use(self, lora: Lora[Request] | None) -> None:
        """Set the request's adapter; each load of one has cache pages of its own."""
        self.lora = lora
        self.adapter = None if lora is None else str(lora.uid)

    def next_tokens(self, num_rows: int) -> array[int]:
        """The next num_rows tokens to compute; -1 - i stands for row i of the last samples."""
        tokens = self.token_ids[self.num_computed : self.num_computed + num_rows]
        if len(tokens) < num_rows:
            tokens.append(-1 - self.sampled_row)
        assert len(tokens) == num_rows, f"{num_rows=} {self.num_computed=} {self.num_tokens=}"
        return tokens

    @property
    def owes_prompt_logprobs(self) -> bool:
        """Whether some prompt positions have not been scored yet."""
        return 0 < len(self.prompt_logprobs) < self.prompt_len

    def unscored_positions(self, num_rows: int) -> range:
        """Positions of the next num_rows rows whose logits score the prompt token after them."""
        if not self.owes_prompt_logprobs:
            return range(0)
        first = max(len(self.prompt_logprobs) - 1, self.num_computed)
        return range(first, min(self.num_computed + num_rows, self.prompt_len - 1))

    def samples_after(self, num_rows: int) -> bool:
        """Whether the next num_rows rows end with the one that predicts a new token."""
        return num_rows == self.num_pending and self.params.max_tokens > 0

    def extend_hashes(self, num_blocks: int, block_size: int) -> None:
        """Chain the content hashes of the first num_blocks full blocks, the adapter as salt."""
        assert num_blocks * block_size <= len(self.token_ids)
        while len(self.block_hashes) < num_blocks:
            i = len(self.block_hashes)
            parent = self.block_hashes[-1] if i else digest((self.adapter or "").encode())
            tokens = self.token_ids[i * block_size : (i + 1) * block_size].tobytes()
            self.block_hashes.append(digest(parent + tokens))

    def read(self, token: int) -> str | None:
        """Append an output token that was in flight; returns why it is the last, or None."""
        self.token_ids.append(token)
        self.num_in_flight -= 1
        if token in self.params.stop_token_ids:
            return "stop"
        return "length" if len(self.token_ids) >= self.limit else None

    def output(self, token_ids: list[int], **news: object) -> RequestOutput:
        """The message about this request; what is told once goes with the first one."""
        first = not self.reported
        self.reported = True
        return RequestOutput(
            self.request_id,
            token_ids,
            prompt_logprobs=(self.prompt_logprobs or None) if first else None,
            num_cached_tokens=self.num_cached or 0,
            queued_s=self.queued_s if first else 0.0,
            **news,  # type: ignore[arg-type]
        )


def new_request(
    message: AddRequest, index: int, engine_seed: int, vocab_size: int, max_model_len: int
) -> Request:
    """The request's first state; RequestError if the engine could not run it."""
    check_request(message, vocab_size, max_model_len)
    seed = message.params.seed
    return Request(
        request_id=message.request_id,
        prompt_len=len(message.prompt_token_ids),
        params=message.params,
        adapter=None,  # until `use`
        arrival=(message.arrival_time, index),
        seed=request_seed(engine_seed, message.request_id) if seed is None else seed,
        token_ids=array("q", message.prompt_token_ids),
        limit=min(len(message.prompt_token_ids) + message.params.max_tokens, max_model_len),
        prompt_logprobs=[] if message.params.prompt_logprobs is None else [None],
    )


def request_seed(engine_seed: int, request_id: str) -> int:
    """The seed of a request that brings none: a hash of the engine's seed and the id."""
    return int.from_bytes(digest(f"{engine_seed}:{request_id}".encode())[:8], "little")


def check_request(message: AddRequest, vocab_size: int, max_model_len: int) -> None:
    """RequestError for what the tensors or the cache could not take, naming field and value."""
    prompt, params = message.prompt_token_ids, message.params
    if not prompt:
        raise RequestError("the prompt is empty; it must have at least one token")
    room = max_model_len if params.max_tokens == 0 else max_model_len - 1
    if len(prompt) > room:
        raise RequestError(
            f"the prompt has {len(prompt)} tokens; with max_tokens {params.max_tokens} "
            f"it must have at most {room} (max_model_len is {max_model_len})"
        )
    if params.max_tokens == 0 and params.prompt_logprobs is None:
        raise RequestError("max_tokens is 0; it must be at least 1 unless prompt_logprobs is set")
    for name in ("logprobs", "prompt_logprobs"):
        num_top = getattr(params, name)
        if num_top is not None and not 0 <= num_top <= MAX_TOP:
            raise RequestError(f"{name} is {num_top}; it must be 0 to {MAX_TOP}")
    ids = {
        "prompt_token_ids": prompt,
        "stop_token_ids": params.stop_token_ids,
        "allowed_token_ids": params.allowed_token_ids or [],
        "logit_bias": params.logit_bias,
    }
    for name, tokens in ids.items():
        bad = next((t for t in tokens if not 0 <= t < vocab_size), None)
        if bad is not None:
            raise RequestError(f"{name} has token id {bad}; ids are 0 to {vocab_size - 1}")
    check_allowed(params)


def check_allowed(params: SamplingParams) -> None:
    """RequestError if allowed_token_ids leave nothing to choose from."""
    if params.allowed_token_ids is None:
        return
    if not params.allowed_token_ids:
        raise RequestError("allowed_token_ids is empty; it must have at least one id")
    if params.min_tokens > 0 and set(params.allowed_token_ids) <= set(params.stop_token_ids):
        raise RequestError(
            f"min_tokens is {params.min_tokens}, but every allowed_token_ids entry is a stop "
            "token; allow another token or set min_tokens to 0"
        )
