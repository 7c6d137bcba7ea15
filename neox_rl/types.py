"""The values that travel between the parts: few, frozen, one an arrow of the picture in ARCHITECTURE.md.

All token sequences are tuples of token ids; every per-token field has the length of its ``ids``. Versions are
policy versions: the number of optimizer steps behind the weights. v0 starts, step s (1-indexed) trains v(s-1)
and makes v(s).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

NO_VERSION = -1
"""Version of tokens that no policy made: prompts, environment feedback, demonstrations."""
MAX_CALLS = 8
"""Of a tool, in an episode."""


class Role(StrEnum):
    """What a run of tokens is in a Meta-CoT (arXiv 2501.04682, section 2)."""

    PROMPT = "prompt"
    THINK = "think"
    ENV = "env"
    BACK = "back"
    VERIFY = "verify"
    SOLUTION = "solution"


class Finish(StrEnum):
    """Why a completion ended: the policy stopped, the token budget ran out, or the request failed."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class Reason(StrEnum):
    """What a verifier found. Only MATCH is correct; TIMEOUT and ERROR are counted apart from MISMATCH."""

    MATCH = "match"
    MISMATCH = "mismatch"
    NO_ANSWER = "no_answer"
    BAD_GOLD = "bad_gold"
    TIMEOUT = "timeout"
    ERROR = "error"
    UNVERIFIED = "unverified"  # nobody asked one: the rollout is worth the likelihood of a given solution


@dataclass(frozen=True, slots=True)
class Problem:
    """One task with a checkable answer.

    ``task`` names the checker (``countdown``, ``game24``, ``math``). ``cluster`` is the unit of independence for
    confidence intervals and the train / held-out split (the number multiset of a countdown problem): problems of
    one cluster are never split. ``meta`` holds what the checker and the solver need, e.g.
    ``{"numbers": [3, 5, 7], "target": 26}``.
    """

    id: str
    task: str
    prompt: str
    answer: str
    cluster: str
    meta: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Tokens ``start:end`` (half-open, indices into the completion) were sampled by policy ``version``."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Completion:
    """The tokens of one generation request, as the engine attests them.

    ``logprobs`` are the behavior log-probabilities under the sampling distribution (temperature applied), one a
    token. ``spans`` cover ``0:len(ids)`` without gap or overlap, versions never falling.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    spans: tuple[VersionSpan, ...]
    finish: Finish


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the verifier found in one answer. ``extracted`` is the answer it read; ``ms`` the time it took."""

    correct: bool
    extracted: str
    reason: Reason
    ms: float


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens of one role, one version and one episode.

    ``version`` is the policy's that made the tokens, NO_VERSION where none did. ``logprobs`` are those under which it sampled them after
    exactly the tokens before them; empty where none did so: prompts, feedback, and steps of a search that a trace tells in another
    context, which only imitation (``objective.loss: sft``) can train. ``mask`` is the loss weight of each of its tokens, 0 for context
    only, 1 for full weight. ``advantage`` is the step's own credit, where it was given one (VinePPO, arXiv 2410.01679): it takes the
    place of the rollout's advantage in its group. None: the rollout's holds.
    """

    ids: tuple[int, ...]
    role: Role
    logprobs: tuple[float, ...] = ()
    version: int = NO_VERSION
    mask: float = 0.0
    episode: int = 0
    advantage: float | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """The one currency of training: SFT reads the masks; RL the log-probs, the versions and the reward.

    ``id`` is ``g<ticket:06d>/r<index>``, for example ``g000017/r3``. A demonstration has reward 1.0.
    """

    id: str
    problem_id: str
    segments: tuple[Segment, ...]
    reward: float
    finish: Finish
    verdict: Verdict

    @property
    def num_tokens(self) -> int:
        return sum(len(s.ids) for s in self.segments)

    @property
    def given(self) -> tuple[Segment, ...]:
        """Of a trace that nobody verifies, the solution whose likelihood it is worth: scored by the policy, not written by it."""
        if self.verdict.reason is not Reason.UNVERIFIED:
            return ()
        return tuple(s for s in self.segments if s.role is Role.SOLUTION)

    @property
    def written(self) -> tuple[Segment, ...]:
        """What a policy wrote, without what it only scored."""
        given = self.given
        return tuple(s for s in self.segments if s.version != NO_VERSION and s not in given)

    @property
    def oldest_version(self) -> int:
        """Smallest policy version among the sampled tokens; NO_VERSION when a demonstration."""
        return min((s.version for s in self.segments if s.version != NO_VERSION), default=NO_VERSION)


@dataclass(frozen=True, slots=True)
class Group:
    """Rollouts of one problem, compared with one another (GRPO, arXiv 2402.03300). ``ticket`` orders delivery.

    ``unshown``: tokens that were generated for it and are in no trace, such as those of a search's values.
    """

    ticket: int
    problem_id: str
    traces: tuple[Trace, ...]
    unshown: int = 0


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample. ``temperature`` 0 is greedy; ``seed`` makes a request repeatable on one server."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None


class End(StrEnum):
    """Why a search ended: a goal was found, nothing was left to try, the budget did not pay for more, or the policy or the value gave no
    answer."""

    SOLVED = "solved"
    EXHAUSTED = "exhausted"
    BUDGET = "budget"
    FAILED = "failed"


NO_NODE = -1
"""The parent of a root, and the answer of a tree without one."""


@dataclass(frozen=True, slots=True)
class Node:
    """One node of a search tree: one step. ``order`` is when it was made: all that a linearizer needs.

    ``parent`` is the parent's ``id``, NO_NODE for the root, whose ``text`` is empty. ``ids`` are the step's own tokens, with
    ``logprobs`` and ``spans`` (which policy version made which) where a policy sampled them. ``value`` in [0, 1], None where
    the search has none, and ``visits`` are its statistics: MCTS makes the value the mean of all that it saw below. ``exact`` is the value
    that was given to the node itself where that is no estimate (the oracle; the verdict on an end, known to the search or not), and no
    statistic changes it. ``verdict`` is None for a node from which the path goes on. ``seen``: how many nodes there were before the
    round that made it, all that its value could know.
    """

    id: int
    parent: int
    text: str
    order: int
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    spans: tuple[VersionSpan, ...] = ()
    value: float | None = None
    visits: int = 0
    verdict: Verdict | None = None
    exact: float | None = None
    seen: int = 0

    @property
    def versions(self) -> tuple[int, int]:
        """First and last policy version of its tokens; NO_VERSION where no policy made them."""
        return (self.spans[0].version, self.spans[-1].version) if self.spans else (NO_VERSION, NO_VERSION)


@dataclass(frozen=True, slots=True)
class Tree:
    """A search over one problem: a flat list of nodes, ``nodes[i].id == i``, parents before children.

    ``answer`` is the node whose path is the search's answer, NO_NODE without one. ``num_tokens``: all that the search cost, the
    steps that were refused and the tokens of its value included. ``counts``: what was refused or went wrong, by name.
    ``error``: why it FAILED, empty otherwise.
    """

    problem_id: str
    nodes: tuple[Node, ...]
    end: End = End.EXHAUSTED
    answer: int = NO_NODE
    num_tokens: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)
    error: str = ""

    def path(self, node: int) -> tuple[Node, ...]:
        """The nodes from the root, which is left out, to ``node``."""
        found: list[Node] = []
        while node > 0:
            found.append(self.nodes[node])
            node = found[-1].parent
        return tuple(reversed(found))
