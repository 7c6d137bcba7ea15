"""What a strategy is, and the numbers that strategies have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

from neox_rl.errors import ConfigError
from neox_rl.search.growth import Distinct, Growth, Leaf


class Ask(NamedTuple):
    """Expand ``node`` with ``n`` proposed steps. ``draw`` tells asks for the same node apart: each has random numbers of its own.

    ``whole``: with ``n`` attempts instead, each as far as it goes, in one request where the proposer can. The strategy then hears of the
    last steps of those that are not at an end.
    """

    node: int
    n: int
    draw: int = 0
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Options:
    """``width``: steps proposed at a node (best-of-n: attempts). ``batch``: nodes expanded together. ``beam``: nodes kept at a level.

    ``prune``: nodes of at most this value are left; None: none is. ``step_cost``: what A* charges a step. ``exploration``: c of UCT.
    """

    width: int = 4
    batch: int = 1
    beam: int = 5
    prune: float | None = None
    step_cost: float = 0.1
    exploration: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("width", self.width), ("batch", self.batch), ("beam", self.beam)):
            if value < 1:
                raise ConfigError(f"{name} {value} must be at least 1: a search that asks for nothing finds nothing")
        for name, number in (("step_cost", self.step_cost), ("exploration", self.exploration)):
            if not 0.0 <= number < float("inf"):
                raise ConfigError(f"{name} {number} must be a finite number of at least 0")

        if self.prune is not None and not abs(self.prune) < float("inf"):
            raise ConfigError(f"prune {self.prune} must be a finite number: it is compared with values in [0, 1]")

    def hopeful(self, leaf: Leaf) -> bool:
        """Whether the search goes on below ``leaf``."""
        return not leaf.ended and (self.prune is None or leaf.hope > self.prune)


class Strategy(Protocol):
    """``distinct``: where a state may occur once only. ``reads_values``: whether it goes by the values of steps before the end of a path;
    they are not paid for else."""

    distinct: ClassVar[Distinct]
    reads_values: ClassVar[bool] = True

    def pick(self, tree: Growth) -> Sequence[Ask]:
        """The nodes of the next round, each ask once ever; none when nothing is left to try."""
        ...

    def add(self, tree: Growth, node: int, children: Sequence[int]) -> None:
        """``node`` of the last pick was expanded; its new children are scored where values are read. Called in the order of the pick."""
        ...
