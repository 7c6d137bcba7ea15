"""Groups of q-STaR (arXiv 2501.04682, (18)-(20)): a search is worth what it says of a given solution, and nobody verifies anything.

    prompt q -> Z, up to the word or line before a solution, or EOS   the policy, group_size times
             -> log pi(S | Z, q) of the problem's solution S      a server, by its live version: one request, S as part of the prompt

The reward of Z is that log-prob, less log pi(S | q) without a search where the config says so: what the search adds. S is part of the
trace, as tokens with the log-probs and the version that scored them, and is trained with advantage 1: so the gradient is that of
E_Z[log pi(S | Z, q)], with both of its terms; the importance ratio corrects either for its age.
"""

from __future__ import annotations

import asyncio
import bisect
import random
import re
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

from neox_rl.arithmetic import ARITHMETIC_TASKS
from neox_rl.config.run import RunConfig
from neox_rl.episodes.objectives import qstar_reward
from neox_rl.errors import ConfigError
from neox_rl.metacot import SOLUTION
from neox_rl.ports import Chunks, Requests, Scorer, Tokenizer
from neox_rl.problems.split import ProblemSet
from neox_rl.rollout.groups import Attempts, Patient, patiently, segments
from neox_rl.search.dfs import solution_path
from neox_rl.search.domain import SOLUTION_LINE
from neox_rl.search.linearize import glue_of, linearize, text_of
from neox_rl.search.proposers import piece
from neox_rl.types import Completion, Finish, Group, Problem, Reason, Role, SamplingParams, Segment, Trace, Verdict

UNVERIFIED = Verdict(correct=False, extracted="", reason=Reason.UNVERIFIED, ms=0.0)
"""Of a search that is worth what it says of a given solution: it has no answer of its own."""


def rewards_solutions(config: RunConfig) -> bool:
    """Whether the run's reward is a solution's likelihood."""
    return config.metarl.reward.kind != "verdict"


