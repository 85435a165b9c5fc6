"""The engine: requests in, tokens out, one step at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count

import torch
from torch import Tensor

from headrace.config import EngineConfig
from headrace.engine.adapters import Adapters
from headrace.engine.cache_size import cache_memory, memory_for, page_bytes, plan_cache
from headrace.engine.compilers import Compilers, num_compilers
from headrace.engine.kv_cache import KVCache
from headrace.engine.lora_rows import by_adapter
from headrace.engine.messages import (
    AddRequest,
    EngineReady,
    EngineStats,
    RequestOutput,
    TokenLogprobs,
)
from headrace.engine.phases import Phases, StartReport
from headrace.engine.request import Request, RequestError, new_request
from headrace.engine.runner import Runner
from headrace.engine.sampler import Sampled, Sampler, Scores
from headrace.engine.scheduler import MAX_SCORED_ROWS, Plan, Scheduler
from headrace.engine.threads import set_cpu_threads
from headrace.engine.warmup import WarmUp, warm_up
from headrace.models import Model, open_model


@dataclass(frozen=True)
class Launched:
    """A batch that the device computes now, and who waits for what of it."""

    sampling: list[Request]
    sampled: Sampled | None  # a token for each of `sampling`
    scoring: list[Request]
    scores: Scores | None  # of one prompt token for each of `scoring`
    ending: list[Request]  # wanted their prompt computed, and no token


class Engine:
    """One model, its cache and its requests; not thread-safe, does nothing between calls.

    Raises:
        ConfigError: the flags don't fit each other, the checkpoint or the memory.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: Model | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.config = config
        set_cpu_threads(config.model)
        phases = Phases()
        compilers = Compilers(num_compilers(config.device))
        with phases("weights"):
            if model:
                self.model, read_weights = model, lambda: None
            else:
                self.model, read_weights = open_model(
                    config.model, config.device, config.dtype, progress
                )
        device = self.model.device
        on_gpu, blank_bytes = device.type == "cuda", tensor_bytes(device)
        with phases("adapters"):
            if on_gpu:  # on the CPU memory is taken as it is needed
                self._reserve()
            self.adapters = Adapters(config, self.model)
        self.sampler = Sampler(self.model.config.vocab_size, config.max_num_seqs, device)
        other_bytes = tensor_bytes(device) - blank_bytes
        with compilers:
            warmed = self._read_and_compile(read_weights, compilers, phases)
        weight_bytes = tensor_bytes(device) - other_bytes
        with phases("cache"), memory_for("the KV cache", "--kv-cache-memory"):
            self._make_cache()
        if on_gpu:
            with phases("kernels"):
                warmed += warm_up(partial(self._dry_run, self.runner), device)
            with phases("graphs"):
                self.runner.capture()
        with phases("adapters"):
            self.adapters.load_modules()
        self.scheduler = Scheduler(self.cache, config.max_num_seqs, config.max_num_batched_tokens)
        self.requests: dict[str, Request] = {}
        self.ready = self._ready(phases, weight_bytes, warmed)
        self.overlap = on_gpu  # read a step's tokens one step late
        self._launched: Launched | None = None
        self._news: list[RequestOutput] = []  # refusals and aborts, told with the next step
        self._arrivals = count()
        self._num_steps = 0
        self._iteration_tokens: list[int] = []

    def _reserve(self) -> None:
        """Take the memory of the largest step."""
        config = self.config
        rows = max(config.max_num_batched_tokens, config.max_num_seqs)
        max_rank = config.max_lora_rank if config.enable_lora else 0
        with memory_for(f"a step of {rows} tokens", "--max-num-batched-tokens"):
            self.model.reserve(rows, config.max_num_seqs + MAX_SCORED_ROWS, max_rank)

    def _read_and_compile(
        self, read_weights: Callable[[], None], compilers: Compilers, phases: Phases
    ) -> WarmUp:
        """Fill the model, and on a GPU compile the kernels meanwhile."""
        with ThreadPoolExecutor(1) as beside:
            on_gpu = self.model.device.type == "cuda"
            compiling = beside.submit(self._compile_early, compilers) if on_gpu else None
            with phases("weights"), memory_for("the checkpoint", "--max-num-batched-tokens"):
                read_weights()
            with phases("kernels"):
                return compiling.result() if compiling else WarmUp(0, 0)

    def _compile_early(self, compilers: Compilers) -> WarmUp:
        """Warm up with a small cache, while the weights are read."""
        num_pages = [2] * len(self.model.kv_layout.windows)
        runner = Runner(self.model, num_pages, self.config, 1, self.adapters.weights)
        return warm_up(partial(self._dry_run, runner), self.model.device, compilers)

    def _dry_run(self, runner: Runner) -> None:
        """Launch every kernel of steps, of sampling and of checks, for whoever watches."""
        self.sampler.dry_run()  # first: one of its kernels takes long to compile
        runner.dry_run()
        self.adapters.dry_run()

    def _make_cache(self) -> None:
        """Pages for all the memory that is left, and the runner that fills them."""
        config, model = self.config, self.model
        memory = cache_memory(config, model.device)
        positions = model.config.max_position_embeddings
        self._num_pages, self.max_model_len = plan_cache(
            model.kv_layout, config, memory, model.dtype, positions
        )
        self.cache = KVCache(
            model.kv_layout.windows,
            self._num_pages,
            config.block_size,
            config.enable_prefix_caching,
        )
        weights = self.adapters.weights
        self.runner = Runner(model, self._num_pages, config, self.max_model_len, weights)

    def _ready(self, phases: Phases, weight_bytes: int, warmed: WarmUp) -> EngineReady:
        """What the server wants to know."""
        config, layout, pages = self.config, self.model.kv_layout, self._num_pages
        sizes = page_bytes(layout, config.block_size, self.model.dtype)
        full = [n for n, window in zip(pages, layout.windows, strict=True) if not window]
        report = StartReport(
            phases.seconds,
            weight_bytes,
            cache_bytes=sum(n * size for n, size in zip(pages, sizes, strict=True)),
            cache_tokens=min(full or pages) * config.block_size,
            num_kernels=warmed.num_kernels,
            num_compiled=warmed.num_compiled,
            adapter_bytes=self.adapters.num_bytes,
        )
        max_loras = config.max_loras if config.enable_lora else 0
        return EngineReady(self.max_model_len, pages, config.block_size, report, max_loras)

    def add_request(self, message: AddRequest) -> None:
        """Queue a request; one that can't run is answered with an error output."""
        try:
            if message.request_id in self.requests:
                raise RequestError(f"request id {message.request_id!r} is already in use")
            vocab_size = self.model.config.vocab_size
            request = new_request(
                message, next(self._arrivals), self.config.seed, vocab_size, self.max_model_len
            )
            request.use(self.adapters.find(message.adapter))
        except RequestError as error:
            reason, status = str(error), error.status
            refusal = RequestOutput(
                message.request_id, [], finish_reason="error", error=reason, status=status
            )
            self._news.append(refusal)
            return
        self.requests[request.request_id] = request
        if self.adapters.arrive(request):
            self.scheduler.add(request)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget requests and free their pages at once; unknown ids are ignored."""
        for request_id in request_ids:
            request = self.requests.pop(request_id, None)
            if request is not None:
                self._forget(request)
                self._news.append(request.output([], finish_reason="abort"))

    def has_work(self) -> bool:
        """Whether a step would do or tell anything."""
        return bool(self.requests or self._news or self._launched or self.adapters.has_work)

    def step(self) -> list[RequestOutput]:
        """Launch one batch, then tell the news of the batch before it.

        While the device computes the new batch the host reads the old one: its tokens stay on
        the device, where the new batch finds them.
        """
        outputs, self._news = self._news, []
        outputs += self._take_loads()
        plan = by_adapter(self.scheduler.schedule())
        before, self._launched = self._launched, self._launch(plan) if plan else None
        if before:
            outputs += self._collect(before)
        if self._launched and not self.overlap:
            outputs += self._collect(self._launched)
            self._launched = None
        if not plan and not before:
            waits = self.adapters.is_loading or outputs or not self.requests
            assert waits, "requests are waiting and nothing runs"
            self.adapters.wait()
        return outputs

    def _take_loads(self) -> list[RequestOutput]:
        """Queue the requests whose adapter has arrived; errors for those whose adapter can't."""
        news, outputs = self.adapters.advance(), []
        for request, lora in news.moved:
            request.use(lora)
        for request in news.released:
            self.scheduler.add(request)
        for request, error in news.failed:
            del self.requests[request.request_id]
            outputs.append(request.output([], finish_reason="error", error=error, status=500))
        return outputs

    def _forget(self, request: Request) -> None:
        """Free what a request holds, whether it runs or waits."""
        self.sampler.release(request)
        if not self.adapters.leave(request):
            self.scheduler.remove(request)

    def _launch(self, plan: Plan) -> Launched:
        """Hand a batch to the device, and take its tokens for computed."""
        sampling = [r for r, n in plan.items() if r.samples_after(n)]
        scoring = [(r, p) for r, n in plan.items() for p in r.unscored_positions(n)]
        logits = self.runner.forward(plan, output_rows(plan, sampling, scoring))
        launched = Launched(
            sampling=sampling,
            scores=self._score(logits[len(sampling) :], scoring),
            sampled=self._sample(logits[: len(sampling)], sampling),
            scoring=[request for request, _ in scoring],
            ending=[r for r, n in plan.items() if r.params.max_tokens == 0 == r.num_pending - n],
        )
        for request, num_tokens in plan.items():
            self.cache.commit(request, num_tokens)
        for row, request in enumerate(sampling):
            request.sampled_row = row
            request.num_in_flight += 1
        self._num_steps += 1
        self._iteration_tokens.append(sum(plan.values()))
        return launched

    def _sample(self, logits: Tensor, requests: list[Request]) -> Sampled | None:
        """Choose tokens; they stay on the device for the next step, too."""
        if not requests:
            return None
        inputs = self.sampler.prepare(requests)
        return self.sampler.sample(logits, inputs, out=self.runner.sampled[: len(requests)])

    def _score(self, logits: Tensor, scoring: list[tuple[Request, int]]) -> Scores | None:
        """Score the prompt tokens after the given positions."""
        if not scoring:
            return None
        tokens = [request.token_ids[position + 1] for request, position in scoring]
        num_top = [request.params.prompt_logprobs or 0 for request, _ in scoring]
        return self.sampler.score(logits, tokens, num_top)

    def _collect(self, launched: Launched) -> list[RequestOutput]:
        """Wait until the device has computed a batch; its news."""
        outputs = []
        scores = launched.scores.read() if launched.scores else []
        for request, score in zip(launched.scoring, scores, strict=True):
            request.prompt_logprobs.append(score)
        sampled = launched.sampled.read() if launched.sampled else []
        for request, (token, logprobs) in zip(launched.sampling, sampled, strict=True):
            if self._is_live(request):
                outputs.append(self._tell(request, token, logprobs))
        for request in filter(self._is_live, launched.ending):
            outputs.append(self._finish(request, [], "length"))
        return outputs

    def _is_live(self, request: Request) -> bool:
        """False for one that ended, or was aborted, while its last row was computed."""
        return self.requests.get(request.request_id) is request

    def _tell(self, request: Request, token: int, logprobs: TokenLogprobs | None) -> RequestOutput:
        """A request's next token, which may be its last."""
        reason = request.read(token)
        news = {"logprobs": None if logprobs is None else [logprobs]}
        if reason is None:
            return request.output([token], **news)
        return self._finish(request, [token], reason, **news)

    def _finish(
        self, request: Request, tokens: list[int], reason: str, **news: object
    ) -> RequestOutput:
        """The last output of a request, whose pages are free from now on."""
        del self.requests[request.request_id]
        self._forget(request)
        stop = tokens[-1] if reason == "stop" else None
        return request.output(tokens, finish_reason=reason, stop_token_id=stop, **news)

    def stats(self) -> EngineStats:
        """Counters since start, gauges of now, and the steps since the last call."""
        steps, self._iteration_tokens = self._iteration_tokens, []
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.requests) - len(self.scheduler.running),
            kv_cache_usage=self.cache.usage,
            num_preemptions=self.scheduler.num_preemptions,
            prefix_cache_queries=self.scheduler.prefix_cache_queries,
            prefix_cache_hits=self.scheduler.prefix_cache_hits,
            num_steps=self._num_steps,
            iteration_tokens=steps,
            running_adapters=self.adapters.running,
            waiting_adapters=self.adapters.waiting,
            num_adapter_copies=self.adapters.num_copies,
        )

    def check(self) -> None:
        """Assert that every page is held by a running request, or free."""
        self.cache.check(self.scheduler.running)
        assert all(not request.block_tables for request in self.scheduler.waiting)


def tensor_bytes(device: torch.device) -> int:
    """What tensors take on a GPU; 0 for the CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def output_rows(
    plan: Plan, sampling: list[Request], scoring: list[tuple[Request, int]]
) -> list[int]:
    """Rows of the flat batch whose logits are wanted: first to sample from, then to score."""
    first_row, row = {}, 0
    for request, num_tokens in plan.items():
        first_row[request] = row
        row += num_tokens
    last = [first_row[r] + plan[r] - 1 for r in sampling]
    return last + [first_row[r] + p - r.num_computed for r, p in scoring]
