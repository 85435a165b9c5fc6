"""Headrace: a server for mixture-of-experts language models in MXFP4, with many LoRA adapters at once."""

__version__ = "0.1.0"
