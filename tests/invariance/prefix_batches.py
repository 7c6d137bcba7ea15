"""Groups whose traces share prefixes, laid out trace by trace or as prefix trees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from neox_rl.batch.pack import pack_rl
from neox_rl.batch.packing import Layout
from neox_rl.batch.types import StepBatch
from neox_rl.config.schema import ObjectiveConfig, StalenessConfig
from neox_rl.types import NO_VERSION, Finish, Group, Reason, Role, Segment, Trace, Verdict
from tests.invariance.engine_batches import VOCAB

STEP, TEMPERATURE = 5, 0.7
OBJECTIVES = {
    "ppo": ObjectiveConfig(loss="ppo", clip_low=0.05, clip_high=0.1, kl_coef=0.1, kl_estimator="k2", entropy_coef=0.05),
    "gspo": ObjectiveConfig(loss="gspo", clip_low=0.05, clip_high=0.1, aggregation="sequence_mean"),
    "dpo": ObjectiveConfig(loss="dpo", beta=0.5, aggregation="sequence_mean"),
}
SHAPES = ((6, 8, 2), (20, 4, 2), (2, 16, 3), (9, 5, 1))
"""Of each group's tree: tokens of the prompt, tokens of a step, steps below a node (two levels of them)."""


def groups() -> list[Group]:
    """Trees with long and with short prefixes, so that every kind of attention block occurs; some paths end at an inner node."""
    rng = np.random.default_rng(3)

    def step(size: int) -> Segment:
        ids = tuple(int(i) for i in rng.integers(1, VOCAB, size))
        logprobs = tuple(float(x) for x in rng.normal(-math.log(VOCAB), 0.5, size))
        return Segment(ids, Role.THINK, logprobs, int(rng.integers(1, STEP)), 1.0, 0, None if rng.random() < 0.5 else float(rng.normal()))

    found = []
    for ticket, (prompt_size, size, width) in enumerate(SHAPES):
        prompt = Segment(tuple(int(i) for i in rng.integers(1, VOCAB, prompt_size)), Role.PROMPT)
        paths: list[tuple[Segment, ...]] = []
        for _ in range(width):
            first = (prompt, step(size), Segment((1, 2), Role.ENV))
            paths += [first, *((*first, step(size)) for _ in range(width))]
        traces = (Trace(f"g{ticket:06d}/r{i}", "p", path, float(rng.random()), Finish.STOP, VERDICT) for i, path in enumerate(paths))
        found.append(Group(ticket, "p", tuple(traces)))
    return found


def pairs() -> list[Group]:
    """Of each of the groups' paths, one that ends in another step of its own length or shorter: better and worse in turn."""
    found = []
    for group in groups():
        paired = list[Trace]()
        for trace in group.traces:
            *context, step = (replace(s, logprobs=(), version=NO_VERSION, mask=0.0, advantage=None) for s in trace.segments)
            step = next(s for s in reversed(trace.segments) if s.mask)
            context = context[: trace.segments.index(step)]
            size = max(1, len(step.ids) - 1)
            rival = replace(step, ids=tuple(VOCAB - i for i in step.ids[:size]), logprobs=step.logprobs[:size])
            paired += [replace(trace, segments=(*context, replace(s, advantage=a))) for s, a in ((step, 0.5), (rival, -0.5))]
        found.append(replace(group, traces=tuple(replace(t, id=f"g{group.ticket:06d}/r{i}") for i, t in enumerate(paired))))
    return found


VERDICT = Verdict(True, "", Reason.MATCH, 0.1)


def batch(objective: str, share: bool, layout: Layout, chosen: Sequence[int] = range(len(SHAPES))) -> StepBatch:
    """Of the ``chosen`` groups."""
    layout = Layout(layout.pack_tokens, layout.data_parallel, layout.tensor_parallel, layout.min_microbatches, share)
    staleness = StalenessConfig(admission_slack=1, delivery_slack=1)
    found = [group for group in (pairs() if objective == "dpo" else groups()) if group.ticket in chosen]
    return pack_rl(found, STEP, staleness=staleness, objective=OBJECTIVES[objective], max_new_tokens=64, layout=layout)
