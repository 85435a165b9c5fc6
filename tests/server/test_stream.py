from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.server.stream import StopStrings, merge, until_disconnect


def cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The first stop to be complete wins, as when characters come one by one."""
    for end in range(1, len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                hits = [(at, s) for s in stops if (at := text[:end].find(s)) >= 0]
                at, found = min(hits)
                return text[:at], found
    return text, None


@given(
    st.lists(st.text("abc", max_size=4), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_stops_across_borders(pieces: list[str], stops: list[str]) -> None:
    stream = StopStrings(stops)
    shown = ""
    for piece in "".join(pieces):  # one by one, for which the oracle is exact
        shown += stream.feed(piece)
        assert stream.found is not None or not any(stop in shown for stop in stops)
    assert (shown + stream.flush() if stream.found is None else shown, stream.found) == cut(
        "".join(pieces), stops
    )


@given(st.lists(st.text("ab", max_size=5), max_size=8), st.text("ab", min_size=1, max_size=4))
def test_one_stop_in_any_pieces(pieces: list[str], stop: str) -> None:
    stream = StopStrings([stop])
    shown = "".join(stream.feed(piece) for piece in pieces)
    if stream.found is None:
        shown += stream.flush()
    assert shown == "".join(pieces).split(stop)[0]


def test_never_a_part_of_a_stop() -> None:
    stream = StopStrings(["END"])
    assert [stream.feed(piece) for piece in ("a E", "N", "x E", "ND", "y")] == [
        *("a ", "", "ENx ", "", "")
    ]
    assert stream.found == "END"


def test_unarmed_stop_is_text() -> None:
    stream = StopStrings(["b"])
    assert stream.feed("ab", armed=False) == "ab"
    assert stream.feed("ab") == "a"


async def test_merge_closes_all() -> None:
    closed = []

    async def count(name: str) -> AsyncGenerator[str, None]:
        try:
            for i in range(1000):
                yield f"{name}{i}"
                await asyncio.sleep(0)
        finally:
            closed.append(name)

    merged = merge([count("a"), count("b")])
    seen = [await anext(merged) for _ in range(6)]
    await merged.aclose()
    assert [s for s in seen if s[0] == "a"] == [f"a{i}" for i in range(3)]
    assert sorted(closed) == ["a", "b"]


async def test_merge_passes_errors_on() -> None:
    async def fail() -> AsyncGenerator[str, None]:
        yield "x"
        raise ValueError("y")

    with pytest.raises(ValueError, match="y"):
        [item async for item in merge([fail()])]


async def test_disconnect_cancels() -> None:
    cancelled = []

    async def forever() -> None:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def receive() -> dict[str, str]:
        await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    assert await until_disconnect(receive, forever()) is None
    assert cancelled == [True]
