"""What a run says of itself, as a scenario: lengths, step times, server speed, switches, evaluations; and what the run then achieved.

A server's speed is fitted to the spans of its groups. Where the longest rollout has L tokens, beside n running sequences on average and p
arriving requests, a group took d = latency + L * (base + seq * n) + prefill * p. Of a group that a switch cut, each side is a row of its
own, the later one with recompute * (sequences running at the switch) in place of the latency.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from neox_rl.config.load import load_resolved
from neox_rl.config.placement import num_servers
from neox_rl.errors import ConfigError
from neox_rl.queue.sim.scenario import Decoding, Evaluations, Publishing, Recorded, Scenario, StepTimes
from neox_rl.telemetry.events import Event, parts_of
from neox_rl.telemetry.rundata import RunData, load_run

Floats = NDArray[np.float64]
NS = 1e9
NS_TICK = 1e-6
MIN_STEPS = 500
"""Simulated at least: a short run is one draw of luck, a prediction is of the mean."""
FIT_ROUNDS = 5
TOGETHER_S = 0.02
"""Requests sent within this time reach the server as one crowd."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What a run achieved, or is predicted to: shares in [0, 1], staleness in steps of the tokens with gradient."""

    idle_frac: float
    busy_frac: float
    staleness: float
    masked_frac: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Measured:
    """A run's scenario, its rule, and what it achieved."""

    scenario: Scenario
    admission_slack: int
    delivery_slack: int
    mode: str
    group_s: float
    """Mean time of a group from admission to delivery."""
    rates: Rates


def measure(run_dir: Path) -> Measured:
    """Raises ConfigError for a run whose events cannot say this: too short, without RL steps, or resumed."""
    run = load_run(run_dir)
    if len(parts := parts_of(run.events)) > 1:
        raise ConfigError(f"{run_dir} was started again {len(parts) - 1} times: measure one that was not, or speeds and waits are of both")
    config = load_resolved(run.paths.config)
    groups = [e for e in run.events if e.name == "generate" and e.fields.get("longest")]
    waits = [e for e in run.events if e.name == "wait_batch" and e.fields.get("phase") == "rl"]
    if len(waits) < 10 or len(groups) < 20:
        raise ConfigError(f"{run_dir} has {len(waits)} RL steps and {len(groups)} groups in its events: 10 and 20 are needed to measure")
    servers = max(1, num_servers(config))
    rl, running = config.metarl, running_of(groups)
    wait_s = np.array([e.dur_ns for e in waits[1:]]) / NS
    busy = np.array([b.t_ns - a.end_ns for a, b in pairwise(waits)]) / NS
    scenario = Scenario(
        num_steps=max(MIN_STEPS, config.neox.train_iters),
        groups_per_step=rl.rollout.groups_per_step,
        group_size=rl.rollout.group_size,
        num_servers=servers,
        max_inflight_groups=rl.rollout.max_inflight_groups,
        lengths=Recorded([e.fields["lengths"] for e in groups]),
        decoding=_decoding(run, groups, running, servers, rl.servers.max_num_seqs),
        step=StepTimes(measured=tuple(busy.tolist())),
        delivery_s=_delivery_s(run, waits),
        publishing=publishing_of(run.events, running, servers, rl.weights.publish_every),
        evaluations=_evaluations(run, rl.evaluation.every_steps),
        seed=rl.seed,
    )
    achieved = _rates(run, waits, groups, float(wait_s.sum()))
    group_s = float(np.mean([e.dur_ns for e in groups])) / NS
    return Measured(scenario, rl.staleness.admission_slack, rl.staleness.delivery_slack, rl.staleness.mode, group_s, achieved)


def _rates(run: RunData, waits: Sequence[Event], groups: Sequence[Event], wait_s: float) -> Rates:
    """From the first batch to the end of the last step."""
    steps = [e for e in run.events if e.name == "train_step" and e.fields.get("phase") == "rl"]
    start, end = waits[0].end_ns / NS, steps[-1].end_ns / NS
    ages: dict[int, int] = {}
    for row in run.rl:
        for age, tokens in row["staleness_hist"].items():
            ages[int(age)] = ages.get(int(age), 0) + tokens
    masked = sum(row["tokens_masked_stale"] for row in run.rl)
    trained = sum(row["tokens_trained"] for row in run.rl)
    staleness = sum(row["staleness_mean"] * row["tokens_trained"] for row in run.rl) / max(1, trained)
    in_flight = _Steps(np.array([e.t_ns for e in groups]) / NS, np.array([e.end_ns for e in groups]) / NS)
    any_level = (np.arange(in_flight.most + 1) > 0).astype(np.float64)
    busy = in_flight.integral(np.array([start]), np.array([end]), any_level)[0] / (end - start)
    return Rates(wait_s / (end - start), float(busy), staleness, masked / max(1, masked + trained), (masked + trained) / (end - start))


