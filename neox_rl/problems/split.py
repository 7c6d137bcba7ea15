"""Train and held-out problems, parted by cluster so that no multiset of numbers is on both sides."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from neox_rl.errors import ConfigError
from neox_rl.types import Problem


@dataclass(frozen=True, slots=True)
class ProblemSet:
    """Problems to train on and problems to measure on. ``counts`` is what the source has to report: rows, duplicates and the like.

    ``heldout_ordered``: the first n of ``heldout`` are a fair sample as they stand, and a shuffle would undo it.
    """

    train: tuple[Problem, ...]
    heldout: tuple[Problem, ...]
    counts: dict[str, int] = field(default_factory=dict)
    heldout_ordered: bool = False


def split_by_cluster(problems: Sequence[Problem], heldout_frac: float, seed: int) -> ProblemSet:
    """A seeded share of the clusters, rounded, is held out; at least one stays on each side when the share is above 0.

    Raises ConfigError when no training problem would be left.
    """
    clusters = sorted({p.cluster for p in problems})
    random.Random(f"split/{seed}").shuffle(clusters)
    count = max(1, round(heldout_frac * len(clusters))) if heldout_frac > 0 else 0
    if count >= len(clusters):
        raise ConfigError(
            f"{len(problems)} problems in {len(clusters)} clusters leave nothing to train on with heldout_frac {heldout_frac}: "
            "use more problems (num_numbers, max_number, max_target) or a smaller heldout_frac"
        )
    held = frozenset(clusters[:count])
    train = tuple(p for p in problems if p.cluster not in held)
    heldout = tuple(p for p in problems if p.cluster in held)
    return ProblemSet(train, heldout, {"train_clusters": len(clusters) - count, "heldout_clusters": count})
