"""How long a large prompt takes to tokenize, and stops all other threads: tokenizer_stops.py

One text of 2.1 MB in the bundled model's vocabulary, by the tokenizers library's `encode` and by a
batch of one; prints the lines of bench/results/cpu/tokenizer.csv.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import tokenizers

from headrace.files import BUNDLED_MODEL

TEXT = "The quick brown fox, " * 100_000
NUM_RUNS = 3


def longest_stop(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the work, and the longest that another thread's sleep of 1 ms took meanwhile."""
    done, gaps = threading.Event(), [0.0]

    def watch() -> None:
        last = time.perf_counter()
        while not done.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    return seconds, max(gaps)


def main() -> None:
    """Measure both, the fastest of three runs each."""
    backend = tokenizers.Tokenizer.from_file(str(BUNDLED_MODEL / "tokenizer.json"))
    ways = {
        "encode": lambda: backend.encode(TEXT, add_special_tokens=False).ids,
        "encode_batch_fast": lambda: (
            backend.encode_batch_fast([TEXT], add_special_tokens=False)[0].ids
        ),
    }
    print("call,mbytes,seconds,longest_stop_s")
    for name, work in ways.items():
        seconds, stop = min(longest_stop(work) for _ in range(NUM_RUNS))
        print(f"{name},{len(TEXT) / 1e6},{seconds:.2f},{stop:.3f}")


if __name__ == "__main__":
    main()