def _delivery_s(run: RunData, waits: Sequence[Event]) -> float:
    """From a batch complete in the orchestrator to the trainer holding it."""
    sent = {e.fields["step"]: e.t_ns for e in run.events if e.name == "delivered"}
    return float(np.median([e.end_ns - sent[step] for e in waits if (step := e.fields["step"]) in sent])) / NS


def _pauses(events: Sequence[Event]) -> dict[int, list[Event]]:
    """By version, the pause of each server that switched to it before it, or a newer one, was live: a later switch held nobody up."""
    live = [e for e in events if e.name == "live"]
    versions = [e.fields["version"] for e in live]
    pauses: dict[int, list[Event]] = {}
    for event in events:
        if event.name == "paused":
            after = bisect_left(versions, event.fields["version"])
            if after == len(live) or event.t_ns <= live[after].t_ns:
                pauses.setdefault(event.fields["version"], []).append(event)
    return pauses


def publishing_of(events: Sequence[Event], running: _Steps, servers: int, every: int) -> Publishing:
    """Each part of a switch, fitted to what ran at its begin; the first version has no step before it.

    A version that finds the one before it not yet live waits for that: what its staging takes is counted from there.
    """
    ended = {e.fields["step"]: e.end_ns for e in events if e.name == "train_step" and e.fields.get("phase") == "rl"}
    live = np.sort([e.t_ns for e in events if e.name == "live"])
    pauses = {version: found for version, found in _pauses(events).items() if version in ended}
    if not pauses:
        raise ConfigError("the run has no switch of a server to a version that a step made: nothing says what publishing takes")
    stages, attests = [], []
    for version, found in pauses.items():
        begun, done = min(e.t_ns for e in found), max(e.end_ns for e in found)
        before, after = np.searchsorted(live, begun, side="right"), np.searchsorted(live, done)
        stages.append((max(ended[version], live[before - 1]) if before else ended[version], begun))
        attests += [(done, live[after])] if after < len(live) else []

    def parts(spans: Sequence[tuple[int, int]]) -> tuple[float, ...]:
        starts, ends = np.array(spans, dtype=np.float64).reshape(-1, 2).T / NS
        return non_negative_fit(np.stack([np.ones_like(starts), running.at(starts - NS_TICK) / servers], axis=1), ends - starts)

    fits = parts(stages), parts([(e.t_ns, e.end_ns) for found in pauses.values() for e in found]), parts(attests)
    (stage_s, stage_seq_s), (pause_s, pause_seq_s), (attest_s, attest_seq_s) = fits
    return Publishing(every, stage_s, pause_s, attest_s, stage_seq_s, pause_seq_s, attest_seq_s)


def running_of(groups: Sequence[Event]) -> _Steps:
    """Sequences running on all servers. A rollout of l tokens in a group whose longest has L runs for l / L of the group's span, as far as
    anyone can tell."""
    lengths = [np.array(e.fields["lengths"], dtype=np.float64) for e in groups]
    stops = np.concatenate([(e.t_ns + e.dur_ns * n / n.max()) / NS for e, n in zip(groups, lengths, strict=True)])
    return _Steps(np.repeat([e.t_ns / NS for e in groups], [len(n) for n in lengths]), stops)


def _evaluations(run: RunData, every: int) -> Evaluations:
    rows = [row for row in run.evaluations if str(row["label"]).startswith("step ")]
    return Evaluations(every, [max(1, int(attempt[3])) for attempt in rows[-1]["per_problem"]]) if every and rows else Evaluations()


def _decoding(run: RunData, groups: Sequence[Event], running: _Steps, servers: int, max_num_seqs: int) -> Decoding:
    """One row of the fit for each stretch of a group's longest rollout between two switches: the versions say how far it had come."""
    switches = {v: (min(e.t_ns for e in pauses) / NS, max(e.end_ns for e in pauses) / NS) for v, pauses in _pauses(run.events).items()}
    rows = np.array([row for group in groups for row in _stretches(group, switches)])
    starts, ends, tokens, first = rows.T
    sent = np.sort([e.t_ns / NS for e in groups])
    prefilled = (np.searchsorted(sent, ends) - np.searchsorted(sent, starts - first * TOGETHER_S)) / servers
    before, after = (np.sort([edge[side] for edge in switches.values()]) for side in (0, 1))
    last = np.maximum(0, np.searchsorted(after, starts, side="right") - 1)
    fresh = starts - after[last] < TOGETHER_S  # the switch was just before: what ran then is computed again, and all wait for it
    recomputed = fresh * running.at(before[last] - NS_TICK) / servers
    evaluated = np.array([[row["time"] - row["seconds"], row["time"]] for row in run.evaluations]).reshape(-1, 2)
    alone = _Steps(evaluated[:, 0], evaluated[:, 1]).integral(starts, ends) == 0
    fit = Decoding(1.0, 0.0, max_num_seqs=max_num_seqs)
    for _ in range(FIT_ROUNDS):
        # The mean over decode steps, not over time: crowded steps are long, and few.
        speed = np.array([1 / max(1e-6, fit.step_s(n)) for n in range(running.most + 1)])
        weight = running.integral(starts, ends, speed)
        beside = running.integral(starts, ends, speed * np.arange(len(speed))) / np.maximum(weight, 1e-9) / servers
        columns = np.stack([first, tokens, tokens * np.minimum(beside, max_num_seqs), prefilled, recomputed], axis=1)
        latency, base, seq, prefill, recompute = non_negative_fit(columns[alone], (ends - starts)[alone])
        fit = Decoding(base, seq, latency, prefill, recompute, max_num_seqs)
    return fit


def _stretches(group: Event, switches: Mapping[int, tuple[float, float]]) -> Iterator[tuple[float, float, float, float]]:
    """(start, end, tokens, 1 for the first else 0) of what each version sampled of the longest rollout, without the pauses between."""
    merged = groupby(group.fields["longest"], key=lambda span: span[0])
    spans = [(version, sum(tokens for _, tokens in parts)) for version, parts in merged]
    start = group.t_ns / NS
    for i, (_, tokens) in enumerate(spans):
        last = i == len(spans) - 1
        if not last and spans[i + 1][0] not in switches:
            return  # a server that was started again, or late: what went on there began elsewhere
        pause = (group.end_ns / NS, 0.0) if last else switches[spans[i + 1][0]]
        if pause[0] > start:
            yield start, pause[0], float(tokens), float(i == 0)
        start = pause[1]


class _Steps:
    """How many intervals are open, as a function of time."""

    def __init__(self, starts: Floats, ends: Floats) -> None:
        times = np.concatenate([starts, ends])
        order = np.argsort(times, kind="stable")
        changes = np.concatenate([np.ones_like(starts), -np.ones_like(ends)])[order]
        self._times = np.concatenate([[0.0], times[order]])
        self._levels = np.concatenate([[0], np.cumsum(changes)]).astype(np.int64)
        self.most = int(self._levels.max(initial=0))

    def at(self, times: Floats) -> NDArray[np.int64]:
        """The level at each time."""
        return np.asarray(self._levels[np.searchsorted(self._times, times, side="right") - 1])

    def integral(self, starts: Floats, ends: Floats, of_level: Floats | None = None) -> Floats:
        """From each start to its end, of the level or of ``of_level[level]``."""
        values = self._levels if of_level is None else of_level[np.maximum(self._levels, 0)]
        sums = np.concatenate([[0.0], np.cumsum(values[:-1] * np.diff(self._times))])
        return np.asarray(np.interp(ends, self._times, sums) - np.interp(starts, self._times, sums))


def non_negative_fit(columns: Floats, values: Floats) -> tuple[float, ...]:
    """Least squares with coefficients >= 0: the best among the fits to every subset of the columns that has none below 0."""
    count = columns.shape[1]
    best, best_error = np.zeros(count), float(values @ values)
    for size in range(1, count + 1):
        for subset in combinations(range(count), size):
            found = np.linalg.lstsq(columns[:, subset], values, rcond=None)[0]
            error = float(np.sum((columns[:, subset] @ found - values) ** 2))
            if (found >= 0).all() and error < best_error:
                best, best_error = np.zeros(count), error
                best[list(subset)] = found
    return tuple(float(x) for x in best)
