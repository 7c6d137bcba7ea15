"""Searches as rollouts: what is trained of a tree is the flat sum over the steps that a policy sampled, each with its own credit."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neox_rl.arithmetic import solvable
from neox_rl.batch.advantages import teaches
from neox_rl.batch.pack import pack_rl
from neox_rl.batch.packing import Layout
from neox_rl.config.run import RunConfig
from neox_rl.config.schema import ObjectiveConfig, StalenessConfig
from neox_rl.config.schema_search import SearchConfig
from neox_rl.errors import DeadlineError, ServerFailedError
from neox_rl.metacot import BACK
from neox_rl.queue.history import Tally
from neox_rl.queue.state import TicketQueue
from neox_rl.queue.wire import Phase
from neox_rl.rollout.groups import Attempts
from neox_rl.rollout.vllm_client import NobodyServesError
from neox_rl.run.scoreboard import Scoreboard
from neox_rl.run.search_groups import SearchGroups, search_groups
from neox_rl.run.searched import books, laid_out
from neox_rl.search.arithmetic_domain import ArithmeticDomain
from neox_rl.search.demonstrations import TraceStyle
from neox_rl.search.growth import Budget
from neox_rl.search.linearize import Mask
from neox_rl.search.proposers import Position
from neox_rl.search.rollouts import Baseline, Remembering, Sample, advantages, all_samples, node_samples, step_traces, told_trace
from neox_rl.search.search import Search
from neox_rl.search.strategies import STRATEGIES
from neox_rl.search.strategy import Options
from neox_rl.search.text_domain import TextDomain, TextState
from neox_rl.search.values import HeuristicValue, OracleValue
from neox_rl.telemetry.events import EventLog
from neox_rl.telemetry.jsonl import read_jsonl
from neox_rl.telemetry.metrics import MetricsWriter
from neox_rl.types import NO_NODE, NO_VERSION, Completion, End, Finish, Problem, Role, SamplingParams, Trace, Tree, Verdict, VersionSpan
from tests.unit.search_worlds import MAX_VALUE, TOKENIZER, RandomPlayer, Table, countdown, policy
from tests.unit.small_run import small_config, small_paths

TASK = countdown([2, 4, 9, 1], 17)
EASY = countdown([1, 2, 3], 6)
PROMPT = TOKENIZER.encode(TASK.prompt)


class Sloppy(RandomPlayer):
    """Every third step is a way back, and versions rise from call to call, as while a run trains."""

    def __init__(self) -> None:
        self.calls, self.num_tokens = 0, 0

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
        self.calls += 1
        made = [
            (await RandomPlayer.sample(self, prompt_ids, replace(params, seed=100 * self.calls + i), 1, rollout_id))[0] for i in range(n)
        ]
        made = [self._back() if (self.calls + i) % 3 == 0 else completion for i, completion in enumerate(made)]
        self.num_tokens += sum(len(c.ids) for c in made)
        return tuple(replace(c, spans=(VersionSpan(self.calls // 4, 0, len(c.ids)),)) for c in made)

    def _back(self) -> Completion:
        return Completion(TOKENIZER.encode(BACK), (-0.5,), (VersionSpan(0, 0, 1),), Finish.STOP)


def reward(verdict: Verdict, text: str, num_tokens: int) -> float:
    return float(verdict.correct)


def grown(strategy: str, nodes: int = 24, task: Problem = TASK) -> tuple[Tree, list[Sample], Sloppy]:
    player = Sloppy()
    remembering = Remembering(policy(player))
    search = Search(strategy, ArithmeticDomain, Options(4), 0, every_value=True)
    found = asyncio.run(search.grown(task, remembering, HeuristicValue(), Budget(nodes)))
    return found.tree, all_samples(found, ArithmeticDomain(task), remembering.asked), player


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(sorted(STRATEGIES)), st.integers(1, 40), st.sampled_from(Baseline), st.booleans())
def test_every_sampled_step_is_trained_once_with_its_credit_after_its_own_path(
    strategy: str, nodes: int, baseline: Baseline, every: bool
) -> None:
    tree, samples, _ = grown(strategy, nodes)
    samples = samples if every else node_samples(tree)
    credit = advantages(tree, samples, baseline)
    paths = [tuple(i for step in tree.path(s.parent) for i in step.ids) for s in samples]
    expected = Counter((path, s.ids, s.logprobs, s.spans[0].version, a) for path, s, a in zip(paths, samples, credit, strict=True))
    found: Counter[tuple[object, ...]] = Counter()
    for trace in step_traces(tree, TASK, PROMPT, samples, credit, reward):
        assert trace.segments[0].ids == PROMPT and trace.segments[0].role is Role.PROMPT
        before: tuple[int, ...] = ()
        for segment in trace.segments[1:]:
            if segment.mask:
                found[before, segment.ids, segment.logprobs, segment.version, segment.advantage] += 1
            else:
                assert (segment.version, segment.logprobs, segment.advantage) == (NO_VERSION, (), None)
            before += segment.ids
    assert found == expected


@pytest.mark.parametrize("strategy", ["mcts", "bfs"])
def test_what_was_sampled_and_paid_is_what_is_trained(strategy: str) -> None:
    """With a value that costs nothing: refused steps and steps that came again are among the samples."""
    tree, samples, player = grown(strategy, nodes=400)
    assert tree.num_tokens == player.num_tokens == sum(len(s.ids) for s in samples)
    assert sum(s.node == NO_NODE for s in samples) == sum(tree.counts.values()) > 0


def test_best_of_n_asks_for_whole_attempts_in_one_request_and_trains_no_token_after_their_ends() -> None:
    tree, samples, player = grown("best-of-n", nodes=400)
    ends = [n for n in tree.nodes if n.verdict is not None]
    assert player.calls == 1 and len(ends) + tree.counts["declined"] == 4 and tree.num_tokens == player.num_tokens
    assert len(tree.nodes) - 1 == 3 * len(ends), "three steps each"
    assert sum(len(s.ids) for s in samples) == player.num_tokens - len(ends), "but for the marker that ends an attempt"


def test_an_attempt_is_cut_where_its_steps_end() -> None:
    ids = TOKENIZER.encode("3 *5 =15 15 +7 =22 low")
    spans = (VersionSpan(1, 0, 4), VersionSpan(2, 4, 7))

    class Writer:
        async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
            assert params.max_tokens == 40 and set(map(TOKENIZER.decode, zip(params.stop_token_ids))) >= {BACK, "low", "goal"}
            whole = Completion(ids, tuple(-0.1 * i for i in range(7)), spans, Finish.STOP)
            return (whole, replace(whole, ids=ids[:3], logprobs=whole.logprobs[:3], spans=(VersionSpan(1, 0, 3),)))

    task = countdown([3, 5, 7], 22)
    position = Position(task, ArithmeticDomain(task), (3, 5, 7), (), (), 0)
    first, second = asyncio.run(policy(Writer()).attempt(position, 2, 40))  # type: ignore[arg-type]  # a generator is enough
    assert [p.text for p in first] == ["3 *5 =15", "15 +7 =22", "low"] and [i for p in first for i in p.ids] == [*ids]
    assert [p.spans for p in first] == [
        (VersionSpan(1, 0, 3),),
        (VersionSpan(1, 0, 1), VersionSpan(2, 1, 3)),
        (VersionSpan(2, 0, 1),),
    ]
    assert [x for p in first for x in p.logprobs] == [-0.1 * i for i in range(7)] and not any(p.ended for p in first)
    assert [(p.text, p.ended) for p in second] == [("3 *5 =15", False), ("", True)], "an engine that leaves its last token out"


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 40), st.integers(0, 60), st.integers(1, 6))
def test_whole_attempts_keep_to_the_budget(nodes: int, tokens: int, width: int) -> None:
    search = Search("best-of-n", ArithmeticDomain, Options(width), 0)
    tree = asyncio.run(search.run(TASK, policy(Sloppy()), HeuristicValue(), Budget(nodes, tokens)))
    assert len(tree.nodes) - 1 <= nodes and tree.num_tokens <= tokens


def test_credit_of_nodes_alone_is_that_of_the_tree_and_siblings_add_up_to_nothing() -> None:
    tree, samples, _ = grown("mcts")
    nodes = node_samples(tree)
    gained = dict(zip((s.node for s in nodes), advantages(tree, nodes, Baseline.PARENT), strict=True))
    first = [n.value for n in tree.nodes if n.parent == 0]
    for node in tree.nodes[1:]:
        along = sum(gained[step.id] for step in tree.path(node.id))
        assert along == pytest.approx(node.value - sum(first) / len(first)), "v(end) - v(root) along every path"
    below: Counter[int] = Counter()
    for sample, advantage in zip(samples, advantages(tree, samples, Baseline.SIBLINGS), strict=True):
        below[sample.parent] += advantage  # type: ignore[assignment]  # a sum of floats
    assert len(below) > 3 and all(total == pytest.approx(0.0) for total in below.values())


def test_a_verifier_that_is_lost_costs_no_step_and_no_rollout() -> None:
    """The last step of a text may be its end token alone: without its verdict the text says nothing of the end."""

    class Ends:
        async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
            ids = (TOKENIZER.eos_id,) if len(prompt_ids) > 1 else TOKENIZER.encode("3 *5 =15")
            return (Completion(ids, (-1.0,) * len(ids), (VersionSpan(2, 0, len(ids)),), Finish.STOP),) * n

    class Lost:
        async def check(self, problem: Problem, text: str) -> Verdict:
            raise DeadlineError("the verifier", 1.0)

    problem = Problem("text", "math", "search", "4", "")
    domain, asked = TextDomain(problem, Lost()), Remembering(policy(Ends()))  # type: ignore[arg-type]  # a generator is enough
    search = Search("dfs", lambda _: domain, Options(1), max_retries=0)
    grown = asyncio.run(search.grown(problem, asked, Table({}), Budget(9)))
    assert (grown.tree.end, [n.text for n in grown.tree.nodes]) == (End.FAILED, ["", "3 *5 =15", ""])
    assert grown.tree.nodes[2].verdict is None and grown.states[2] == TextState(("3 *5 =15", ""), True)
    assert [s.node for s in all_samples(grown, domain, asked.asked)] == [1], "the end has no value"


def test_giving_up_has_the_value_0_and_a_step_that_came_again_that_of_its_node() -> None:
    tree, samples, _ = grown("bfs")
    refused = [s for s in samples if s.node == NO_NODE and TOKENIZER.decode(s.ids) == BACK]
    assert refused and all(s.value == 0.0 for s in refused)
    again = [s for s in samples if s.node == NO_NODE and TOKENIZER.decode(s.ids) != BACK]
    below = {(n.parent, n.text): n.value for n in tree.nodes}
    known = [(s.value, below[s.parent, text]) for s in again if (s.parent, text := TOKENIZER.decode(s.ids)) in below]
    assert known and all(value == of_node for value, of_node in known)
    assert {s.value for s in again} <= {n.value for n in tree.nodes}


def test_a_search_told_is_imitated_where_it_came_to_a_right_end_and_as_old_as_its_oldest_step() -> None:
    tree, _, _ = grown("dfs", nodes=300, task=EASY)
    assert tree.answer != NO_NODE
    rng = random.Random(0)
    told = told_trace(tree, EASY, TraceStyle(), TOKENIZER, rng, 10_000, reward)
    loss = [s for s in told.segments if s.mask]
    assert {s.version for s in loss} == {min(v.version for n in tree.nodes for v in n.spans)} and not any(s.logprobs for s in loss)
    assert told.reward == 1.0 and loss[-1].ids[-1] == TOKENIZER.eos_id
    path = told_trace(tree, EASY, TraceStyle(mask=Mask.PATH), TOKENIZER, rng, 10_000, reward)
    assert 0 < sum(len(s.ids) for s in path.segments if s.mask) < sum(len(s.ids) for s in loss)
    assert all((s.version == NO_VERSION) == (s.mask == 0) for s in path.segments)
    for untold in (told_trace(tree, EASY, TraceStyle(), TOKENIZER, rng, told.num_tokens - 1, reward), unsolved()):
        assert not any(s.mask for s in untold.segments) and untold.oldest_version == NO_VERSION


def unsolved() -> Trace:
    tree, _, _ = grown("mcts", nodes=1, task=EASY)
    assert tree.answer == NO_NODE
    return told_trace(tree, EASY, TraceStyle(), TOKENIZER, random.Random(0), 10_000, reward)


class Unreliable(Sloppy):
    """Calls of ``fails`` fail; of ``alone`` nobody serves."""

    def __init__(self, fails: frozenset[int] = frozenset(), alone: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self.fails, self.alone, self.asked = fails, alone, 0

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
        self.asked += 1
        if self.asked in self.alone:
            raise NobodyServesError("a server that serves", 1.0)
        if self.asked in self.fails:
            raise ServerFailedError("connection refused")
        return await super().sample(prompt_ids, params, n, rollout_id)


class NoVerifier:
    async def check(self, problem: Problem, text: str) -> Verdict:
        raise AssertionError("an arithmetic search judges itself")


def maker(player: RandomPlayer, **search: object) -> SearchGroups:
    attempts = Attempts(player, NoVerifier(), TOKENIZER, lambda problem, verdict, text, length: float(verdict.correct))
    config = RunConfig()
    block = replace(SearchConfig(value="oracle", nodes=30, prune=False), **search)  # type: ignore[arg-type]
    return search_groups(replace(config, metarl=replace(config.metarl, search=block)), attempts)


def test_a_ticket_is_filled_by_searches_and_its_books_are_right() -> None:
    player = Sloppy()
    group = asyncio.run(maker(player).group(TASK, 17, SamplingParams(8), 3))
    assert (group.ticket, group.problem_id, [t.id for t in group.traces]) == (
        17,
        TASK.id,
        [f"g000017/r{i}" for i in range(len(group.traces))],
    )
    found = books([group])
    assert found["tokens_paid"] == player.num_tokens == found["tokens_trained"] + group.unshown
    assert teaches(group.traces) and not teaches([replace(t, reward=0.0, segments=t.segments[:1]) for t in group.traces])
    lines = laid_out(group, TOKENIZER)
    assert lines[0]["depth"] == 0 and max(line["depth"] for line in lines) == 2 and any("v1" in line["text"] for line in lines)


def test_a_tree_is_computed_once_however_many_paths_it_has() -> None:
    """Tokens of the packed rows against those of the trees' steps and prompt, each once."""
    group = asyncio.run(maker(Sloppy(), nodes=60).group(TASK, 0, SamplingParams(8), 2))
    unique = {()} | {ids[:n] for t in group.traces for ids in [tuple(i for s in t.segments for i in s.ids)] for n in range(1, len(ids) + 1)}
    staleness, objective = StalenessConfig(admission_slack=20), ObjectiveConfig(baseline="none")
    flat, shared = (
        pack_rl([group], 30, staleness=staleness, objective=objective, max_new_tokens=8, layout=Layout(2048, share_prefixes=share)).stats
        for share in (False, True)
    )
    assert shared.num_rows <= 1.2 * (len(unique) - 1) < flat.num_rows / 2
    assert shared.loss_tokens == flat.loss_tokens == books([group])["tokens_trained"]


