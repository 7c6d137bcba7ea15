"""Where each sequence or tree goes: bins of bounded load, as many on every data-parallel rank, all padded to one length. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from neox_rl.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Layout:
    """What the ranks ask of the packing. ``min_microbatches`` is the NeoX key gradient_accumulation_steps.

    ``share_prefixes``: the sequences of a group are laid out as prefix trees (``neox_rl.batch.prefixes``).
    """

    pack_tokens: int
    data_parallel: int = 1
    tensor_parallel: int = 1
    min_microbatches: int = 1
    share_prefixes: bool = False

    @property
    def multiple(self) -> int:
        """Micro-batch lengths are multiples of this: sequence parallelism splits by TP, kernels like multiples of 8."""
        return math.lcm(8, self.tensor_parallel)


@dataclass(frozen=True, slots=True)
class Plan:
    """``bins[rank][microbatch]`` are indices of what was packed; every micro-batch is padded to ``length`` tokens, of which ``used`` are
    real over all of them."""

    bins: tuple[tuple[tuple[int, ...], ...], ...]
    length: int
    used: int


def plan(lengths: Sequence[int], layout: Layout) -> Plan:
    """Bins of at most ``pack_tokens`` tokens; the same plan for the same lengths, so that every rank can make it alone.

    Best-fit decreasing finds how few bins do; spreading over that many bins (longest first to the emptiest) then levels them,
    because the fullest one sets the padded length of all. Raises ConfigError for a sequence longer than ``pack_tokens``.
    """
    longest = max(lengths, default=0)
    if longest > layout.pack_tokens:
        raise ConfigError(
            f"a sequence of {longest} tokens does not fit in a micro-batch of pack_tokens = {layout.pack_tokens}; "
            f"raise metarl.pack_tokens to at least seq_length"
        )
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    tight = _best_fit(order, lengths, layout.pack_tokens)
    per_rank = max(math.ceil(len(tight) / layout.data_parallel), layout.min_microbatches, 1)
    count = per_rank * layout.data_parallel
    level = _spread(order, lengths, count)
    if _fullest(level, lengths) > layout.pack_tokens:
        level = tight + [[] for _ in range(count - len(tight))]
    level.sort(key=lambda members: -sum(lengths[i] for i in members))
    ranks = tuple(tuple(tuple(sorted(members)) for members in level[rank :: layout.data_parallel]) for rank in range(layout.data_parallel))
    load = max(_fullest(level, lengths), 1)
    return Plan(ranks, math.ceil(load / layout.multiple) * layout.multiple, sum(lengths))


def _best_fit(order: Sequence[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    free: list[int] = []
    for i in order:
        fitting = [b for b, room in enumerate(free) if room >= lengths[i]]
        if not fitting:
            bins.append([])
            free.append(capacity)
            fitting = [len(bins) - 1]
        best = min(fitting, key=lambda b: free[b])
        bins[best].append(i)
        free[best] -= lengths[i]
    return bins


def _spread(order: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    bins: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for i in order:
        emptiest = min(range(count), key=lambda b: loads[b])
        bins[emptiest].append(i)
        loads[emptiest] += lengths[i]
    return bins


def _fullest(bins: Sequence[Sequence[int]], lengths: Sequence[int]) -> int:
    return max((sum(lengths[i] for i in members) for members in bins), default=0)
