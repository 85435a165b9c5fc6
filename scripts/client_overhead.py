"""CPU time that the benchmark's client takes for a chunk: python scripts/client_overhead.py

A process that costs the client nothing sends fixed streams to 128 connections at once, a chunk for
each every --gap seconds; what is printed is the client process's own CPU time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import time
from multiprocessing.connection import Connection

from headrace.bench.client import Client
from headrace.bench.datasets import Sample

CHOICE = {"index": 0, "text": " token", "logprobs": None, "finish_reason": None}
FIELDS = {"id": f"cmpl-{'0' * 32}", "object": "text_completion", "created": 1, "model": "m"}
EVENT = b"data: " + json.dumps(FIELDS | {"choices": [CHOICE]}).encode() + b"\n\n"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
DONE = b"data: [DONE]\n\n"


def chunked(data: bytes) -> bytes:
    """One piece of a body in HTTP's chunked coding."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def serve(connection: Connection, num_chunks: int, gap: float) -> None:
    """Send every request the same stream; tells its port first."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HEAD)
        for _ in range(num_chunks):
            writer.write(chunked(EVENT))
            await asyncio.sleep(gap)
        writer.write(chunked(DONE) + chunked(b""))
        await writer.drain()
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        connection.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


async def load(port: int, num_streams: int) -> int:
    """Read all streams at once; return how many chunks came."""
    async with Client(f"http://127.0.0.1:{port}/v1/completions", False, {}) as client:
        sample = Sample([1], 1, 1)
        outcomes = await asyncio.gather(*(client.send(sample, "m") for _ in range(num_streams)))
    assert all(o.succeeded for o in outcomes), outcomes[0].error
    return sum(len(o.chunk_times) for o in outcomes)


def main() -> None:
    """Print microseconds of CPU for each chunk."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--streams", type=int, default=128)
    options.add_argument("--chunks", type=int, default=200)
    options.add_argument("--gap", type=float, default=0.02)
    args = options.parse_args()
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.Process(target=serve, args=(theirs, args.chunks, args.gap))
    server.start()
    try:
        port = ours.recv()
        asyncio.run(load(port, 2))
        cpu, wall = time.process_time(), time.perf_counter()
        count = asyncio.run(load(port, args.streams))
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    finally:
        server.kill()
    print(
        f"{count} chunks in {wall:.1f} s: {1e6 * cpu / count:.1f} us of CPU each, "
        f"at most {count / cpu:,.0f} a second on one core"
    )


if __name__ == "__main__":
    main()