@pytest.mark.parametrize("trains", ["steps", "traces", "preferences"])
def test_a_reader_sees_the_tree_or_the_telling_and_a_row_what_it_cost(tmp_path: Path, trains: str) -> None:
    group = asyncio.run(maker(Sloppy(), trains=trains, strategy="dfs").group(EASY, 0, SamplingParams(8), 2))
    objective = {"steps": {}, "traces": {"loss": "sft"}, "preferences": {"loss": "dpo", "aggregation": "sequence_mean"}}[trains]
    config = small_config(tmp_path, rollout={"method": "search", "record_every": 1}, search={"trains": trains}, objective=objective)
    paths, events = small_paths(config), EventLog(tmp_path / "events.jsonl", "orchestrator")
    writer = MetricsWriter(paths, config.metarl.logging)
    board = Scoreboard(config, paths, writer, TicketQueue(2, 1, 1, "token", 3), Tally(), TOKENIZER, events)
    board.group(group, EASY)
    board.delivered([group], 0.75)
    asyncio.run(board.step(Phase.RL, 1, {}))
    board.close()
    (row,) = read_jsonl(paths.metrics)
    assert row["searched"] == {**books([group]), "prefix_cache_hit_rate": 0.75} and "search" not in row
    (rollout,) = read_jsonl(paths.rollouts)
    kinds = {line["kind"] for line in rollout["lines"]}
    assert ("solution" in kinds) == (trains == "traces") and kinds & {"goal", "dead_end"}


