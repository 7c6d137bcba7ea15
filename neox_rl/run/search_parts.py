"""What searches are made of, for the command line and for the run: the space of a problem, and values without a server of their own."""

from __future__ import annotations

from neox_rl.arithmetic import ARITHMETIC_TASKS
from neox_rl.errors import ConfigError
from neox_rl.ports import Verifier
from neox_rl.search.arithmetic_domain import ArithmeticDomain
from neox_rl.search.domain import Domain
from neox_rl.search.proposers import ExhaustiveProposer, PolicyProposer
from neox_rl.search.scorers import JudgeValue
from neox_rl.search.text_domain import TextDomain
from neox_rl.search.values import HeuristicValue, MonteCarloValue, NoValue, OracleValue, PolicyPlayouts, StepPlayouts, Value
from neox_rl.types import Problem


def domain_of(problem: Problem, verifier: Verifier) -> Domain:
    """Raises ConfigError for a problem that is none."""
    return ArithmeticDomain(problem) if problem.task in ARITHMETIC_TASKS else TextDomain(problem, verifier)


def own_value(
    name: str, policy: PolicyProposer | None, verifier: Verifier, playouts: int, playout_tokens: int, votes: int, sees_earlier: bool = False
) -> Value:
    """The value called ``name`` (none, oracle, heuristic, monte-carlo, judge). Raises ConfigError where a judge has no policy to ask."""
    match name:
        case "none":
            return NoValue()
        case "oracle":
            return OracleValue()
        case "heuristic":
            return HeuristicValue()
        case "monte-carlo":
            played = PolicyPlayouts(policy, verifier) if policy else StepPlayouts(ExhaustiveProposer())
            return MonteCarloValue(played, playouts, playout_tokens)
        case _:
            if policy is None:
                raise ConfigError("--value judge needs --server URL: the policy itself votes")
            return JudgeValue(policy.generator, policy.tokenizer, votes, sees_earlier=sees_earlier)
