"""The kernel library: one file per op, with its plain-torch reference."""