def test_preferences_of_searches_are_pairs_of_steps_that_they_sampled() -> None:
    player = Sloppy()
    group = asyncio.run(maker(player, trains="preferences", value="heuristic", margin=0.1, nodes=60).group(TASK, 3, SamplingParams(8), 2))
    assert len(group.traces) % 2 == 0 and books([group])["tokens_trained"] + group.unshown == player.num_tokens
    steps = [[s for s in t.segments if s.mask] for t in group.traces]
    assert all((s.advantage or 0.0) * (-1) ** i >= 0.1 for i, some in enumerate(steps) for s in some)
    assert any(TOKENIZER.decode(some[0].ids) == BACK for some in steps[1::2] if some), "a step that was refused is a worse one"
    objective = ObjectiveConfig(loss="dpo", aggregation="sequence_mean")
    staleness, layout = StalenessConfig(admission_slack=20), Layout(2048, share_prefixes=True)
    batch = pack_rl([group], 30, staleness=staleness, objective=objective, max_new_tokens=8, layout=layout).stats
    unique = {ids[:n] for t in group.traces for ids in [tuple(i for s in t.segments for i in s.ids)] for n in range(1, len(ids) + 1)}
    assert batch.num_rows <= 1.2 * len(unique) < batch.num_tokens / 2


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_one_step_a_place_makes_no_pair_which_is_why_that_is_refused(strategy: str) -> None:
    options = {"trains": "preferences", "value": "heuristic", "strategy": strategy, "margin": 1e-6}
    for width, expected in ((1, False), (4, True)):
        group = asyncio.run(maker(Sloppy(), width=width, **options).group(EASY, 0, SamplingParams(8), 4))
        assert any(s.mask for t in group.traces for s in t.segments) == expected


