"""Predicts what a cluster would do, and searches for the smallest one that keeps the trainer fed.

A large cluster is simulated as a smaller one of the same proportions: servers, groups a step and evaluations are divided by one number.
Every server decodes as before, so means are kept, as long as the batch still holds the tail of the lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile

import numpy as np

from neox_rl.errors import ConfigError
from neox_rl.queue.sim.books import Outcome
from neox_rl.queue.sim.cluster import Cluster
from neox_rl.queue.sim.faults import FaultyCluster
from neox_rl.queue.sim.measured import Measured, Rates
from neox_rl.queue.sim.scenario import Faults, Scenario, StepTimes
from neox_rl.queue.state import Mode, TicketQueue

MAX_SERVERS = 64
"""Servers that are simulated one by one; of more, a part."""
CALIBRATION_ROUNDS = 4
MIN_GROUPS = 256
"""Groups a step that a thinned cluster keeps at least: the longest of a smaller batch is shorter (at 128: 4 % more tokens/s)."""


@dataclass(frozen=True, slots=True)
class Rule:
    """The staleness rule of a run."""

    admission_slack: int = 1
    delivery_slack: int = 1
    mode: str = Mode.TOKEN

    @property
    def bound(self) -> int:
        return self.admission_slack + self.delivery_slack


def thinned(scenario: Scenario, max_servers: int = MAX_SERVERS) -> Scenario:
    """The scenario in small, or itself where it is small. Step times stay: they are the whole trainer's, and so are its rollbacks."""
    by = min(-(-scenario.num_servers // max_servers), scenario.groups_per_step // MIN_GROUPS)
    if by <= 1:
        return scenario
    faults = scenario.faults
    means = {name: getattr(faults, name) * by for name in ("server_crash_s", "join_s", "leave_s")}
    return replace(
        scenario,
        num_servers=max(1, round(scenario.num_servers / by)),
        groups_per_step=max(1, round(scenario.groups_per_step / by)),
        max_inflight_groups=-(-scenario.max_inflight_groups // by),
        step=replace(scenario.step, token_s=scenario.step.token_s * by),
        evaluations=replace(scenario.evaluations, lengths=scenario.evaluations.lengths[::by]),
        faults=replace(faults, **means),
    )


def predict(scenario: Scenario, rule: Rule, max_servers: int = MAX_SERVERS) -> tuple[Outcome, Rates]:
    """The outcome of the simulated part of the cluster, and the rates of the whole."""
    small = thinned(scenario, max_servers)
    queue = partial(TicketQueue, small.groups_per_step, rule.admission_slack, rule.delivery_slack, rule.mode, small.num_steps)
    masks = rule.mode == Mode.TOKEN
    outcome = (Cluster if small.faults == Faults() else FaultyCluster)(small, queue, masks).run()
    tokens_per_s = outcome.tokens_per_s * scenario.groups_per_step / small.groups_per_step
    return outcome, Rates(outcome.idle_frac, outcome.busy_frac, outcome.mean_staleness, outcome.masked_frac, tokens_per_s)


def calibrated(measured: Measured) -> Scenario:
    """The run's scenario, its servers' times scaled by one factor until a simulated group takes as long as the run's did on average.

    The fit explains single groups; what it leaves over adds up where each group waits for the one before it.
    """
    scenario = measured.scenario
    rule = Rule(measured.admission_slack, measured.delivery_slack, measured.mode)
    for _ in range(CALIBRATION_ROUNDS):
        factor = measured.group_s / predict(scenario, rule)[0].group_s
        d = scenario.decoding
        times = {name: factor * getattr(d, name) for name in ("base_s", "seq_s", "latency_s", "prefill_s", "recompute_s")}
        scenario = replace(scenario, decoding=replace(d, **times))
    return scenario


def demand(scenario: Scenario) -> float:
    """Servers that would keep the trainer busy if each always decoded as many sequences as fit: no plan can do with fewer."""
    tokens = _mean_tokens(scenario)
    step_s = sum(scenario.step.measured) / len(scenario.step.measured) if scenario.step.measured else _step_s(scenario.step, tokens)
    n = min(scenario.decoding.max_num_seqs, scenario.groups_per_step * scenario.group_size)
    return tokens / step_s / scenario.decoding.tokens_per_s(n)


def _step_s(step: StepTimes, tokens: float) -> float:
    return step.base_s + step.token_s * tokens


def _mean_tokens(scenario: Scenario) -> float:
    """Of a step's batch, by a sample of the law of lengths."""
    rng = np.random.default_rng(scenario.seed)
    sample = [scenario.lengths.group(scenario.group_size, rng).sum() for _ in range(512)]
    return float(np.mean(sample)) * scenario.groups_per_step


def fewest_servers(scenario: Scenario, rule: Rule, idle_frac: float, limit: int, max_servers: int = MAX_SERVERS) -> int | None:
    """The smallest number of servers, to 2 %, with the trainer idle at most ``idle_frac``; None if ``limit`` are not enough, or a server
    for every two sequences that may be in flight: then it is the bound, or the longest rollouts, that keep the trainer waiting."""

    def enough(servers: int) -> bool:
        return predict(replace(scenario, num_servers=servers), rule, max_servers)[1].idle_frac <= idle_frac

    in_flight = (rule.admission_slack + 1) * scenario.groups_per_step * scenario.group_size
    limit = min(limit, max(1, in_flight // 2))
    return _smallest(enough, max(1, int(0.9 * demand(scenario))), limit) if enough(limit) else None


def smallest_bound(scenario: Scenario, rule: Rule, idle_frac: float, limit: int, max_servers: int = MAX_SERVERS) -> int | None:
    """The smallest S with the trainer idle at most ``idle_frac``, the delivery slack as it is; None if S = ``limit`` is not enough."""
    slacks = range(limit - rule.delivery_slack + 1)
    failed = takewhile(lambda eta: predict(scenario, replace(rule, admission_slack=eta), max_servers)[1].idle_frac > idle_frac, slacks)
    found = sum(1 for _ in failed)
    return found + rule.delivery_slack if found < len(slacks) else None


def _smallest(enough: Callable[[int], bool], start: int, limit: int) -> int | None:
    """Doubles until enough, then halves the interval."""
    if limit < 1:
        raise ConfigError(f"the limit of the search is {limit}: it must be at least 1")
    low, high = 0, min(start, limit)
    while not enough(high):
        if high >= limit:
            return None
        low, high = high, min(2 * high, limit)
    while high - low > max(1, high // 50):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
