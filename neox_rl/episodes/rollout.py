"""One rollout of several episodes in one context, as a trace: what the environment and tools say is context, never trained."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from neox_rl.episodes.objectives import Objective, discounted, solved, total
from neox_rl.episodes.protocol import Environment, Progress, Rules, announcement, read_ending
from neox_rl.episodes.tools import Tool
from neox_rl.ports import Generator, Tokenizer
from neox_rl.types import MAX_CALLS, Completion, Finish, Problem, Reason, Role, SamplingParams, Segment, Trace, Verdict

FOUND, MISSED = "+", "-"


@dataclass(frozen=True, slots=True)
class Rollout:
    """``rewards``: of each episode, discounted; the trace's reward is the objective's value of them.

    The trace's verdict is right where its objective would have it (``objectives.solved``), and its ``extracted`` has a ``+`` or ``-`` for
    each episode: ``--+``.
    """

    trace: Trace
    progress: Progress
    rewards: tuple[float, ...]


@dataclass(frozen=True)
class Episodes:
    """How a problem is attempted in several episodes. ``tool`` is asked after each completion, at most MAX_CALLS times an episode.

    ``solution_id``: the token that ends the search and begins the solution, None where there is none.
    """

    generator: Generator
    tokenizer: Tokenizer
    rules: Rules
    objective: Objective
    tool: Tool | None = None
    solution_id: int | None = None

    async def roll_out(self, problem: Problem, environment: Environment, params: SamplingParams, name: str, gamma: float = 1.0) -> Rollout:
        """The trace ``name``; rewards under the discount ``gamma`` a token (21). Raises what generator and environment raise.

        Z of an episode is what the policy wrote up to its solution, earlier episodes included; where no token tells search and solution
        apart, which the paper has in two parts, up to its end.
        """
        progress = Progress(self.rules)
        context = _Context([Segment(self.tokenizer.encode_prompt(problem.prompt), Role.PROMPT)])
        environment.reset(None)
        finish = Finish.LENGTH
        while not progress.done:
            room = progress.tokens_left(context.num_tokens)
            if room < 1:
                break
            episode = len(progress.outcomes)
            text, used, finish = await self._episode(context, params, room, episode, name)
            ending = read_ending(text)
            outcome = await environment.step(ending.attempt, used, finish is Finish.STOP)
            progress.end_episode(ending, outcome, used)
            if not progress.done:
                shown = environment.reset(progress.begins_at)
                words = announcement(episode + 2, outcome, self.rules.feedback, progress.begins_at, shown)
                progress.cut = not context.hear(self.tokenizer.encode(words), episode, self.rules.max_context - 1)
        return self._rollout(problem, context, progress, finish, name, gamma)

    def _rollout(self, problem: Problem, context: _Context, progress: Progress, finish: Finish, name: str, gamma: float) -> Rollout:
        searched = _searched(context.segments, progress.ends, self.solution_id)
        rewards = tuple(discounted(o.reward, length, gamma) for o, length in zip(progress.outcomes, searched, strict=True))
        right = [outcome.correct for outcome in progress.outcomes]
        marks, correct = "".join(FOUND if each else MISSED for each in right), solved(right, self.objective)
        verdict = Verdict(correct, marks, Reason.MATCH if correct else Reason.MISMATCH, 0.0)
        trace = Trace(name, problem.id, tuple(context.segments), total(rewards, self.objective), finish, verdict)
        return Rollout(trace, progress, rewards)

    async def _episode(
        self, context: _Context, params: SamplingParams, max_tokens: int, episode: int, name: str
    ) -> tuple[str, int, Finish]:
        """Samples one episode onto ``context``: its text as the policy wrote it, its tokens, and why it ended.

        In the text a line break stands for what a tool said: what follows an answer is words of their own, never the rest of the call.
        """
        texts: list[str] = []
        used, finish = 0, Finish.LENGTH
        for call in range(MAX_CALLS + 1):
            room = min(max_tokens - used, self.rules.max_context - context.num_tokens)
            if room < 1:
                finish = Finish.LENGTH
                break
            seed = None if params.seed is None else (params.seed + 7919 * episode + 104_729 * call) & 0x7FFFFFFF
            (completion,) = await self.generator.sample(context.ids, replace(params, max_tokens=room, seed=seed), 1, name)
            context.segments.extend(policy_segments(completion, episode))
            texts.append(self.tokenizer.decode(completion.ids))
            used, finish = used + len(completion.ids), completion.finish
            if self.tool is None or finish is not Finish.STOP or call == MAX_CALLS:
                break
            said = await self.tool(texts[-1])
            if said is None:
                break
            if not context.hear(self.tokenizer.encode(said), episode, self.rules.max_context - 1):
                finish = Finish.LENGTH
                break
        return "\n".join(texts), used, finish


@dataclass(frozen=True, slots=True)
class _Context:
    """All that the policy has before it."""

    segments: list[Segment]

    @property
    def ids(self) -> list[int]:
        return [i for segment in self.segments for i in segment.ids]

    @property
    def num_tokens(self) -> int:
        return sum(len(segment.ids) for segment in self.segments)

    def hear(self, ids: tuple[int, ...], episode: int, max_tokens: int) -> bool:
        """Words of an environment or a tool after ``episode``; False, and nothing, where they would make more than ``max_tokens``."""
        if self.num_tokens + len(ids) > max_tokens:
            return False
        self.segments.append(Segment(ids, Role.ENV, episode=episode))
        return True


def _searched(segments: Sequence[Segment], ends: Sequence[int], solution_id: int | None) -> list[int]:
    """|Z| of each episode, which ends where its solution begins: at the last such token, since what an earlier one begins is no solution,
    and to write one must not make the search free."""
    found: list[int] = []
    for episode, (begin, end) in enumerate(zip((0, *ends), ends, strict=False)):
        written = [i for segment in segments if segment.mask and segment.episode == episode for i in segment.ids]
        found.append(begin + len(written) - 1 - written[::-1].index(solution_id) if solution_id in written else end)
    return found


def num_calls(trace: Trace) -> int:
    """How often a tool answered: what it says is followed by more of the same episode, and what the environment says by the next one."""
    parts = [segment for segment in trace.segments if segment.role is not Role.PROMPT]
    return sum(said.role is Role.ENV and said.episode == after.episode for said, after in itertools.pairwise(parts))


def policy_segments(completion: Completion, episode: int) -> Iterator[Segment]:
    """One segment a policy version, every token trained."""
    for span in completion.spans:
        part = slice(span.start, span.end)
        yield Segment(completion.ids[part], Role.THINK, completion.logprobs[part], span.version, mask=1.0, episode=episode)