def test_told_searches_make_one_trace_each() -> None:
    group = asyncio.run(maker(Sloppy(), trains="traces", strategy="dfs").group(EASY, 0, SamplingParams(8), 2))
    assert len(group.traces) == 2 and all(t.verdict.correct and any(s.mask for s in t.segments) for t in group.traces)
    assert teaches(group.traces, imitated=True), "equal rewards: all the searches are right, and all are imitated"
    failed = [replace(t, reward=float(i), segments=t.segments[:1]) for i, t in enumerate(group.traces)]
    assert not teaches(failed, imitated=True) and not teaches(failed), "without a loss there is nothing to learn, whatever the rewards"


def test_a_lost_server_costs_no_finished_node_and_none_serving_is_waited_for() -> None:
    whole = asyncio.run(maker(Sloppy(), nodes=12).group(TASK, 0, SamplingParams(8), 1))
    troubled = Unreliable(fails=frozenset({2, 3, 9}), alone=frozenset({5, 6}))
    assert asyncio.run(maker(troubled, nodes=12).group(TASK, 0, SamplingParams(8), 1)) == whole
    part = Unreliable(fails=frozenset(range(3, 99)))
    group = asyncio.run(maker(part, nodes=12).group(TASK, 0, SamplingParams(8), 1))
    assert books([group])["tokens_trained"] == part.num_tokens > 0
    with pytest.raises(ServerFailedError, match="g000004/0: connection refused"):
        asyncio.run(maker(Unreliable(fails=frozenset(range(99))), nodes=12).group(TASK, 4, SamplingParams(8), 1))


def test_steps_toward_a_solution_have_the_better_credit() -> None:
    """With the exact oracle a step's sign says whether the problem can still be solved after it."""
    tree = asyncio.run(Search("bfs", ArithmeticDomain, Options(6), 0).run(EASY, policy(Sloppy()), OracleValue(), Budget(60)))
    samples = node_samples(tree)
    below: dict[int, set[float]] = {}
    for sample in samples:
        below.setdefault(sample.parent, set()).add(sample.value)
    mixed = [(s, a) for s, a in zip(samples, advantages(tree, samples, Baseline.SIBLINGS), strict=True) if len(below[s.parent]) == 2]
    domain = ArithmeticDomain(EASY)
    assert mixed
    for sample, advantage in mixed:
        state = domain.root
        for node in tree.path(sample.node):
            state = domain.step(state, node.text, False).state  # type: ignore[union-attr]
        assert (advantage > 0) == solvable(state, 6, MAX_VALUE)  # type: ignore[arg-type]
