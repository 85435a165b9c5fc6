"""A real server for tests: small tokenizer, random checkpoint, engine, HTTP on a free port."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import tokenizers
import uvicorn

from headrace.config import EngineConfig, ServerConfig
from headrace.engine.client import EngineClient
from headrace.server.app import create_app
from headrace.server.model_info import load_model_info
from headrace.server.tokenizer import load_tokenizer
from tests.checkpoints import random_checkpoint

SPECIALS = (
    *("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>"),
    *("<|start|>", "<|end|>", "<|message|>", "<|call|>"),
)
MODEL_NAME = "random"
TEXT = (
    "the quick brown fox jumps over the lazy dog, assistant user system developer analysis "
    "commentary final to=functions.add json naïve café 你好 — 🙂 1234567890 {} [] "
)


def write_tokenizer(path: Path, vocab_size: int = 400) -> int:
    """Write tokenizer.json: byte-level BPE with harmony's special tokens; return its size."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.save(str(path / "tokenizer.json"))
    return tokenizer.get_vocab_size()


def write_model(path: Path) -> Path:
    """Write a random model that has a tokenizer."""
    path.mkdir(parents=True, exist_ok=True)
    size = write_tokenizer(path)
    tokenizer = load_tokenizer(path)
    random_checkpoint(
        path,
        seed=1,
        max_position_embeddings=2048,
        vocab_size=size,
        eos_token_id=tokenizer.special_ids["<|return|>"],
    )
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|return|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(names))
    (path / "generation_config.json").write_text(json.dumps({"temperature": 1.0, "top_p": 1.0}))
    return path


class LiveServer:
    """Engine process, app and uvicorn, in a thread with its own event loop."""

    def __init__(self, model: Path, engine: dict | None = None, **server: object) -> None:
        self._engine_config = EngineConfig(
            model=model, device="cpu", kv_cache_memory=16 << 20, **(engine or {})
        )
        self._config = ServerConfig(**{"served_model_name": MODEL_NAME} | server)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self.url = ""

    def __enter__(self) -> LiveServer:
        self._thread.start()
        assert self._ready.wait(120), "the server did not start"
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.should_exit = True
        self._thread.join(30)

    async def _serve(self) -> None:
        tokenizer = load_tokenizer(self._engine_config.model)
        modules = self._engine_config.lora_modules
        model = load_model_info(self._engine_config.model, tokenizer, self._config, modules)
        self.engine = EngineClient(self._engine_config)
        await self.engine.start()
        app = create_app(self.engine, tokenizer, self._config, model)
        self.serving = app.state.serving
        config = uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=2)
        self._server = uvicorn.Server(config)
        task = asyncio.create_task(self._server.serve())
        while not self._server.started:
            await asyncio.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._ready.set()
        await task
        await self.engine.shutdown()


def wait_for(condition: Callable[[], bool], patience: float = 60.0) -> None:
    """Poll until the condition holds."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)
