"""The rows of ``metrics.jsonl``, ``evaluations.jsonl`` and ``rollouts.jsonl``.

Times are unix seconds, durations seconds, ``_frac`` in [0, 1]. "Cumulative" counts from the start of the run, resumes included.
A key that a phase cannot fill is left out: a warm start has no staleness.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NotRequired, Required, TypedDict


class MetricsRow(TypedDict, total=False):
    """One optimizer step. What is worth expecting: ``ratio_mean`` 1, ``mismatch_kl`` 0 (below 1e-5 in fp32), ``ess`` near 1."""

    phase: Required[str]
    """"sft" for the warm start, "rl" after it; steps count from 1 in each."""
    step: Required[int]
    version: Required[int]
    """Policy version that was trained; the step makes version + 1."""
    time: Required[float]
    """When the step ended."""
    loss: float
    grad_norm: float
    loss_scale: float
    overflows: int
    """In fp16: the scale that the next step begins with, and the tries of this one that were given up. ``step_s`` holds them all."""
    lr: float
    reward_mean: float
    reward_std: float
    accuracy: float
    """Share of the step's rollouts with a correct verdict; absent where their reward is the likelihood of a given solution, in nats. Where
    the steps of searches are trained, this, rewards, verdicts and lengths are absent: a trace is no rollout there. See ``searched``."""
    verdicts: dict[str, int]
    """The step's rollouts by what the verifier found: match, mismatch, no_answer, timeout, error; unverified where
    nobody asked it."""
    entropy: float
    """Nats a token."""
    length_mean: float
    length_max: int
    """Sampled tokens of a rollout."""
    truncated_frac: float
    """Rollouts that ran into the token budget."""
    tokens_trained: int
    """Tokens with gradient in this step."""
    tokens_masked_stale: int
    """Sampled tokens of this step without gradient because they were older than the bound."""
    tokens_generated: int
    """Cumulative."""
    staleness_mean: float
    staleness_max: int
    """Over the tokens with gradient."""
    staleness_hist: dict[str, int]
    """Staleness in optimizer steps (as text, a JSON key) to the number of sampled tokens, masked ones included."""
    staleness_bound: int
    """S = admission slack + delivery slack."""
    mismatch_kl: float
    """Trainer against engine over tokens sampled at the trained version: numerics, not staleness."""
    ratio_mean: float
    """Importance ratio, current over behavior."""
    ess: float
    """Effective sample size of the ratios as a share of the tokens."""
    clip_frac: float
    ratio_truncated_frac: float
    """Tokens whose ratio was truncated at its cap; ``truncated_frac`` is of rollouts."""
    pairs: float
    """Pairs of steps with gradient, where preferences are trained."""
    preferred_frac: float
    preferred_margin: float
    """Pairs whose better step the policy has raised above the worse one, against the policy that RL began with; by how much, in nats times
    beta."""
    wait_s: float
    """Waiting for the batch."""
    step_s: float
    """Forward, backward, optimizer."""
    step_cpu_s: float
    """CPU seconds of rank 0 meanwhile, all of its threads: on a machine that others use too, what the step cost."""
    publish_s: float
    queue_ready: int
    queue_inflight: int
    """Groups."""
    pack_efficiency: float
    """Real tokens over token places in the packed micro-batches."""
    rollouts_generated: int
    """Cumulative, refused ones included."""
    rollouts_refused: int
    """Cumulative: by dynamic sampling, as it is meant to."""
    rollouts_dropped: int
    """Cumulative: rollouts that were accepted and then neither trained nor waiting. Not 0 means that the queue's books are wrong."""
    rollouts_trained_twice: int
    """Cumulative: tickets consumed more than once. The run stops at the first."""
    search: dict[str, float]
    """Search quality of the step's rollouts; the keys are those of ``SEARCH_METRICS``."""
    tool_calls_mean: float
    """Calls of the tool in a rollout of the step, answered in whatever way, where episodes have a tool."""
    searched: dict[str, float]
    """Where rollouts are made by search: ``solved_frac`` of the problems, ``failed_frac`` of them with a search that lost its server and
    broke off, ``steps`` that the trees hold, ``traces`` made of them, and the tokens that were generated for them (``tokens_paid``) and
    that have a loss (``tokens_trained``, before masking for staleness). ``prefix_cache_hit_rate``: prompt tokens that the vLLM servers
    found in their caches over those that they looked up, since the orchestrator first looked at each; left out until it is known."""


class IntervalRow(TypedDict):
    mean: float
    ci95_low: float
    ci95_high: float
    n: int


class TagRow(TypedDict):
    """What held-out rollouts came to whose prompts have one tag."""

    accuracy: IntervalRow
    tokens: IntervalRow
    """That the policy wrote in a rollout."""


