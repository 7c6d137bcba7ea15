"""One rollout of several episodes in one context, as a trace: what the environment and tools say is context, never trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from neox_rl.episodes.objectives import Objective, total
from neox_rl.episodes.protocol import Environment, Progress, Rules, read_ending
from neox_rl.ports import Generator, Tokenizer
from neox_rl.types import Completion, Finish, Problem, Reason, Role, SamplingParams, Segment, Trace, Verdict

Tool = Callable[[str], str | None]
"""What the text of an unfinished episode calls for: the tool's words, or None when it calls nothing."""
MAX_CALLS = 8


@dataclass(frozen=True, slots=True)
class Rollout:
    """``trace`` has the objective's value as its reward; ``progress`` the outcome of each episode, for ``objectives.credits``."""

    trace: Trace
    progress: Progress


@dataclass(frozen=True)
class Episodes:
    """How a problem is attempted in several episodes. ``tool`` is asked after each completion, at most MAX_CALLS times an episode."""

    generator: Generator
    tokenizer: Tokenizer
    rules: Rules
    objective: Objective
    tool: Tool | None = None

    async def roll_out(self, problem: Problem, environment: Environment, params: SamplingParams, name: str) -> Rollout:
        """The trace ``name``. Raises what generator and environment raise."""
        progress = Progress(self.rules)
        segments = [Segment(self.tokenizer.encode(problem.prompt), Role.PROMPT)]
        finish, correct = Finish.STOP, False
        while not progress.done:
            episode = len(progress.outcomes)
            environment.reset(progress.begins_at)
            text, used, finish = await self._episode(segments, params, progress.tokens_left, episode, name)
            ending = read_ending(text)
            outcome = await environment.step(ending.attempt)
            correct = correct or outcome.correct
            words = progress.end_episode(ending, outcome, used)
            if words:
                segments.append(Segment(self.tokenizer.encode(words), Role.ENV, episode=episode))
        reward = total(progress.rewards, self.objective)
        verdict = Verdict(correct, "", Reason.MATCH if correct else Reason.MISMATCH, 0.0)
        return Rollout(Trace(name, problem.id, tuple(segments), reward, finish, verdict), progress)

    async def _episode(
        self, segments: list[Segment], params: SamplingParams, max_tokens: int, episode: int, name: str
    ) -> tuple[str, int, Finish]:
        """Samples one episode onto ``segments``: its text as the policy wrote it, tools left out, its tokens, and why it ended."""
        written: list[int] = []
        finish = Finish.LENGTH
        for call in range(MAX_CALLS + 1):
            context = [i for segment in segments for i in segment.ids]
            seed = None if params.seed is None else (params.seed + 7919 * episode + 104_729 * call) & 0x7FFFFFFF
            asked = replace(params, max_tokens=min(params.max_tokens, max_tokens - len(written)), seed=seed)
            (completion,) = await self.generator.sample(context, asked, 1, name)
            segments += policy_segments(completion, episode)
            written += completion.ids
            finish = completion.finish
            may_call = self.tool is not None and finish is Finish.STOP and call < MAX_CALLS and len(written) < max_tokens
            said = self.tool(self.tokenizer.decode(completion.ids)) if self.tool is not None and may_call else None
            if said is None:
                break
            segments.append(Segment(self.tokenizer.encode(said), Role.ENV, episode=episode))
        return self.tokenizer.decode(written), len(written), finish


def policy_segments(completion: Completion, episode: int) -> Iterator[Segment]:
    """One segment a policy version, every token trained."""
    for span in completion.spans:
        part = slice(span.start, span.end)
        yield Segment(completion.ids[part], Role.THINK, completion.logprobs[part], span.version, mask=1.0, episode=episode)
