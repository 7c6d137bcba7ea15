"""What searches are made of, for the command line and for the run: the space of a problem, and its values."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

from neox_rl.arithmetic import ARITHMETIC_TASKS
from neox_rl.errors import ConfigError
from neox_rl.ports import Verifier
from neox_rl.problems.tokenizer import DirectoryTokenizer
from neox_rl.rollout.vllm_completions import CompletionsGenerator
from neox_rl.search.arithmetic_domain import ArithmeticDomain
from neox_rl.search.domain import Domain
from neox_rl.search.proposers import ExhaustiveProposer, PolicyProposer
from neox_rl.search.reward_model import WordValue
from neox_rl.search.scorers import Discouraged, JudgeValue, PrmValue, ServedScorer
from neox_rl.search.text_domain import TextDomain
from neox_rl.search.values import HeuristicValue, MonteCarloValue, NoValue, OracleValue, PolicyPlayouts, StepPlayouts, Value
from neox_rl.types import Problem

TOKENIZER = "tokenizer.json"


def domain_of(problem: Problem, verifier: Verifier) -> Domain:
    """Raises ConfigError for a problem that is none."""
    return ArithmeticDomain(problem) if problem.task in ARITHMETIC_TASKS else TextDomain(problem, verifier)


def prm_value(
    server: str, model: str, timeout_s: float, stack: AsyncExitStack, sees_earlier: bool = False, template: str = ""
) -> Callable[[], Awaitable[Value]]:
    """Makes, when called, the process reward model that ``server`` serves: one of this project, whose tokenizer is in the directory
    ``model``, or a sequence classifier of that name, which sees the problem without the ``template``. The call raises what a server that
    does not answer raises."""
    tokenizer = DirectoryTokenizer(Path(model), template) if Path(model, TOKENIZER).is_file() else None

    async def opened() -> Value:
        if tokenizer is None:
            return PrmValue(ServedScorer(server.rstrip("/"), model, timeout_s), sees_earlier)
        served = await stack.enter_async_context(CompletionsGenerator(server, timeout_s))
        return WordValue(served, tokenizer, sees_earlier, served.max_model_len)

    return opened


def own_value(
    name: str, policy: PolicyProposer | None, verifier: Verifier, playouts: int, playout_tokens: int, votes: int, sees_earlier: bool = False
) -> Value:
    """The value called ``name`` (none, oracle, heuristic, monte-carlo, judge). Raises ConfigError where a judge has no policy to ask."""
    match name:
        case "none":
            value: Value = NoValue()
        case "oracle":
            value = OracleValue()
        case "heuristic":
            value = HeuristicValue()
        case "monte-carlo":
            played = PolicyPlayouts(policy, verifier) if policy else StepPlayouts(ExhaustiveProposer())
            value = MonteCarloValue(played, playouts, playout_tokens)
        case _:
            if policy is None:
                raise ConfigError("--value judge needs --server URL: the policy itself votes")
            return JudgeValue(policy.generator, policy.tokenizer, votes, sees_earlier=sees_earlier, max_context=policy.max_context)
    return Discouraged(value) if sees_earlier else value
