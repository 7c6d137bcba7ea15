"""Stands in for a GPT-NeoX checkout where only the names of its keys matter."""

from dataclasses import dataclass


@dataclass
class Arguments:
    """A few keys."""

    wall_clock_breakdown: bool = False
    sparse_gradients: bool = False
    fp16: dict = None
