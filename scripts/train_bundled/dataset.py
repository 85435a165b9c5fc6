"""Packed rows of examples: several to a row, each seeing only itself."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import skills
import text
import torch
from tokenizers import Tokenizer
from torch import Tensor

ROW_LENGTH = 512
WAITING = 48  # examples to choose from when the rest of a row is filled


@dataclass(frozen=True)
class Rows:
    """Token ids with, for each, its position in its example and whether it is to be predicted."""

    tokens: Tensor  # [num_rows, ROW_LENGTH] int16
    positions: Tensor  # [num_rows, ROW_LENGTH] int16, 0 starts an example; padding is all 0
    learned: Tensor  # [num_rows, ROW_LENGTH] bool: part of a reply
    skill: Tensor  # [num_rows, ROW_LENGTH] uint8: index into skill_names

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: str) -> Rows:
        """The same rows on another device."""
        return Rows(*(tensor.to(device) for tensor in vars(self).values()))

    def take(self, index: Tensor | slice) -> Rows:
        """Some of the rows."""
        return Rows(*(tensor[index] for tensor in vars(self).values()))


SKILL_NAMES = (
    "", "add", "copy", "recall", "spell", "call", "result", "chat", "decline", "no_math",
    "no_reverse", "subtract", "reverse",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What a worker needs to write its share of the rows."""

    tokenizer: str
    makers: dict[skills.Maker, float]
    num_rows: int
    seed: int
    held_out: bool


def make_rows(recipe: Recipe, num_shards: int, num_workers: int | None = None) -> Rows:
    """Rows of `num_shards` seeds in a row; the same seeds give the same rows on any machine."""
    shares = [
        Recipe(recipe.tokenizer, recipe.makers, recipe.num_rows // num_shards,
               recipe.seed * 1000 + i, recipe.held_out)
        for i in range(num_shards)
    ]  # fmt: skip
    workers = num_workers or len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        parts = list(pool.map(_shard, shares))
    columns = [torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True)]
    return Rows(*columns)


def _shard(recipe: Recipe) -> tuple[np.ndarray, ...]:
    tokens = np.zeros((recipe.num_rows, ROW_LENGTH), np.int16)
    positions, learned = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
    skill = np.zeros(tokens.shape, np.uint8)
    stream = _encoded(recipe)
    waiting = [next(stream) for _ in range(WAITING)]
    for row in range(recipe.num_rows):
        end = 0
        while True:
            fitting = [i for i, item in enumerate(waiting) if end + len(item[0]) <= ROW_LENGTH]
            if not fitting:
                break
            # The first is the oldest; after it the longest that fits leaves the least empty.
            best = max(fitting, key=lambda i: len(waiting[i][0])) if end else fitting[0]
            ids, prompt_length, number = waiting.pop(best)
            waiting.append(next(stream))
            span = slice(end, end + len(ids))
            tokens[row, span], positions[row, span] = ids, np.arange(len(ids))
            skill[row, span] = number
            learned[row, end + prompt_length : span.stop] = True
            end = span.stop
    return tokens, positions, learned, skill


def _encoded(recipe: Recipe) -> Iterator[tuple[list[int], int, int]]:
    """(token ids, length of the prompt, number of the skill) without end."""
    rng, renderer = random.Random(recipe.seed), text.Renderer()
    tokenizer = Tokenizer.from_str(recipe.tokenizer)
    while True:
        example = skills.draw(recipe.makers, rng, recipe.held_out)
        prompt = text.encode(tokenizer, renderer.prompt(example, text.any_day(rng)))
        reply = [i for piece in renderer.reply(example) for i in text.encode(tokenizer, piece)]
        if len(prompt) + len(reply) <= ROW_LENGTH:
            yield prompt + reply, len(prompt), SKILL_NAMES.index(example.skill)
