"""The engine: scheduler, paged KV cache, sampler, and the process they run in."""
