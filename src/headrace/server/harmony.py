"""Harmony, the message format of gpt-oss: tokens to reasoning, content and tool calls.

A message is <|start|> header <|message|> content and one of <|end|>, <|return|>, <|call|>. The
header is a role, and in any order ` to=recipient` and <|channel|> with a channel's name, then
perhaps <|constrain|> with a content type. Models write broken headers now and then: whatever
isn't a header, or names an unknown channel, is content; no sequence of tokens is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple

from headrace.server.tokenizer import IncrementalDetokenizer, Tokenizer

REQUIRED = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>")
Kind = Literal["reasoning", "content", "tool"]

# What may stand before and after <|channel|>, as far as it has come.
RECIPIENT = r"(?:\s+(?:t|to|to=\S{0,256})?)?"
ROLE = re.compile(r"\s*[a-z]{0,9}" + RECIPIENT + r"\s*")
CHANNEL = re.compile(r"\s*[A-Za-z_]{0,32}" + RECIPIENT + r"(?:\s+[\w<|>]{0,32})?\s*")


class State(Enum):
    """Where in a message the next token stands."""

    BETWEEN = 0  # after an end: a start, or a model that forgot it
    ROLE = 1  # after <|start|>, or after the generation prompt
    CHANNEL = 2  # after <|channel|>
    CONTENT = 3  # after <|message|>


class Delta(NamedTuple):
    """New text of one kind; tokens: how many ordinary tokens, up to the latest, it came from.

    call is the number of the tool call; name is set in a call's first delta.
    """

    kind: Kind
    text: str
    tokens: int = 0
    call: int = -1
    name: str | None = None


def speaks_harmony(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary has harmony's special tokens."""
    return all(name in tokenizer.special_ids for name in REQUIRED)


@dataclass(frozen=True)
class Header:
    """What a message's header says."""

    role: str
    channel: str
    recipient: str

    @classmethod
    def parse(cls, role_part: str, channel_part: str) -> Header:
        """Take the recipient from wherever it stands; everything missing is ""."""
        recipient = re.search(r"(?:^|\s)to=(\S+)", role_part) or re.search(
            r"(?:^|\s)to=(\S+)", channel_part
        )
        role = re.match(r"\s*(?!to=)(\S*)", role_part)
        channel = re.match(r"\s*(?!to=)(\S*)", channel_part)
        return cls(
            role=role[1] if role else "",
            channel=channel[1] if channel else "",
            recipient=recipient[1] if recipient else "",
        )


class HarmonyParser:
    """A state machine over token ids, started where the generation prompt ends.

    tools: names of the functions on offer; without any, a call is shown as content.
    """

    def __init__(self, tokenizer: Tokenizer, tools: Iterable[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=True)
        self._tools = frozenset(tools)
        self._state = State.ROLE
        self._role_part = ""
        self._channel_part = ""
        self._header_tokens = 0
        self._kind: Kind = "content"
        self._seen_kinds: set[Kind] = set()
        self._separator = ""
        self.num_calls = 0
        self.num_reasoning_tokens = 0

    def feed(self, token_id: int) -> list[Delta]:
        """Take one token; return what it adds."""
        name = self._tokenizer.special_tokens.get(token_id)
        if name is None:
            return self._ordinary(self._detokenizer.feed(token_id))
        if name == "<|start|>":
            deltas = self._close()
            self._open_header(State.ROLE)
        elif name == "<|channel|>":
            deltas = [] if self._state is State.ROLE else self._close()
            self._state = State.CHANNEL  # of the header that has begun
        elif name == "<|message|>":
            deltas = [] if self._state is State.CONTENT else self._open_message()
        elif name in ("<|end|>", "<|return|>", "<|call|>"):
            deltas = self._close()
        else:  # <|constrain|> splits words in a header; elsewhere specials mean nothing
            deltas = self._ordinary(" ", tokens=0) if self._state is State.CHANNEL else []
        return deltas

    def finish(self) -> list[Delta]:
        """Return what was held back when the output ends here."""
        return self._close()

    def _ordinary(self, text: str, tokens: int = 1) -> list[Delta]:
        if self._state is State.CONTENT:
            self.num_reasoning_tokens += self._kind == "reasoning"
            return [self._delta(text, tokens)]
        self._header_tokens += tokens
        if self._state is State.BETWEEN:
            self._state = State.ROLE
        if self._state is State.ROLE:
            self._role_part += text
        else:
            self._channel_part += text
        return [] if self._may_be_header() else self._give_up_header()

    def _may_be_header(self) -> bool:
        if self._state is State.CHANNEL:
            return CHANNEL.fullmatch(self._channel_part) is not None
        return ROLE.fullmatch(self._role_part) is not None

    def _open_header(self, state: State) -> None:
        self._state = state
        self._role_part, self._channel_part, self._header_tokens = "", "", 0

    def _open_message(self) -> list[Delta]:
        header = Header.parse(self._role_part, self._channel_part)
        self._open_header(State.CONTENT)
        self._detokenizer.flush()
        function = self._function(header.recipient)
        if function is not None:
            self._kind = "tool"
            self.num_calls += 1
            return [Delta("tool", "", call=self.num_calls - 1, name=function)]
        self._start_text("reasoning" if header.channel == "analysis" else "content")
        return []

    def _function(self, recipient: str) -> str | None:
        """Name the function that a recipient means, if functions are on offer."""
        name = recipient.removeprefix("functions.")
        is_call = name != recipient or name in self._tools
        return name if self._tools and name and is_call else None

    def _start_text(self, kind: Kind) -> None:
        """Open a text; a newline parts it from an earlier one of its kind."""
        self._kind = kind
        self._separator = "\n" if kind in self._seen_kinds else ""

    def _delta(self, text: str, tokens: int) -> Delta:
        if self._kind == "tool":
            return Delta("tool", text, tokens, call=self.num_calls - 1)
        if text:
            self._seen_kinds.add(self._kind)
            text, self._separator = self._separator + text, ""
        return Delta(self._kind, text, tokens)

    def _give_up_header(self) -> list[Delta]:
        """Turn what looked like a header into content."""
        text, tokens = self._role_part + self._channel_part, self._header_tokens
        self._open_header(State.CONTENT)
        self._start_text("content")
        return [self._delta(text, tokens)]

    def _close(self) -> list[Delta]:
        """End the message in hand, whatever its state."""
        rest = self._detokenizer.flush()
        deltas: list[Delta] = []
        if self._state is State.CONTENT:
            deltas = [self._delta(rest, tokens=0)] if rest else []
        elif self._header_tokens or rest:
            self._channel_part += rest
            deltas = self._give_up_header()
        self._open_header(State.BETWEEN)
        return deltas


class PlainParser:
    """For vocabularies without harmony: all is content."""

    num_calls = 0
    num_reasoning_tokens = 0

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=True)

    def feed(self, token_id: int) -> list[Delta]:
        """Take one token; return what it adds."""
        tokens = int(token_id not in self._tokenizer.special_tokens)
        return [Delta("content", self._detokenizer.feed(token_id), tokens)]

    def finish(self) -> list[Delta]:
        """Return what was held back when the output ends here."""
        rest = self._detokenizer.flush()
        return [Delta("content", rest)] if rest else []
