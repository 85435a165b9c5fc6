"""The LoRA adapters that requests may name as their model, and the requests that change them."""

from __future__ import annotations

import time
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge

from headrace.engine.client import EngineClient
from headrace.engine.messages import (
    AdapterReply,
    EngineStats,
    LoadAdapter,
    RequestOutput,
    UnloadAdapter,
)
from headrace.server.errors import ApiError, bad_request


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter that is loaded: its name in the API and its directory."""

    name: str
    path: str
    created: int = field(default_factory=lambda: int(time.time()))


class ServedAdapters:
    """What is loaded, as far as the engine has said."""

    def __init__(
        self, engine: EngineClient, model_name: str, modules: Iterable[tuple[str, Path]]
    ) -> None:
        self._engine = engine
        self._model_name = model_name
        self._served = {name: ServedAdapter(name, str(path)) for name, path in modules}

    def __contains__(self, name: object) -> bool:
        return name in self._served

    def __iter__(self) -> Iterator[ServedAdapter]:
        return iter(list(self._served.values()))

    def __getitem__(self, name: str) -> ServedAdapter:
        return self._served[name]

    async def load(self, name: str, path: str, in_place: bool) -> None:
        """Read a directory and serve it. ApiError 404 if it holds no adapter, 400 if a bad one."""
        if name == self._model_name:
            raise bad_request(f"lora_name: '{name}' is the base model's name", "lora_name")
        reply = await self._engine.change_adapter(LoadAdapter(name, path, in_place))
        if reply.error is not None:
            raise _refusal(f"Loading lora {name} failed: {reply.error}", reply, "lora_path")
        self._served[name] = ServedAdapter(name, path)

    async def unload(self, name: str) -> None:
        """Serve it no longer; requests that run are finished. ApiError 404 if it isn't loaded."""
        reply = await self._engine.change_adapter(UnloadAdapter(name))
        if reply.error is not None:
            raise _refusal(reply.error, reply, "lora_name")
        self._served.pop(name, None)


def _refusal(message: str, reply: AdapterReply, param: str) -> ApiError:
    return ApiError(404, message, param) if reply.not_found else bad_request(message, param)


class AdapterMetrics:
    """vLLM's gauge that routers read, and counters by adapter for as long as it is served.

    Who names each version of an adapter anew would else have ever more series.
    """

    def __init__(
        self, registry: CollectorRegistry, max_loras: int, served: Container[object]
    ) -> None:
        self._max_loras = max_loras
        self._served = served
        self._info = Gauge(
            "vllm:lora_requests_info",
            "When the engine last told which adapters run and wait (seconds since 1970)",
            ("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
            registry=registry,
        )
        label = ("lora_adapter",)
        self._requests = Counter(
            "headrace:lora_requests", "Requests that ended", label, registry=registry
        )
        self._tokens = Counter(
            "headrace:lora_generation_tokens", "Tokens generated", label, registry=registry
        )

        self._copies = Counter(
            "headrace:lora_copies", "Adapters copied to the device", registry=registry
        )
        self._num_copies = 0

    def on_stats(self, stats: EngineStats) -> None:
        """Take the engine's news; its counters run since its start."""
        self._copies.inc(stats.num_adapter_copies - self._num_copies)
        self._num_copies = stats.num_adapter_copies
        if self._max_loras:
            names = ",".join(stats.running_adapters), ",".join(stats.waiting_adapters)
            self._info.clear()  # or every mix of adapters would stay as a series of its own
            self._info.labels(str(self._max_loras), *names).set_to_current_time()

    def on_output(self, adapter: str | None, output: RequestOutput) -> None:
        """Count the news of one step."""
        if adapter in self._served:
            self._tokens.labels(adapter).inc(len(output.token_ids))

    def finished(self, adapter: str | None) -> None:
        """Count a request, however it ended: the engine doesn't see a stop string."""
        if adapter in self._served:
            self._requests.labels(adapter).inc()

    def forget(self, adapter: str) -> None:
        """End the series of an adapter that was unloaded."""
        self._tokens.remove(adapter)
        self._requests.remove(adapter)
