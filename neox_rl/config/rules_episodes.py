"""Rules on meta-RL rollouts of several episodes, and on goal finding. Each yields one message a broken value: value, rule, fix."""

from __future__ import annotations

from collections.abc import Iterator

from neox_rl.arithmetic import ARITHMETIC_TASKS
from neox_rl.config.derived import max_policy_tokens, prompt_tokens, warmstart_skipped
from neox_rl.config.machine import Machine
from neox_rl.config.run import RunConfig
from neox_rl.metacot import TAGS

MARKER_TOKENS = 2
"""``[EPISODE 2]`` in words."""
TEXT_TOKENS = 41
"""Of feedback text: ``wrong`` and an answer of 80 characters."""


def episodes_fit(config: RunConfig, machine: Machine) -> Iterator[str]:
    """What does not fit ends a rollout early, and the last episodes, of which E-RL^2 learns, would never come."""
    m, seq = config.metarl, config.neox.seq_length
    if m.rollout.method != "episodes":
        return
    written, between = max_policy_tokens(config), (m.episodes.count - 1) * _announced(config)
    prompt = (prompt_tokens(config) or 1) + (len(TAGS[0].split()) + 1 if len(m.episodes.gammas) > 1 else 0)
    if (need := prompt + written + between) > seq:
        yield (
            f"seq_length = {seq}: must hold a prompt of {prompt} tokens, {written} of the policy and {between} between"
            f" metarl.episodes.count = {m.episodes.count} episodes; set seq_length: {need}, or lower metarl.rollout.max_new_tokens,"
            " metarl.episodes.max_tokens or count"
        )
    if 0 < m.episodes.max_tokens < m.rollout.max_new_tokens:
        yield (
            f"metarl.episodes.max_tokens = {m.episodes.max_tokens}: is less than one episode of metarl.rollout.max_new_tokens ="
            f" {m.rollout.max_new_tokens}; set it to {m.rollout.max_new_tokens * m.episodes.count}, or 0"
        )


def _announced(config: RunConfig) -> int:
    """Most tokens before an episode with the symbolic tokenizer; of another, the marker alone is sure."""
    m, prompt = config.metarl, prompt_tokens(config)
    if prompt is None:
        return MARKER_TOKENS
    game = 2 + prompt if m.problems.source in ARITHMETIC_TASKS else 0
    return MARKER_TOKENS + {"none": 0, "binary": 1}.get(m.episodes.feedback, TEXT_TOKENS if game else 2) + game


def discounts_are_shares(config: RunConfig, machine: Machine) -> Iterator[str]:
    gammas = config.metarl.episodes.gammas
    if not gammas or not all(0 < gamma <= 1 for gamma in gammas) or len(set(gammas)) < len(gammas) or len(gammas) > len(TAGS):
        yield (
            f"metarl.episodes.gammas = {list(gammas)}: must be 1 to {len(TAGS)} different numbers above 0 and up to 1, one a prompt tag"
            f" ({', '.join(TAGS)}); set gammas: [1.0], or [0.99, 0.997, 1.0]"
        )


def discounts_shrink_no_cost(config: RunConfig, machine: Machine) -> Iterator[str]:
    """gamma^|Z| r with r < 0 grows with every token: padding after a mistake would pay."""
    m, r = config.metarl, config.metarl.reward
    if m.rollout.method != "episodes" or all(gamma >= 1 for gamma in m.episodes.gammas):
        return
    for name, value, earned, fix in (
        ("wrong_step_cost", r.wrong_step_cost, -r.wrong_step_cost, 0),
        ("wrong", r.wrong, r.wrong, 0),
        ("correct", r.correct, r.correct, 1),
    ):
        if earned < 0:
            yield (
                f"metarl.reward.{name} = {value:g}: a discount in metarl.episodes.gammas = {list(m.episodes.gammas)} would shrink that cost"
                f" with every further token; set {name}: {fix}, or gammas: [1.0]"
            )


def tools_can_be_called(config: RunConfig, machine: Machine) -> Iterator[str]:
    m = config.metarl
    if m.episodes.tool == "none":
        return
    if m.rollout.method != "episodes":
        yield (
            f"metarl.episodes.tool = {m.episodes.tool}: is called in episodes alone, and rollout.method is {m.rollout.method}; set method:"
            " episodes, with metarl.episodes.count: 1 where there is to be one attempt, or tool: none"
        )
    elif not m.tokenizer.path:
        yield (
            f"metarl.episodes.tool = {m.episodes.tool}: the symbolic tokenizer has no words for a call; set tool: none, or"
            " metarl.tokenizer.path"
        )


def credits_need_tokens(config: RunConfig, machine: Machine) -> Iterator[str]:
    m = config.metarl
    if m.rollout.method == "episodes" and m.objective.loss == "gspo" and m.episodes.objective != "final":
        yield (
            f"metarl.objective.loss = gspo: clips one ratio of a whole sequence, and with episodes.objective: {m.episodes.objective} each"
            " episode has an advantage of its own; set loss: tis, or episodes.objective: final"
        )


def goals_have_demonstrations(config: RunConfig, machine: Machine) -> Iterator[str]:
    w, source = config.metarl.warmstart, config.metarl.problems.source
    shown = w.steps and not warmstart_skipped(config)
    if source == "goal_finding" and shown and w.style not in ("episodes", "attempts"):
        yield f"metarl.warmstart.style = {w.style}: goal_finding has no solver, only guesses are shown; set style: episodes"
    if source == "goal_finding" and config.metarl.rollout.method == "search":
        yield "metarl.rollout.method = search: goal_finding is guessed, not searched step by step; set method: episodes or sample"
    if shown and w.style == "episodes" and config.metarl.rollout.method != "episodes" and source != "goal_finding":
        yield (
            f"metarl.warmstart.style = episodes: shows rollouts of several attempts, and rollout.method is {config.metarl.rollout.method};"
            " set style: mixed, or method: episodes"
        )


EPISODE_RULES = (
    episodes_fit,
    discounts_are_shares,
    discounts_shrink_no_cost,
    tools_can_be_called,
    credits_need_tokens,
    goals_have_demonstrations,
)
