"""Benchmarks: kernels, the engine's latency, a server under load."""
