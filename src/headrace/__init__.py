"""Headrace: a server for mixture-of-experts language models in MXFP4."""

__version__ = "0.1.0"
