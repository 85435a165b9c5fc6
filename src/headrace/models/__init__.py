"""Models: config, weights and forward(batch)."""

from headrace.models.batch import Batch, KVGroup, KVLayout
from headrace.models.loader import Model, load_model, open_model

__all__ = ["Batch", "KVGroup", "KVLayout", "Model", "load_model", "open_model"]