class EpisodeRow(TypedDict, total=False):
    """What rollouts of several episodes found; entry k - 1 speaks of episode k."""

    found_by: list[IntervalRow]
    """Share of the rollouts that were right in one of the episodes 1 to k."""
    right_in: list[IntervalRow]
    """Share that was right in episode k itself; one that ended before counts as wrong."""
    solved_in: str
    """In which episode a rollout must be right to count as right in ``accuracy``: "the last episode", "the first episode", "one of the
    episodes". The last is the last that it had. Left out where a rollout has one at most."""
    by_tag: dict[str, TagRow]
    """Of a full evaluation of several discounts (``episodes.gammas``): each prompt tag, from the smallest discount to the largest, of which
    everything else in the row is."""


class EvaluationRow(EpisodeRow, total=False):
    """One evaluation in one sampling mode."""

    label: Required[str]
    """"warmstart" before RL, "step 50" during it, "final" after it."""
    step: Required[int]
    """RL steps done."""
    version: Required[int]
    versions: list[int]
    """Oldest and newest that made a token: an evaluation beside training may see several."""
    mode: Required[str]
    """"greedy" or "sampled"."""
    accuracy: Required[IntervalRow]
    num_problems: int
    num_clusters: int
    per_problem: Required[list[list[str | int]]]
    """One ``[problem_id, cluster, correct 0 or 1, tokens]`` an attempt."""
    search: dict[str, float]
    time: Required[float]
    seconds: float


class LineRow(TypedDict):
    """One line of a search as its renderer lays it out."""

    depth: int
    text: str
    kind: str
    """"step", "leaf", "dead_end", "goal", "back", "solution", "junk" or "stray"; others are shown plain."""
    wrong: bool
    """A step that is not legal or not true, or a claim that does not hold."""
    note: NotRequired[str]
    """Why it is wrong, in one word."""
    repeated: NotRequired[bool]


class SpanRow(TypedDict):
    version: int
    start: int
    end: int


class RolloutRow(TypedDict):
    """One attempt for a person to read. ``label`` is an evaluation's label, or "train"."""

    id: str
    label: str
    step: int
    problem_id: str
    prompt: str
    text: str
    correct: bool
    reward: float
    reason: str
    finish: str
    num_tokens: int
    versions: list[SpanRow]
    lines: list[LineRow]


@dataclass(frozen=True, slots=True)
class SearchMetric:
    """How one number of search quality is named, explained and compared.

    ``better`` is "lower", "higher", "" (a change is neither), or None (no change to speak of). ``unit`` is "%" for shares,
    else what is counted.
    """

    title: str
    meaning: str
    better: str | None
    unit: str = "%"


_M = SearchMetric
SEARCH_METRICS: Final[dict[str, SearchMetric]] = {
    "wrong_nodes_per_output": _M(
        "Wrong steps an attempt",
        "steps with false arithmetic, with numbers that are not at hand, or beyond the rules; in free text, false equations",
        "lower",
        "",
    ),
    "wrong_nodes_frac": _M("Wrong steps", "their share of all steps; in free text, of all equations", "lower"),
    "wrong_comparisons_frac": _M("Wrong comparisons", "leaves called too low or too high when they were not", "lower"),
    "false_goals_per_output": _M("False goal claims", "how often an attempt says it reached the target when it had not", "lower", ""),
    "reached_goal_frac": _M("Goal reached", "attempts whose search truly finds the target, by right steps only", "higher"),
    "first_on_path_frac": _M("First step can succeed", "attempts whose first step still leaves a solution", "higher"),
    "first_on_path_chance": _M("the same by chance", "for a first step drawn evenly from the legal ones", None),
    "repeated_nodes_frac": _M("Repeated steps", "steps that the same attempt had tried before from the same numbers", "lower"),
    "search_effort": _M("Search effort", "steps to the goal over those of a depth-first search in random order", "lower", ""),
    "illegal_backtracks_per_output": _M("Impossible ways back", "returns where there is nothing to return to, an attempt", "lower", ""),
    "early_backtracks_per_output": _M("Early ways back", "returns before every legal step was tried, an attempt; may be skill", "", ""),
    "misplaced_per_output": _M("Misplaced comparisons", "comparisons where no leaf was reached, an attempt", "lower", ""),
    "junk_words_per_output": _M("Unreadable words", "words outside the search language, an attempt", "lower", ""),
    "search_words_frac": _M("Share of search", "of what an attempt writes, what comes before its solution", ""),
    "answer_frac": _M("Gave an answer", "attempts that end in a solution, right or wrong", "higher"),
    "mean_nodes": _M("Steps an attempt", "search steps written, dead ends included; in free text, lines", "", "count"),
    "mean_dead_ends": _M("Dead ends an attempt", "leaves that are not the target", "", "count"),
    "mean_tokens": _M("Tokens an attempt", "search and solution together", "", "count"),
}
"""Keys as the search analysis names them. Others in a row are kept in the files and not shown."""
