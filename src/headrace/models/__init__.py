"""Model definitions: forward(batch) only, and the readers of their checkpoints."""