ASKED_AGAIN = 3
_WORD = re.compile(rf"(?<!\S){SOLUTION}(?!\S)")
_LINE = re.compile(rf"^[ \t]*{re.escape(SOLUTION_LINE)}[ \t]*(?:\n|\Z)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Reference:
    """A given solution in tokens: the word or line before it, and S itself with EOS.

    ``mark`` finds that word or line where a search writes it, and it ends in ``end``.
    """

    begin: tuple[int, ...]
    ids: tuple[int, ...]
    mark: re.Pattern[str]
    end: str


def reference(problem: Problem, tokenizer: Tokenizer) -> Reference | None:
    """The solution of the problem's row, or of the games one of the solver's, always the same; None where there is neither."""
    if problem.task in ARITHMETIC_TASKS:
        tree = solution_path(problem, random.Random(f"reference/{problem.id}"))
        text = text_of([span for span in linearize(tree, problem) if span.role is Role.SOLUTION])
        begin, text, mark, end = glue_of(problem) + SOLUTION, text.removeprefix(SOLUTION), _WORD, ""
    elif "solution" in problem.meta:
        begin, text, mark, end = f"{SOLUTION_LINE}\n", str(problem.meta["solution"]), _LINE, "\n"
    else:
        return None
    return Reference(tokenizer.encode(begin), (*tokenizer.encode(text), tokenizer.eos_id), mark, end)


@dataclass(frozen=True, slots=True)
class Searched:
    """Z alone, and what is said between it and S: nothing where Z ends in the word or line before a solution."""

    search: Completion
    between: tuple[int, ...]


def searched(written: Completion, given: Reference, tokenizer: Tokenizer) -> Searched:
    """What was written up to a solution, without that: after one of its own the policy would find S likely whatever the search was worth.
    EOS is left out too: S follows, and nothing was trained to follow EOS."""
    ids = written.ids[:-1] if written.ids[-1:] == (tokenizer.eos_id,) else written.ids
    mark = given.mark.search(tokenizer.decode(ids))
    if mark is None:
        return Searched(piece(written, 0, len(ids), written.finish), given.begin)

    def text(num_tokens: int) -> str:
        return tokenizer.decode(ids[:num_tokens])

    def tokens_of(num_chars: int) -> int:
        """The fewest that spell so many."""
        return bisect.bisect_left(range(len(ids)), num_chars, key=lambda n: len(text(n)))

    end = tokens_of(mark.end())
    said = text(end)[mark.start() :]
    if said.strip() == mark[0].strip():
        between = () if said.endswith(given.end) else tokenizer.encode(given.end)
    else:  # a token that holds the end of the line and the beginning of the next
        end, between = tokens_of(mark.start()), given.begin
        end -= len(text(end)) > mark.start()
    return Searched(piece(written, 0, end, Finish.STOP), between)


def with_references(config: RunConfig, problems: ProblemSet, tokenizer: Tokenizer) -> ProblemSet:
    """``problems`` without the training problems that no q-STaR can be done with. Raises ConfigError where none is left."""
    if not rewards_solutions(config):
        return problems
    seq, new = config.neox.seq_length, config.metarl.rollout.max_new_tokens

    def fits(problem: Problem) -> bool:
        found = reference(problem, tokenizer)
        # One more: a request to score samples a token.
        return found is not None and len(tokenizer.encode_prompt(problem.prompt)) + new + len(found.begin) + len(found.ids) < seq

    kept = tuple(problem for problem in problems.train if fits(problem))
    if not kept:
        raise ConfigError(
            f"metarl.reward.kind = {config.metarl.reward.kind}: none of {len(problems.train)} training problems has a worked solution"
            f" that fits behind max_new_tokens = {new} of search in seq_length = {seq}; give rows with a solution, raise seq_length, or"
            " set kind: verdict"
        )
    return replace(problems, train=kept, counts=problems.counts | {"without_solution": len(problems.train) - len(kept)})


@dataclass(frozen=True, slots=True)
class SolutionGroups:
    """The ``ports.GroupMaker`` of ``metarl.reward.kind`` ``solution`` and ``gain``.

    ``gain``: log pi(S | q) is taken off the reward. ``weight``: of the solution's tokens in the loss.
    """

    attempts: Attempts
    scorer: Scorer
    gain: bool
    weight: float

    async def group(self, problem: Problem, ticket: int, params: SamplingParams, size: int) -> Group:
        """See ``ports.GroupMaker``. Raises ConfigError for a problem without a solution."""
        a, name = self.attempts, f"g{ticket:06d}"
        given = reference(problem, a.tokenizer)
        if given is None:
            raise ConfigError(f"problem {problem.id} has no worked solution: metarl.reward.kind needs one")
        prompt = a.tokenizer.encode_prompt(problem.prompt)
        stops = params.stop_token_ids if a.solution_id is None else (*params.stop_token_ids, a.solution_id)
        written = await Patient(a.generator).sample(prompt, replace(params, stop_token_ids=stops), size, name)
        found = [searched(each, given, a.tokenizer) for each in written]
        asked = [(*prompt, *each.search.ids, *each.between) for each in found]
        if self.gain:
            asked.append((*prompt, *given.begin))
        scores = await self._scores(asked, given, name)
        plain = scores.pop().logprobs if self.gain else ()
        rows = zip(found, scores, strict=True)
        traces = tuple(self._trace(f"{name}/r{i}", problem, prompt, given, plain, *row) for i, row in enumerate(rows))
        return Group(ticket, problem.id, traces, sum(len(w.ids) - len(f.search.ids) for w, f in zip(written, found, strict=True)))

    def chunked(self, chunks: Chunks) -> Self:
        """See ``ports.GroupMaker``: searches are made in chunks, and kept while they are scored; what scores them is asked again after a
        crash."""
        return replace(self, attempts=replace(self.attempts, generator=chunks(self.attempts.generator, Requests.MANY)))

    async def _scores(self, asked: Sequence[Sequence[int]], given: Reference, name: str) -> list[Completion]:
        """One a prompt. For a gain, those of older versions are asked again: the difference between two policies is none. A version that
        comes while the last of ASKED_AGAIN rounds is under way leaves some a version apart."""
        work = [partial(patiently, partial(self.scorer.score, ids, given.ids, f"{name}/r{i}")) for i, ids in enumerate(asked)]
        scores = await _together([ask() for ask in work])
        for _ in range(ASKED_AGAIN if self.gain else 0):
            newest = max(score.spans[0].version for score in scores)
            old = [i for i, score in enumerate(scores) if score.spans[0].version < newest]
            for i, score in zip(old, await _together([work[i]() for i in old]), strict=True):
                scores[i] = score
        return scores

    def _trace(
        self,
        id: str,
        problem: Problem,
        prompt: tuple[int, ...],
        given: Reference,
        plain: Sequence[float],
        found: Searched,
        score: Completion,
    ) -> Trace:
        parts = [Segment(prompt, Role.PROMPT), *(replace(s, role=Role.THINK) for s in segments(found.search, None))]
        parts += [Segment(found.between, Role.ENV)] if found.between else []
        parts.append(Segment(given.ids, Role.SOLUTION, score.logprobs, score.spans[0].version, mask=self.weight, advantage=1.0))
        return Trace(id, problem.id, tuple(parts), qstar_reward(score.logprobs, plain), found.search.finish, UNVERIFIED)


async def _together(work: Sequence[Coroutine[Any, Any, Completion]]) -> list[Completion]:
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()  # one that failed fails the group


def solution_groups(config: RunConfig, attempts: Attempts, scorer: Scorer) -> SolutionGroups:
    r = config.metarl.reward
    return SolutionGroups(attempts, scorer, r.kind == "gain", r.solution_weight)
