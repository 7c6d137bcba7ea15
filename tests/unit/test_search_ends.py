"""Monte-Carlo values of texts: a path that has ended is worth its verdict, and what a lost server cut off is paid and not asked again."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from neox_rl.config.run import RunConfig
from neox_rl.config.schema_search import SearchConfig
from neox_rl.errors import ConfigError, DeadlineError
from neox_rl.rollout.groups import Attempts
from neox_rl.run.search_cli import Program, Verifiers, parser
from neox_rl.run.search_groups import search_groups
from neox_rl.run.search_rows import Row
from neox_rl.search.demonstrations import TraceStyle, trees
from neox_rl.search.growth import Budget
from neox_rl.search.linearize import solution_of
from neox_rl.search.proposers import ExhaustiveProposer, PolicyProposer, Position, Proposal
from neox_rl.search.scorers import JudgeValue
from neox_rl.search.search import Search
from neox_rl.search.strategies import STRATEGIES
from neox_rl.search.strategy import Options
from neox_rl.search.text_domain import TextDomain
from neox_rl.search.values import MonteCarloValue, NoValue, Played, PolicyPlayouts
from neox_rl.types import Completion, End, Finish, Problem, Reason, SamplingParams, Verdict, VersionSpan
from tests.unit.search_worlds import GRAPH_PROBLEM, Graph, Script, countdown

PROBLEM = Problem("p", "math", "q\n", "5", "q")
EOS, NEWLINE, PLAYOUTS = 0, 10, 4
RIGHT, AFTER_END = "The answer is 5\0", " and 7\0"
COST = len("line\n") + PLAYOUTS * len(RIGHT) + len(RIGHT)


class Writer:
    """Bytes as tokens: a line, then a right answer. Asked to write on after its end it spoils the answer."""

    eos_id, vocab_size = EOS, 256

    def __init__(self) -> None:
        self.asked = list[bytes]()

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(text.encode())

    encode_prompt = encode

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i).decode(errors="replace")

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
        self.asked.append(bytes(prompt_ids))
        first = prompt_ids.count(NEWLINE) < 2
        line = "line\n" if NEWLINE in params.stop_token_ids else f"line\n{RIGHT}"
        ids = self.encode(AFTER_END if EOS in prompt_ids else line if first else RIGHT)[: params.max_tokens]
        return (Completion(ids, (-0.5,) * len(ids), (VersionSpan(0, 0, len(ids)),), Finish.STOP),) * n


class Checks:
    async def check(self, problem: Problem, text: str) -> Verdict:
        said = text.rsplit(maxsplit=1)[-1]
        return Verdict(said == problem.answer, said, Reason.MATCH, 0.0)


@pytest.mark.parametrize("tokens", [None, COST])
def test_an_ended_text_is_worth_its_verdict_and_is_not_written_on(tokens: int | None) -> None:
    """With the second budget nothing is left for playouts when the end comes: it needs none."""
    writer = Writer()
    proposer = PolicyProposer(writer, writer, (NEWLINE,), 60)
    value = MonteCarloValue(PolicyPlayouts(proposer, Checks()), k=PLAYOUTS, max_tokens=30)
    search = Search("bfs", lambda problem: TextDomain(problem, Checks()), Options(1))
    tree = asyncio.run(search.run(PROBLEM, proposer, value, Budget(5, tokens)))
    assert not any(EOS in prompt for prompt in writer.asked)
    _, line, end = tree.nodes
    assert end.verdict is not None and end.verdict.correct and (line.value, end.value) == (1.0, 1.0)
    assert tree.answer == end.id and tree.num_tokens == COST


@pytest.mark.parametrize("strategy", ["mcts", "best-of-n"])
def test_the_step_that_ends_a_text_rightly_is_not_trained_down(strategy: str) -> None:
    writer, config = Writer(), RunConfig()
    attempts = Attempts(writer, Checks(), writer, lambda problem, verdict, text, length: float(verdict.correct))
    block = replace(SearchConfig(), strategy=strategy, nodes=4, width=2, max_step_tokens=60)
    groups = search_groups(replace(config, metarl=replace(config.metarl, search=block)), attempts)
    group = asyncio.run(groups.group(PROBLEM, 0, SamplingParams(40), 1))
    ends = [s.advantage for t in group.traces for s in t.segments if s.mask and s.ids[-1] == EOS]
    assert ends and all(advantage is not None and advantage >= 0.0 for advantage in ends)


class ChecksHere(Verifiers):
    check = Checks.check


@pytest.mark.parametrize(("value", "expected"), [("monte-carlo", 1), ("judge", 0)])
def test_the_summary_counts_the_problems_whose_value_knew_the_answer(value: str, expected: int) -> None:
    args = parser().parse_args(["--strategy", "bfs", "--value", value, "--problems", "rows.jsonl", "--budget-nodes", "5"])
    writer, verifiers = Writer(), ChecksHere()
    proposer = PolicyProposer(writer, writer, (NEWLINE,), 60)
    search = Search("bfs", verifiers.domain, Options(1))
    scorer = MonteCarloValue(PolicyPlayouts(proposer, verifiers), PLAYOUTS, 30) if value == "monte-carlo" else NoValue()
    program = Program(args, search, Budget(5), proposer, scorer, verifiers)
    asyncio.run(program.run([Row(1, PROBLEM), Row(2, countdown([1, 2, 3], 6)), Row(3, None, "no problem")], None))
    assert program.tally.summary()["values_from_gold"] == expected


@pytest.mark.parametrize("retries", [0, 2])
def test_a_request_of_a_value_that_fails_takes_nothing_from_the_others_and_is_asked_again_alone(retries: int) -> None:
    """The second of three positions fails, at once, while the others play; a request that was paid is not made anew."""
    paid, running = list[str](), 0

    class Plays:
        async def play(self, position: Position, k: int, max_tokens: int) -> Played:
            nonlocal running
            if str(position.state) == "b" and "a" not in paid:
                raise DeadlineError("a playout", 1.0)
            running += 1
            await asyncio.sleep(0.01)
            running -= 1
            paid.append(str(position.state))
            return Played(1, 0, 10)

    graph = Graph({"R": ["a", "b", "c"], "a": ["x"], "b": ["x"], "c": ["x"], "x": ["y"]})
    search = Search("bfs", lambda _: graph, Options(3), max_retries=retries)
    tree = asyncio.run(search.run(GRAPH_PROBLEM, ExhaustiveProposer(), MonteCarloValue(Plays(), 2), Budget(3)))
    assert running == 0 and paid == (["a", "c", "b"] if retries else ["a", "c"])
    assert tree.num_tokens == 3 + 10 * len(paid) and tree.counts == ({"retries": 1} if retries else {})
    assert [n.value for n in tree.nodes[1:]] == ([0.5] * 3 if retries else [0.5, None, 0.5])
    assert tree.end is (End.BUDGET if retries else End.FAILED)


def test_a_judge_that_lost_a_request_is_paid_for_the_others() -> None:
    class Votes(Writer):
        async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
            self.asked.append(bytes(prompt_ids))
            if len(self.asked) == 2:
                raise DeadlineError("a vote", 1.0)
            return (Completion(self.encode("sure"), (-0.5,) * 4, (), Finish.STOP),) * n

    votes = Votes()
    graph = Graph({"R": ["a", "b", "c"], "a": ["x"], "b": ["x"], "c": ["x"], "x": ["y"]})
    search = Search("bfs", lambda _: graph, Options(3))
    tree = asyncio.run(search.run(GRAPH_PROBLEM, ExhaustiveProposer(), JudgeValue(votes, votes, votes=1), Budget(3)))
    assert len(votes.asked) == 4 and tree.num_tokens == 3 + 3 * 4 and [n.value for n in tree.nodes[1:]] == [1.0] * 3


def test_a_tree_whose_lines_were_cut_is_not_imitated() -> None:
    writer = Writer()
    proposer = PolicyProposer(writer, writer, (NEWLINE,), 60)
    search = Search("bfs", lambda problem: TextDomain(problem, Checks()), Options(1))
    tree = asyncio.run(search.run(PROBLEM, proposer, NoValue(), Budget(5)))
    assert [n.text for n in tree.nodes] == ["", "line\n", RIGHT.strip("\0")] and solution_of(tree)
    assert trees([(tree, PROBLEM)], TraceStyle(), writer)(random.Random(0), "g")[0].num_tokens > 0
    root, line, end = tree.nodes
    cut = replace(tree, nodes=(root, replace(line, text="lin", ids=line.ids[:3], logprobs=line.logprobs[:3], spans=()), end))
    with pytest.raises(ConfigError, match=r"tree of p goes on in the midst of the line 'lin'.*without --cut-steps"):
        trees([(tree, PROBLEM), (cut, PROBLEM)], TraceStyle(), writer)


LOOP = Graph({"R": ["a"], "a": ["R"]})


class Refused(Script):
    """Steps that no state allows, also as whole attempts."""

    def __init__(self) -> None:
        super().__init__(itertools.repeat(Proposal("nowhere", 4)))

    async def attempt(self, position: Position, n: int, max_tokens: int) -> Sequence[Sequence[Proposal]]:
        return [[step] for step in await self.propose(position, n, max_tokens)]


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
@pytest.mark.parametrize(("nodes", "end"), [(2, End.BUDGET), (3, End.BUDGET), (4, End.EXHAUSTED)])
def test_a_search_whose_last_ask_the_nodes_cut_short_was_ended_by_its_budget(strategy: str, nodes: int, end: End) -> None:
    """Steps that are refused leave nodes over, which does not mean that those never asked for were tried."""
    search = Search(strategy, lambda _: Graph({"R": ["a"], "a": ["x"]}), Options(4))
    tree = asyncio.run(search.run(GRAPH_PROBLEM, Refused(), NoValue(), Budget(nodes)))
    assert len(tree.nodes) == 1 and (tree.end, tree.counts) == (end, {"illegal": nodes})


@pytest.mark.parametrize("strategy", sorted(STRATEGIES.keys() - {"best-of-n"}))
def test_a_proposer_that_has_fewer_steps_than_the_budget_pays_was_not_cut_short(strategy: str) -> None:
    tree = asyncio.run(Search(strategy, lambda _: LOOP, Options(4)).run(GRAPH_PROBLEM, ExhaustiveProposer(), NoValue(), Budget(3)))
    assert [n.text for n in tree.nodes] == ["", "a"] and tree.end is End.EXHAUSTED
