"""Accuracy of a served model and its adapters, with lm-eval as the engine."""
