"""Small worlds to search: a graph of named states, a policy that plays arithmetic at random, and generators that fail or dawdle."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from neox_rl import metacot
from neox_rl.errors import NeoxRLError
from neox_rl.metacot import prompt_text, vocabulary
from neox_rl.problems.tokenizer import SymbolicTokenizer
from neox_rl.search.arithmetic_domain import ArithmeticDomain
from neox_rl.search.domain import Rejection, State, Stepped
from neox_rl.search.proposers import PolicyProposer, Position, Proposal, step_ends
from neox_rl.search.values import Scores
from neox_rl.types import Completion, Finish, Problem, Reason, SamplingParams, Verdict, VersionSpan

MAX_VALUE = 60
TOKENIZER = SymbolicTokenizer(vocabulary(MAX_VALUE))


def countdown(numbers: Sequence[int], target: int, max_value: int | None = MAX_VALUE) -> Problem:
    name = ",".join(map(str, numbers))
    meta = {"numbers": list(numbers), "target": target, **({} if max_value is None else {"max_value": max_value})}
    return Problem(f"countdown/{name}->{target}", "countdown", prompt_text(numbers, target), str(target), name, meta)


GRAPH_PROBLEM = Problem("graph", "graph", "", "", "")


@dataclass(frozen=True)
class Graph:
    """States are names; a step names the next. ``goals`` are right ends, every other state without edges a wrong one."""

    edges: Mapping[str, Sequence[str]]
    goals: frozenset[str] = frozenset()
    checkable: bool = True
    root: str = "R"

    def step(self, state: State, text: str, ended: bool) -> Stepped | Rejection:
        return Stepped(text, text) if text in self.edges.get(str(state), ()) else Rejection.ILLEGAL

    def is_end(self, state: State) -> bool:
        return not self.edges.get(str(state))

    def legal(self, state: State) -> Sequence[str]:
        return self.edges.get(str(state), ())

    def solved_value(self, state: State) -> float:
        return float(state in self.goals or any(self.solved_value(s) for s in self.legal(state)))

    def guess(self, state: State) -> float:
        return 0.5

    def answer(self, texts: Sequence[str]) -> str:
        return texts[-1]

    async def judge(self, texts: Sequence[str], state: State) -> Verdict:
        return Verdict(state in self.goals, str(state), Reason.MATCH if state in self.goals else Reason.MISMATCH, 0.0)


@dataclass(frozen=True)
class Table:
    """A value by the name of the state."""

    values: Mapping[str, float]

    async def score(self, positions: Sequence[Position], max_tokens: int | None) -> Scores:
        return Scores([self.values.get(str(p.state), 0.5) for p in positions])


@dataclass
class Script:
    """Proposes the given texts, whatever the position; then nothing."""

    texts: Iterable[Proposal]
    step_tokens: int = 4

    async def propose(self, position: Position, n: int, max_tokens: int) -> Sequence[Proposal]:
        return list(itertools.islice(self.texts, n))


class RandomPlayer:
    """A generator that writes random legal steps, the same for the same prompt and seed: one where results are stop tokens, else to the
    end. ``version`` is that of its tokens."""

    version = 3

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
        words = TOKENIZER.decode(prompt_ids)
        prompt, _, path = words.partition(" search")
        numbers, _, target = prompt.removeprefix("numbers ").partition(" target ")
        domain = ArithmeticDomain(countdown([int(n) for n in numbers.split()], int(target)))
        state = domain.root
        steps = path.split()
        for i in range(0, len(steps), 3):
            stepped = domain.step(state, " ".join(steps[i : i + 3]), False)
            assert isinstance(stepped, Stepped)
            state = stepped.state
        rng = random.Random(f"{words}/{params.seed}")
        return tuple(self._completion(domain, state, rng, params) for _ in range(n))

    def _completion(self, domain: ArithmeticDomain, state: State, rng: random.Random, params: SamplingParams) -> Completion:
        ids: tuple[int, ...] = ()
        while not (ids and (domain.is_end(state) or ids[-1] in params.stop_token_ids)):
            text = rng.choice(domain.legal(state))
            ids += TOKENIZER.encode(text)
            stepped = domain.step(state, text, False)
            assert isinstance(stepped, Stepped)
            state = stepped.state
        if ids[-1] not in params.stop_token_ids:
            ids += TOKENIZER.encode(metacot.LOW)  # a marker, whether it is true or not
        finish = Finish.STOP if len(ids) <= params.max_tokens else Finish.LENGTH
        ids = ids[: params.max_tokens]
        return Completion(ids, (-1.0,) * len(ids), (VersionSpan(self.version, 0, len(ids)),), finish)


@dataclass
class Troubled:
    """A generator in front of another: dawdles at random, and fails for the calls that ``fails`` names by their number."""

    inner: RandomPlayer = field(default_factory=RandomPlayer)
    fails: Callable[[int], bool] = lambda call: False
    dawdle_s: float = 0.0
    calls: int = 0

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
        self.calls += 1
        call = self.calls
        await asyncio.sleep(random.random() * self.dawdle_s)
        if self.fails(call):
            raise NeoxRLError(f"the server of call {call} is gone")
        return await self.inner.sample(prompt_ids, params, n, rollout_id)


def policy(generator: Troubled | RandomPlayer, max_step_tokens: int = 8, max_context: int = 0) -> PolicyProposer:
    return PolicyProposer(generator, TOKENIZER, step_ends(TOKENIZER), max_step_tokens, max_context=max_context)
