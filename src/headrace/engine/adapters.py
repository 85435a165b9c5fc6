"""The engine's side of LoRA: names become adapters, and requests wait for their slot."""

from __future__ import annotations

from headrace.config import ConfigError, EngineConfig
from headrace.engine.cache_size import memory_for
from headrace.engine.messages import AdapterReply, LoadAdapter, UnloadAdapter
from headrace.engine.request import NoAdapterError, Request
from headrace.files import directory, parse_module
from headrace.lora import check
from headrace.lora.adapter import AdapterNotFoundError
from headrace.lora.load import Lora, error_text
from headrace.lora.loader import Loader
from headrace.lora.memory import LoraMemory, full_size
from headrace.lora.pool import LoraPool, PoolNews
from headrace.lora.targets import model_sites
from headrace.models import Model
from headrace.ops.lora import LoraWeights

PATIENCE = 0.01  # seconds that a step with nothing else to do waits for a load


class Adapters:
    """The pool and its messages; without --enable-lora it knows no adapter.

    Raises ConfigError, here or in load_modules, if an adapter of --lora-modules can't be served
    or the memory can't be had.
    """

    def __init__(self, config: EngineConfig, model: Model) -> None:
        modules = [parse_module(module) for module in config.lora_modules]
        names = [name for name, _ in modules]
        if twice := [name for name in names if names.count(name) > 1]:
            reason = "two adapters have this name; give each one of its own"
            raise ConfigError(f"--lora-modules {twice[0]}: {reason}")
        self._replies: list[AdapterReply] = []
        self.pool: LoraPool[Request] | None = None
        if config.enable_lora:
            self.pool = make_pool(config, model)
        elif modules:
            raise ConfigError("--lora-modules needs --enable-lora")
        self._modules = modules

    def dry_run(self) -> None:
        """Launch every kernel of the self-checks, for whoever watches."""
        if self.weights is not None:
            check.dry_run(self.weights)

    def load_modules(self) -> None:
        """Load the adapters of --lora-modules.

        Not before kernels are compiled: the self-checks launch them.
        """
        for name, path in self._modules:
            self._existing_pool.load(name, path)
        while self.is_loading:
            self._existing_pool.wait(PATIENCE)
            for name, error in self._existing_pool.advance().loads:
                if error is not None:
                    raise ConfigError(f"--lora-modules {name}: {error_text(error)}") from error

    def find(self, name: str | None) -> Lora[Request] | None:
        """The adapter of a request; None for the base model. NoAdapterError for unknown names."""
        if name is None:
            return None
        if self.pool is None or name not in self.pool.names:
            raise NoAdapterError(f"the LoRA adapter '{name}' is not loaded")
        return self.pool.names[name]

    def arrive(self, request: Request) -> bool:
        """Whether a new request may go to the scheduler now; else `advance` returns it later."""
        return request.lora is None or self._existing_pool.arrive(request.lora, request)

    def leave(self, request: Request) -> bool:
        """Forget a request, done or not. Returns whether it was waiting for its adapter."""
        return request.lora is not None and self._existing_pool.leave(request.lora, request)

    def advance(self) -> PoolNews[Request]:
        """What has been loaded since the last step."""
        if self.pool is None:
            return PoolNews()
        news = self.pool.advance()
        for name, error in news.loads:
            self._reply(name, error)
        return news

    def wait(self) -> None:
        """Sleep a moment if there is a load to wait for."""
        if self.is_loading:
            self._existing_pool.wait(PATIENCE)

    @property
    def weights(self) -> LoraWeights | None:
        """What the model's forward reads; None without --enable-lora."""
        return None if self.pool is None else self.pool.memory.weights

    @property
    def num_bytes(self) -> int:
        """Memory on the device that is set aside for adapters."""
        return 0 if self.weights is None else self.weights.memory.nbytes

    @property
    def is_loading(self) -> bool:
        """Whether `advance` will have news with no new message."""
        return self.pool is not None and self.pool.is_loading

    @property
    def has_work(self) -> bool:
        """Whether there is something to tell, or will be."""
        return bool(self._replies) or self.is_loading

    @property
    def num_copies(self) -> int:
        """Copies of adapters to the device since the start."""
        return 0 if self.pool is None else self.pool.num_copies

    @property
    def running(self) -> list[str]:
        """Names of adapters with requests at the scheduler, unloaded and replaced ones too."""
        resident = [] if self.pool is None else self.pool.resident
        return list(dict.fromkeys(lora.name for lora in resident if lora.holders))

    @property
    def waiting(self) -> list[str]:
        """Names of adapters with requests that wait for a slot."""
        return [] if self.pool is None else [n for n, x in self.pool.names.items() if x.parked]

    def handle(self, message: LoadAdapter | UnloadAdapter) -> None:
        """Begin a load or unload; `take_replies` tells how it ended."""
        try:
            if self.pool is None:
                raise ConfigError("this server was started without --enable-lora")
            if isinstance(message, LoadAdapter):
                self.pool.load(message.name, directory(message.path), message.in_place)
            elif message.name not in self.pool.names:
                raise AdapterNotFoundError(f"the LoRA adapter '{message.name}' is not loaded")
            else:
                self.pool.unload(message.name)
                self._reply(message.name, None)
        except ConfigError as error:
            self._reply(message.name, error)

    def take_replies(self) -> list[AdapterReply]:
        """The answers since the last call."""
        replies, self._replies = self._replies, []
        return replies

    def _reply(self, name: str, error: Exception | None) -> None:
        text = None if error is None else error_text(error)
        not_found = isinstance(error, AdapterNotFoundError)
        self._replies.append(AdapterReply(name, text, not_found))

    @property
    def _existing_pool(self) -> LoraPool[Request]:
        """The pool, for callers that have an adapter and so know that there is one."""
        assert self.pool is not None, "a request with an adapter, but no pool"
        return self.pool


def make_pool(config: EngineConfig, model: Model) -> LoraPool[Request]:
    """The pool and its memory on the model's device."""
    sites = model_sites(model.config)
    num_elements = config.lora_memory // model.dtype.itemsize
    if not config.lora_memory:
        targets = [t for site in sites for t in site.targets]
        ends = [targets[0], targets[-1]]  # of the embedding and the LM head, seldom adapted
        one = full_size(targets[1:-1], config.max_lora_rank)
        num_elements = config.max_loras * one + full_size(ends, config.max_lora_rank)
    num_bytes = num_elements * model.dtype.itemsize
    flags = "--max-loras or --max-lora-rank, or give --lora-memory"
    with memory_for(f"the adapters' memory of {num_bytes} bytes", flags):
        memory = LoraMemory(
            sites, config.max_loras, config.max_lora_rank, num_elements, model.dtype, model.device
        )
    loader = Loader(memory, model.base_tensor)
    return LoraPool(memory, loader, config.max_cpu_loras or config.max_loras)
