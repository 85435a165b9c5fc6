"""What a running server serves, by its /v1/models."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp

from headrace.config import ConfigError

POLL = 0.2  # seconds between looks at a server that does not answer yet

Models = Sequence[dict[str, Any]]  # cards as the server wrote them


def api_headers() -> dict[str, str]:
    """Return what requests carry: the key in OPENAI_API_KEY, if it is set."""
    key = os.environ.get("OPENAI_API_KEY", "")
    return {"Authorization": f"Bearer {key}"} if key else {}


async def wait_for_models(url: str, seconds: float = 0.0) -> Models:
    """Return the server's models, empty if it has no /v1/models.

    Raises ConfigError when it doesn't answer within so many seconds (0: at once).
    """
    deadline = time.monotonic() + seconds
    async with aiohttp.ClientSession(headers=api_headers(), trust_env=True) as session:
        while True:
            try:
                return await list_models(session, url)
            except (aiohttp.ClientError, OSError) as error:
                if time.monotonic() >= deadline:
                    raise ConfigError(f"can't reach a server at {url}: {error}") from None
            await asyncio.sleep(POLL)


async def list_models(session: aiohttp.ClientSession, url: str) -> Models:
    """Ask once."""
    async with session.get(url + "/v1/models") as response:
        if response.status in (401, 403):
            raise ConfigError(f"{url} answers {response.status}; set OPENAI_API_KEY")
        if response.status >= 500:  # it is starting, or broken
            response.raise_for_status()
        if not response.ok:
            return []
        try:
            listed = await response.json(content_type=None)
            return [card for card in listed["data"] if isinstance(card.get("id"), str)]
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ConfigError(f"{url}/v1/models is no list of models") from None


def choose_model(models: Models, model: str, adapters: Sequence[str]) -> str:
    """Return the base model's name: `model`, or the first one listed.

    Raises ConfigError for a name that a list, if there is one, doesn't have.
    """
    names = [card["id"] for card in models]
    if not names and not model:
        raise ConfigError("the server lists no models; give --model NAME")
    model = model or names[0]
    for flag, name in [("--model", model), *(("--lora-modules", a) for a in adapters)]:
        if names and name not in names:
            raise ConfigError(f"{flag} {name}: the server has only {', '.join(names)}")
    return model


def find_tokenizer(models: Models, model: str) -> Path:
    """Return the directory, on this machine, that the server says the model lies in."""
    for card in models:
        root = card.get("root")
        if card["id"] == model and isinstance(root, str) and Path(root).is_dir():
            return Path(root)
    raise ConfigError("give --tokenizer DIR: the server doesn't say where its model lies")
