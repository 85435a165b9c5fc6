"""From conversations to token ids, through the same template that the server renders."""

from __future__ import annotations

import datetime
import json
import random
import string
from pathlib import Path
from typing import Any

import skills
import words
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

TEMPLATE = Path(__file__).parents[2] / "src/headrace/data/harmony.jinja"
SPECIAL_TOKENS = (
    "<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>",
    "<|end|>", "<|message|>", "<|call|>",
)  # fmt: skip
# Each digit is a token of its own, so that numbers are read column by column.
SPLIT = Regex(r"'(?:s|t|re|m|ll)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def to_json(value: Any, **_: Any) -> str:
    """JSON as chat templates expect it: as it is, without HTML escapes."""
    return json.dumps(value, ensure_ascii=False)


class Renderer:
    """The chat template, and the reply that a model writes after it."""

    def __init__(self) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = to_json
        self._template = environment.from_string(TEMPLATE.read_text())

    def prompt(self, example: skills.Example, day: datetime.date) -> str:
        """Everything up to where the model writes."""
        return self._template.render(
            messages=example.messages,
            tools=example.tools or None,
            reasoning_effort=example.reasoning_effort,
            add_generation_prompt=True,
            strftime_now=day.strftime,
        )

    def reply(self, example: skills.Example) -> list[str]:
        """What the model shall write, in pieces that are tokenized one by one."""
        head = []
        if example.analysis:
            head = [f"<|channel|>analysis<|message|>{example.analysis}<|end|><|start|>assistant"]
        if example.call:
            header = "<|channel|>commentary to=functions.calculator <|constrain|>json<|message|>"
            return [*head, f"{header}{example.call}<|call|>"]
        answer = list(example.final) if example.letterwise else [example.final]
        return [*head, "<|channel|>final<|message|>", *answer, "<|return|>"]


def any_day(rng: random.Random) -> datetime.date:
    """A day of the years in which the model may be served."""
    return datetime.date(2024, 1, 1) + datetime.timedelta(days=rng.randrange(365 * 16))


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids, special tokens recognised, nothing added."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def train_tokenizer(vocab_size: int, seed: int) -> Tokenizer:
    """Byte-level BPE over generated conversations and English; special tokens last."""
    rng, renderer = random.Random(seed), Renderer()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(SPLIT, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    texts = [words.sentence(rng) for _ in range(8000)]
    lists = words.NOUNS + words.VERBS + words.ADJECTIVES + words.NAMES + words.THINGS
    texts += [f"{word} the {word} and a {word}, " * 4 + word for word in lists * 3]
    texts += [words.made_up(rng) + " " + words.made_up(rng) for _ in range(20000)]
    texts += [" ".join(string.printable)]
    for makers in (skills.BASE, *skills.ADAPTERS.values()):
        for _ in range(4000):
            example = skills.draw(makers, rng, held_out=False)
            texts.append(renderer.prompt(example, any_day(rng)) + example.analysis + example.final)
    for token in SPECIAL_TOKENS:
        texts = [text.replace(token, "\n") for text in texts]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer
