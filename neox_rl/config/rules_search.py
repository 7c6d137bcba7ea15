"""Rules on rollouts made by search. Each yields one message a broken value: value, rule, fix."""

from __future__ import annotations

from collections.abc import Iterator

from neox_rl.arithmetic import ARITHMETIC_TASKS
from neox_rl.config.derived import prompt_tokens
from neox_rl.config.machine import Machine
from neox_rl.config.run import RunConfig
from neox_rl.config.schema import IMITATION, PREFERENCE, RewardConfig


def objective_suits_what_is_trained(config: RunConfig, machine: Machine) -> Iterator[str]:
    """Steps have behavior log-probs and credit of their own; a told search has neither, and only a right one may be imitated."""
    loss, method, trains = config.metarl.objective.loss, config.metarl.rollout.method, config.metarl.search.trains
    told = method == "search" and trains == "traces"
    if told and loss != IMITATION:
        yield (
            f"metarl.objective.loss = {loss}: needs the log-probs of the policy that sampled the text, and a told search (search.trains:"
            f" traces) was sampled in another order; set loss: {IMITATION}, or search.trains: steps"
        )
    if loss == IMITATION and not told:
        yield (
            f"metarl.objective.loss = {IMITATION}: imitates what it is given, wrong attempts too; set loss: tis, or rollout.method: search"
            " with search.trains: traces, which gives only searches that came to a right end"
        )
    if method == "search" and trains == "steps" and loss == "gspo":
        yield (
            "metarl.objective.loss = gspo: clips one ratio of a whole sequence, and with search.trains: steps each step has an advantage"
            " of its own; set loss: tis"
        )
    paired = method == "search" and trains == "preferences"
    if paired and loss != PREFERENCE:
        yield (
            f"metarl.objective.loss = {loss}: knows no pairs, and search.trains is preferences; set loss: {PREFERENCE}, or search.trains:"
            " steps"
        )
    if loss == PREFERENCE and not paired:
        yield (
            f"metarl.objective.loss = {PREFERENCE}: needs pairs of a better and a worse step; set rollout.method: search with"
            " search.trains: preferences, or loss: tis"
        )


def pairs_are_whole(config: RunConfig, machine: Machine) -> Iterator[str]:
    """A pair has one loss: both of its steps stand in one micro-batch, have a gradient or none together, and count as one."""
    m, seq = config.metarl, config.neox.seq_length
    if m.objective.loss != PREFERENCE:
        return
    if m.objective.aggregation != "sequence_mean":
        yield (
            f"metarl.objective.aggregation = {m.objective.aggregation}: would weigh a pair by the length of its steps; set aggregation:"
            " sequence_mean, the mean over pairs"
        )
    if m.staleness.stale_tokens != "mask":
        yield (
            f"metarl.staleness.stale_tokens = {m.staleness.stale_tokens}: {PREFERENCE} has no importance ratio to truncate; set"
            " stale_tokens: mask"
        )
    if m.pack_tokens < 2 * seq:
        yield (
            f"metarl.pack_tokens = {m.pack_tokens}: must hold the two sequences of a pair, of seq_length = {seq} each; set pack_tokens:"
            f" {2 * seq} or more"
        )
    if m.search.width < 2:
        yield f"metarl.search.width = {m.search.width}: makes no pair, since each place has one step; set width: 4"


def steps_are_weighed_alike(config: RunConfig, machine: Machine) -> Iterator[str]:
    """A step stands in the first path that holds it: as a share of that sequence it would weigh by what else stands there."""
    m = config.metarl
    if m.rollout.method == "search" and m.search.trains == "steps" and m.objective.aggregation == "sequence_mean":
        yield (
            "metarl.objective.aggregation = sequence_mean: with search.trains: steps a step would weigh less the more steps are new in the"
            " path that holds it; set aggregation: token_mean"
        )


def searches_have_room(config: RunConfig, machine: Machine) -> Iterator[str]:
    search, seq, prompt = config.metarl.search, config.neox.seq_length, prompt_tokens(config) or 1
    if config.metarl.rollout.method != "search":
        return
    if prompt + search.max_step_tokens > seq:
        yield (
            f"metarl.search.max_step_tokens = {search.max_step_tokens}: a prompt and one step must fit in seq_length = {seq}; set"
            f" max_step_tokens: {max(1, seq - prompt)}"
        )
    if 0 < search.tokens < search.max_step_tokens:
        yield (
            f"metarl.search.tokens = {search.tokens}: does not pay for one step of max_step_tokens = {search.max_step_tokens}; set tokens:"
            f" {search.width * search.max_step_tokens} or more, or 0"
        )


def values_know_the_problems(config: RunConfig, machine: Machine) -> Iterator[str]:
    search, source = config.metarl.search, config.metarl.problems.source
    if config.metarl.rollout.method != "search":
        return
    if search.value in ("oracle", "heuristic") and source not in ARITHMETIC_TASKS:
        yield f"metarl.search.value = {search.value}: knows arithmetic problems only, and source is {source}; set value: monte-carlo"
    if search.value == "none" and search.trains != "traces":
        yield (
            f"metarl.search.value = none: no step has a value but the one that ends an answer, and search.trains: {search.trains} trains"
            " steps by their values; set value: monte-carlo"
        )


def reward_model_is_served(config: RunConfig, machine: Machine) -> Iterator[str]:
    search = config.metarl.search
    if search.value != "prm" or config.metarl.rollout.method != "search":
        return
    for name in ("prm_server", "prm_model"):
        if not getattr(search, name):
            yield f"metarl.search.{name} is empty: value prm asks a reward model that you serve; set {name}, or value: monte-carlo"


def searches_earn_no_reward(config: RunConfig, machine: Machine) -> Iterator[str]:
    m, r = config.metarl, config.metarl.reward
    names = ("correct", "wrong", "wrong_step_cost", "token_cost")
    unused = [f"{name} = {getattr(r, name):g}" for name in names if getattr(r, name) != getattr(RewardConfig, name)]
    if m.rollout.method == "search" and unused:
        trained = {
            "steps": "steps are trained by their values",
            "preferences": "steps are compared by their values",
            "traces": "every search with a right end is imitated alike",
        }[m.search.trains]
        yield (
            f"metarl.reward.{', '.join(unused)}: nothing is trained on it with search.trains: {m.search.trains}, where {trained}; it is"
            " shown in the metrics alone"
        )


def told_steps_are_whole(config: RunConfig, machine: Machine) -> Iterator[str]:
    """A line that was cut is told as two, and its pieces would be imitated as lines."""
    search = config.metarl.search
    if config.metarl.rollout.method == "search" and search.trains == "traces" and search.cut_steps:
        yield (
            f"metarl.search.cut_steps = true: ends a step in the midst of a line after max_step_tokens = {search.max_step_tokens}, and"
            " search.trains: traces imitates steps as whole lines; set cut_steps: false and a larger max_step_tokens, or trains: steps"
        )


SEARCH_RULES = (
    objective_suits_what_is_trained,
    pairs_are_whole,
    steps_are_weighed_alike,
    searches_have_room,
    values_know_the_problems,
    reward_model_is_served,
    told_steps_are_whole,
)
SEARCH_WARNINGS = (searches_earn_no_reward,)
