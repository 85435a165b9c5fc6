"""`python3 -m headrace.bench kernels`: the GPU's part of `headrace bench`, with torch and Triton.

For a machine that has not got the server's dependencies.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from headrace.bench.kernels import SIZES, run_kernels
from headrace.bench.tune import run_tune
from headrace.bench.tune_linear import run_tune_linear


def main() -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python3 -m headrace.bench")
    parser.add_argument("command", choices=["kernels", "tune", "tune-linear"])
    parser.add_argument("--op", nargs="+", default=[], help="only these")
    parser.add_argument("--size", nargs="+", type=int, default=SIZES, help="tokens")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    args = parser.parse_args()
    console = Console(width=120)
    if args.command == "kernels":
        return run_kernels(console, args.op, args.size, args.out)
    run = run_tune if args.command == "tune" else run_tune_linear
    run(console, args.size, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
