"""The training loop: one for every engine."""
