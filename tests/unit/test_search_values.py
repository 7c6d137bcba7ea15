"""Values: what each says of a node, and what it costs."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence

import pytest

from neox_rl.errors import ConfigError
from neox_rl.search.arithmetic_domain import ArithmeticDomain
from neox_rl.search.domain import SOLUTION_LINE, Rejection
from neox_rl.search.growth import Budget
from neox_rl.search.proposers import ExhaustiveProposer, PolicyProposer, Position, step_ends
from neox_rl.search.scorers import Discouraged, PrmValue
from neox_rl.search.search import Search
from neox_rl.search.strategy import Options
from neox_rl.search.text_domain import TextDomain, TextState
from neox_rl.search.values import HeuristicValue, MonteCarloValue, NoValue, OracleValue, PolicyPlayouts, Scores, StepPlayouts, Value
from neox_rl.types import Completion, End, Finish, Problem, Reason, SamplingParams, Tree, Verdict
from neox_rl.verify.verifier import ArithmeticVerifier
from tests.unit.search_worlds import GRAPH_PROBLEM, TOKENIZER, Graph, RandomPlayer, countdown, policy

TASK = countdown([3, 5, 7], 26)
DOMAIN = ArithmeticDomain(TASK)


def position(*texts: str, problem: Problem = TASK, earlier: Sequence[tuple[str, ...]] = (), seed: int = 1) -> Position:
    domain = ArithmeticDomain(problem)
    state = domain.root
    for text in texts:
        stepped = domain.step(state, text, False)
        assert not isinstance(stepped, Rejection)
        state = stepped.state
    return Position(problem, domain, state, texts, tuple(i for t in texts for i in TOKENIZER.encode(t)), seed, earlier)


def score(value: Value, *positions: Position, max_tokens: int | None = None) -> Scores:
    return asyncio.run(value.score(positions, max_tokens))


GOOD, BAD, ROOT = position("7 *3 =21"), position("7 +5 =12"), position()


def test_the_oracle_knows_where_a_solution_is_left() -> None:
    assert score(OracleValue(), ROOT, GOOD, BAD) == Scores([1.0, 1.0, 0.0], exact=True)
    assert all(0 < v < 1 for v in score(HeuristicValue(), ROOT, GOOD, BAD).values)
    assert score(NoValue(), GOOD, BAD).values == [0.5, 0.5]


def test_monte_carlo_is_the_mean_of_random_play_and_pays_for_it() -> None:
    """From 21, 5 one of two steps is right: 21 + 5."""
    value = MonteCarloValue(StepPlayouts(ExhaustiveProposer()), k=400)
    scores = score(value, GOOD, BAD)
    assert abs(scores.values[0] - 1 / len(DOMAIN.legal(GOOD.state))) < 4 * math.sqrt(1 / 4 / 400)
    assert scores.values[1] == 0.0 and scores.num_tokens == 2 * 400 * 3
    assert score(value, GOOD) == score(value, GOOD), "by seed"
    assert score(value, GOOD, max_tokens=399) == Scores(()), "what it cannot pay it does not ask"


class Writes:
    """A generator that always writes the same text."""

    def __init__(self, text: str, finish: Finish = Finish.STOP) -> None:
        self.ids, self.finish, self.prompts = TOKENIZER.encode(text), finish, list[str]()

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
        self.prompts.append(TOKENIZER.decode(prompt_ids))
        ids = self.ids[: params.max_tokens]
        return (Completion(ids, (-1.0,) * len(ids), (), self.finish),) * n


def test_monte_carlo_with_a_policy_completes_in_one_request_and_asks_the_verifier() -> None:
    right = "21 +5 =26 goal solution ( 7 * 3 ) + 5"
    for finish, expected in ((Finish.STOP, 1.0), (Finish.LENGTH, 0.0)):
        generator = Writes(right, finish)
        proposer = PolicyProposer(generator, TOKENIZER, step_ends(TOKENIZER))
        scores = score(MonteCarloValue(PolicyPlayouts(proposer, ArithmeticVerifier()), k=4, max_tokens=40), GOOD)
        assert scores == Scores([expected], 4 * len(right.split()))
        assert generator.prompts == [f"{TASK.prompt} 7 *3 =21"]


def test_a_playout_that_the_budget_cut_says_nothing() -> None:
    """What a search has left may end a completion that had a right to go on: that is no wrong answer."""
    text = "21 +5 =26 goal solution ( 7 * 3 ) + 5"

    class Mixed(Writes):
        async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
            right, *_ = await super().sample(prompt_ids, params, 1, rollout_id)
            cut = Completion((self.ids[0],) * params.max_tokens, (-1.0,) * params.max_tokens, (), Finish.LENGTH)
            whole = len(right.ids) == len(self.ids)
            return (right, right, right, cut) if whole else (cut,) * 4

    proposer = PolicyProposer(Mixed(text), TOKENIZER, step_ends(TOKENIZER))
    value = MonteCarloValue(PolicyPlayouts(proposer, ArithmeticVerifier()), k=4, max_tokens=40)
    n = len(TOKENIZER.encode(text))
    assert score(value, GOOD) == Scores([0.75], 3 * n + 40), "cut off at its own length it is wrong"
    assert score(value, GOOD, max_tokens=4 * n + 4) == Scores([1.0], 3 * n + n + 1, unpaid=True)
    none = score(value, GOOD, max_tokens=4)
    assert math.isnan(none.values[0]) and none.num_tokens == 4 and none.unpaid

    random_play = MonteCarloValue(StepPlayouts(ExhaustiveProposer()), k=2, max_tokens=3)
    here = Position(GRAPH_PROBLEM, Graph({"R": ["a"], "a": ["b"], "b": ["c"]}, frozenset({"c"})), "R", (), (), 0)
    short = score(random_play, here, max_tokens=5)
    assert math.isnan(short.values[0]) and short.num_tokens == 4 and short.unpaid


def test_a_step_without_a_value_for_want_of_tokens_is_no_bad_value() -> None:
    class Unpaid:
        async def score(self, positions: Sequence[Position], max_tokens: int | None) -> Scores:
            return Scores([math.nan] * len(positions), unpaid=True)

    tree = text_search("answer 1", lambda text: 0.5, value=Unpaid())
    assert "bad_value" not in tree.counts
    assert {node.value for node in tree.nodes[1:] if node.verdict is None} == {None}


def test_a_value_sees_what_was_visited_before_its_round_and_no_verdict_of_the_gold_answer() -> None:
    seen: list[Tree] = []

    class Watches:
        async def score(self, positions: Sequence[Position], max_tokens: int | None) -> Scores:
            seen.append(positions[0].visited())  # type: ignore[misc]  # a search sets it
            return Scores([0.5] * len(positions))

    search = Search("bfs", ArithmeticDomain, Options(3))
    tree = asyncio.run(search.run(countdown([2, 4, 9, 1], 17), ExhaustiveProposer(), Watches(), Budget(30)))
    first = {p.parent: min(n.id for n in tree.nodes if n.parent == p.parent) for p in tree.nodes[1:] if p.verdict is None}
    assert [len(t.nodes) for t in seen] == sorted(first.values()) and len(first) > 2
    text_search("0", lambda text: 0.5, value=Watches())
    assert any(len(t.nodes) > 3 for t in seen)
    assert {(n.verdict, n.exact) for t in seen if t.problem_id == "p" for n in t.nodes} == {(None, None)}


def test_a_step_that_earlier_attempts_took_is_discouraged() -> None:
    tried = [("7 *3 =21", "21 -5 =16"), ("7 +5 =12", "12 +3 =15"), ("7 *3 =21", "21 *5 =105")]
    value = Discouraged(NoValue(), decay=0.5)
    scores = score(value, position("7 *3 =21", earlier=tried), position("7 -3 =4", earlier=tried), position(earlier=tried))
    assert (scores.values, scores.discounts) == ([0.5] * 3, [0.25, 1.0, 1.0])


def test_values_that_a_domain_has_not_are_refused_by_name() -> None:
    domain = TextDomain(Problem("p", "math", "", "", ""), ArithmeticVerifier())
    here = Position(domain.problem, domain, domain.root, (), (), 0)
    for value, fix in (
        (OracleValue(), "monte-carlo"),
        (HeuristicValue(), "monte-carlo"),
        (MonteCarloValue(StepPlayouts(ExhaustiveProposer())), "--server"),
    ):
        with pytest.raises(ConfigError, match=fix):
            score(value, here)


def test_a_text_ends_where_the_policy_ends_and_never_repeats_a_line() -> None:
    domain = TextDomain(Problem("p", "math", "", "", ""), ArithmeticVerifier())
    start = TextState(("One.",), False)
    assert domain.step(start, "Two.\n", False) == ("Two.\n", TextState(("One.", "Two."), False))
    assert domain.is_end(TextState(("One.",), True)) and not domain.is_end(start)
    assert domain.step(start, "", True) == ("", TextState(("One.", ""), True)), "nothing more to say is an end"
    for text, ended, expected in (
        ("One. \n", False, Rejection.CYCLE),
        ("\n", False, Rejection.EMPTY),
        ("", True, None),
        (f" {SOLUTION_LINE}\n", False, Rejection.ILLEGAL),
        ("x" * 20_001, False, Rejection.TOO_LONG),
    ):
        assert expected is None or domain.step(start, text, ended) is expected
    assert domain.step(domain.root, "", True) is Rejection.EMPTY


class LineModel:
    """Bytes as tokens; writes one of two lines by seed, and ends after the second."""

    eos_id, vocab_size = 0, 256

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(text.encode())

    def encode_prompt(self, text: str) -> tuple[int, ...]:
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i).decode(errors="replace")

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
        depth = self.decode(prompt_ids).count("\n") - 1
        texts = [f"line {depth} of {(params.seed or 0) + i}\n" if depth < 2 else f"answer {i}" for i in range(n)]
        ids = [(*self.encode(text), *(() if text.endswith("\n") else (0,)))[: params.max_tokens] for text in texts]
        return tuple(Completion(i, (-0.5,) * len(i), (), Finish.STOP) for i in ids)


def text_search(right: str, scorer: Callable[[str], float], strategy: str = "bfs", value: Value | None = None) -> Tree:
    class Verifies:
        async def check(self, problem: Problem, text: str) -> Verdict:
            return Verdict(text.endswith(right), text.rsplit("\n", 1)[-1], Reason.MATCH, 1.0)

    class Scores_:
        async def score(self, texts: Sequence[str]) -> Sequence[float]:
            return [scorer(text) for text in texts]

    model = LineModel()
    assert step_ends(model) == (10,)
    proposer = PolicyProposer(model, model, (10,), 60)
    made = Search(strategy, lambda problem: TextDomain(problem, Verifies()), Options(2))
    return asyncio.run(made.run(Problem("p", "math", "question\n", "", ""), proposer, value or PrmValue(Scores_()), Budget(20)))


def test_a_search_over_lines_ends_with_the_text_of_the_highest_value() -> None:
    tree = text_search("answer 1", lambda text: 0.9 if "answer 0" in text else 0.4)
    assert tree.end is End.EXHAUSTED and len(tree.nodes) - 1 == 2 + 4 + 8
    assert [node.text.split()[0] for node in tree.path(tree.answer)] == ["line", "line", "answer"]
    answer = tree.nodes[tree.answer].verdict
    assert answer is not None and answer.extracted == "answer 0" and not answer.correct, "a right one was there, and nobody told"
    assert any(n.verdict is not None and n.verdict.correct for n in tree.nodes)


def test_random_play_in_a_graph_stops_at_its_tokens() -> None:
    long = Graph({"R": ["a"], "a": ["b"], "b": ["c"]}, frozenset({"c"}))
    here = Position(GRAPH_PROBLEM, long, "R", (), (), 0)
    assert score(MonteCarloValue(StepPlayouts(ExhaustiveProposer()), k=2, max_tokens=3), here) == Scores([1.0], 6)
    assert score(MonteCarloValue(StepPlayouts(ExhaustiveProposer()), k=2, max_tokens=2), here) == Scores([0.0], 4)


def test_a_random_player_is_a_policy() -> None:
    played = asyncio.run(policy(RandomPlayer()).propose(GOOD, 3, 100))
    assert len(played) == 3 and all(p.text in DOMAIN.legal(GOOD.state) and p.complete and not p.ended for p in played)
