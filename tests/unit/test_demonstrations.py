"""What a warm start shows beside the solver's searches: recorded trees, right rollouts, values of steps; and the model of those values."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from neox_rl import metacot
from neox_rl.batch.pack import pack_sft
from neox_rl.batch.packing import Layout
from neox_rl.batch.record import record_batch
from neox_rl.config.load import parse
from neox_rl.config.run import RunConfig
from neox_rl.config.schema import ProblemsConfig
from neox_rl.errors import ConfigError
from neox_rl.problems import make_rows
from neox_rl.problems.sources import load_problems, problems_of_run
from neox_rl.problems.tokenizer import load_tokenizer
from neox_rl.run import search_cli
from neox_rl.run.demonstrating import demonstration_source
from neox_rl.run.launch import prepared
from neox_rl.run.search_rows import Asking, read_rows
from neox_rl.search.arithmetic_domain import ArithmeticDomain
from neox_rl.search.credit import before
from neox_rl.search.demonstrations import Demonstrations, TraceStyle, searches, values
from neox_rl.search.dfs import dfs
from neox_rl.search.domain import State
from neox_rl.search.earlier import told_before_path, told_earlier
from neox_rl.search.linearize import Mask, solution_of, tree_of
from neox_rl.search.reward_model import WordValue, value_context, value_ids
from neox_rl.search.styles import STYLES
from neox_rl.search.trees import read_trees, write_trees
from neox_rl.types import NO_VERSION, Finish, Group, Reason, Role, Segment, Trace, Tree, Verdict
from tests.unit.search_worlds import TOKENIZER, countdown
from tests.unit.small_run import rollout_group, small_config, traces_of
from tests.unit.test_search_values import BAD, GOOD

TASK = countdown([3, 5, 7], 26)
TREE = next(tree for seed in range(100) if len((tree := dfs(TASK, random.Random(seed))).nodes) > 20)
SMALL = "metarl.problems.max_number=4 metarl.problems.max_target=12 metarl.warmstart.steps=9"


def of(settings: str) -> RunConfig:
    return parse([], settings.split()).config


def words(trace: Trace) -> list[tuple[str, float]]:
    return [(word, s.mask) for s in trace.segments[1:] for word in TOKENIZER.decode(s.ids).split()]


def told(style: TraceStyle, seed: int = 1) -> list[tuple[str, float]]:
    return words(style.trace(TREE, TASK, TOKENIZER, random.Random(seed), "g000000/r0"))


@pytest.mark.parametrize("telling", sorted(STYLES))
def test_every_telling_ends_in_the_solution(telling: str) -> None:
    trace = TraceStyle(telling).trace(TREE, TASK, TOKENIZER, random.Random(1), "g000000/r0")
    text = " ".join(word for word, _ in words(trace))
    assert trace.segments[-1].ids[-1] == TOKENIZER.eos_id and text.count(metacot.SOLUTION) == 1 and text.count(metacot.GOAL) == 1


def test_masks_leave_out_what_their_equation_leaves_out() -> None:
    everything, search, path = (told(TraceStyle(mask=mask)) for mask in (Mask.ALL, Mask.SEARCH, Mask.PATH))
    assert {m for _, m in everything} == {1.0}
    at = [word for word, _ in everything].index(metacot.SOLUTION)
    assert {m for _, m in search[: at + 1]} == {1.0} and {m for _, m in search[at + 1 :]} == {0.0}, "it learns where the search ends"
    kept = " ".join(word for word, m in path if m)
    assert kept == " ".join([*(node.text for node in solution_of(TREE)), *(word for word, _ in everything[at - 1 :])])


def test_a_step_taken_back_is_context_and_the_way_back_is_trained() -> None:
    """(10) against (24): one masks the wrong steps, the other their branches."""
    for telling, expected in (("backtrack", {metacot.BACK, metacot.LOW, metacot.HIGH}), ("stream", set[str]())):
        seen, trained = set[str](), set[str]()
        for seed in range(12):
            everything, path = (told(TraceStyle(telling, mask), seed) for mask in (Mask.ALL, Mask.PATH))
            assert [word for word, _ in path] == [word for word, _ in everything]
            steps = " ".join(word for word, m in path if m and (word[0] in "+-*/=" or word.isdigit()))
            right = " ".join(node.text for node in solution_of(TREE))
            assert steps.startswith(right), "of the steps the right ones alone, and the solution"
            words_of = [(word, m) for word, m in path if word in (metacot.BACK, metacot.LOW, metacot.HIGH)]
            seen |= {word for word, _ in words_of}
            trained |= {word for word, m in words_of if m}
            assert telling == "stream" or all(m for _, m in words_of)
        assert len(seen) > 1 and trained == expected & seen


@pytest.mark.parametrize("searcher", ["dfs", "mixed"])
def test_half_of_a_solver_s_right_steps_have_a_wrong_one_before_them(searcher: str) -> None:
    config = of(SMALL)
    tokenizer = load_tokenizer(config.metarl.tokenizer, config.metarl.problems)
    problems = problems_of_run(config, tokenizer).train
    known, right, wrong = {p.id: p for p in problems}, 0, 0
    source = searches(problems, searcher, TraceStyle("backtrack"), tokenizer)
    for seed in range(400):
        (trace,) = source(random.Random(seed), "g000000")
        problem = known[trace.problem_id]
        tree = tree_of(problem, tokenizer.decode([i for s in trace.segments[1:] for i in s.ids]))
        path, domain = {node.id for node in solution_of(tree)}, ArithmeticDomain(problem)
        for node in tree.nodes[1:]:
            state: State = domain.root
            for step in tree.path(node.id):
                state = domain.step(state, step.text, False).state  # type: ignore[union-attr]
            assert (domain.solved_value(state) == 1.0) == (node.id in path), "a wrong step is one that cannot be won"
        right, wrong = right + len(path), wrong + len(tree.nodes) - 1 - len(path)
    assert 0.42 < wrong / right < 0.55, "a half, less the places where every step can be won"


def test_pruning_makes_shorter_traces_that_still_end_right() -> None:
    lengths = [len(told(TraceStyle(prune=p))) for p in (0.0, 0.5, 1.0)]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > 2 * lengths[2]
    assert told(TraceStyle(prune=1.0)) == told(TraceStyle("solution"))


def test_searches_over_a_configs_rows_are_its_demonstrations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """make_rows -> search -> warm start, under the ids and in the words of the run; what was held out is never shown."""
    rows, file = tmp_path / "rows.jsonl", tmp_path / "trees.jsonl"
    config = of(f"{SMALL} metarl.warmstart.style=trees metarl.warmstart.path={file}")
    tokenizer = load_tokenizer(config.metarl.tokenizer, config.metarl.problems)
    problems = problems_of_run(config, tokenizer)
    make_rows.write_rows(rows, [*problems.heldout[:40], *problems.train[:60]])
    by_id = {p.id: p for p in (*problems.train, *problems.heldout)}
    for read in read_rows(rows, words=True, asking=Asking()):
        assert read.problem is not None
        expected = by_id[read.problem.id]
        assert (read.problem.prompt, read.problem.meta["target"]) == (expected.prompt, expected.meta["target"])
    options = ["--strategy", "dfs", "--value", "monte-carlo", "--playouts", "4", "--budget-nodes", "12", "--width", "4"]
    assert search_cli.main([*options, "--problems", str(rows), "--trees", str(file)]) == 0
    found = {tree.problem_id: tree for tree in read_trees(file)}
    shown = traces_of(Demonstrations(demonstration_source(config, problems.train, tokenizer), seed=1), 200)
    wanted = {p.id for p in problems.train[:60] if solution_of(found[p.id])}
    assert {trace.problem_id for trace in shown} <= wanted and len(wanted) > 10
    for trace in shown:
        texts = tokenizer.decode([i for s in trace.segments[1:] for i in s.ids])
        assert all(node.text in texts for node in solution_of(found[trace.problem_id]))
    values = replace(config, metarl=replace(config.metarl, warmstart=replace(config.metarl.warmstart, style="values")))
    for trace in traces_of(Demonstrations(demonstration_source(values, problems.train, tokenizer), seed=1), 50):
        assert trace.problem_id in {p.id for p in problems.train[:60]}
    with pytest.raises(ConfigError, match="none of 0 trees of training problems has a right end"):
        demonstration_source(config, problems.train[60:], tokenizer)


def rollout(problem_id: str, right: bool, member: int) -> Trace:
    verdict = Verdict(right, "", Reason.MATCH if right else Reason.MISMATCH, 0.0)
    segments = (
        Segment((5, 6), Role.PROMPT),
        Segment((7, 8 + member), Role.THINK, (-1.0, -2.0), 3, 1.0),
        Segment((9,), Role.ENV, episode=1),
        Segment((1,), Role.SOLUTION, (-0.5,), 4, 0.5, 1),
    )
    return Trace(f"g000000/r{member}", problem_id, segments, float(right), Finish.STOP, verdict)


def test_right_rollouts_are_imitated_as_they_were_written_whoever_wrote_them(tmp_path: Path) -> None:
    config = of(f"{SMALL} metarl.warmstart.style=attempts metarl.warmstart.path={tmp_path}")
    tokenizer = load_tokenizer(config.metarl.tokenizer, config.metarl.problems)
    problems = problems_of_run(config, tokenizer)
    mine, other, held = problems.train[0].id, problems.train[1].id, problems.heldout[0].id
    traces = [
        rollout(id, right, i) for i, (id, right) in enumerate([(mine, True), (mine, False), (held, True), (other, True), (mine, True)])
    ]
    record_batch(tmp_path, "rl", 1, [Group(0, mine, tuple(traces[:3]))])
    record_batch(tmp_path, "rl", 2, [Group(1, mine, tuple(traces[3:]))])
    shown = traces_of(Demonstrations(demonstration_source(config, problems.train, tokenizer), seed=1), 60)
    assert {(t.problem_id, t.segments[1].ids[1]) for t in shown} == {(mine, 8), (mine, 12), (other, 11)}
    assert shown[1].id == "g000001/r0"
    for trace in shown:
        assert [s.mask for s in trace.segments] == [0.0, 1.0, 0.0, 1.0], "what the environment said is context"
        assert all(s.version == NO_VERSION and not s.logprobs for s in trace.segments)
    share = sum(t.problem_id == other for t in shown) / len(shown)
    assert 0.3 < share < 0.7, "by problem, not by rollout"
    with pytest.raises(ConfigError, match="none of 5 recorded rollouts is a right one"):
        demonstration_source(config, problems.train[2:], tokenizer)
    for path in (tmp_path / "rl-000001.batch", tmp_path / "rl-000002.batch"):
        path.unlink()
    with pytest.raises(ConfigError, match="holds no batch of phase rl; give a directory"):
        demonstration_source(config, problems.train, tokenizer)


def test_training_alone_on_batches_that_nobody_recorded_is_refused(tmp_path: Path) -> None:
    """It would train no step and end with status 0."""
    config = small_config(tmp_path, debug={"mode": "train_only", "batches": str(tmp_path)}, warmstart={"steps": 0})

    def start(config: RunConfig) -> None:
        with prepared(config, "train.py", resume=False):
            pass

    with pytest.raises(ConfigError, match="holds no batch of phase rl, and 3 such steps are to be trained"):
        start(config)
    record_batch(tmp_path, "rl", 1, [rollout_group(0, 0)])
    start(config)
    warm = replace(config, metarl=replace(config.metarl, warmstart=replace(config.metarl.warmstart, steps=2)))
    with pytest.raises(ConfigError, match="holds no batch of phase sft, and 2 such steps are to be trained"):
        start(warm)


@pytest.mark.parametrize(("name", "content"), [("bad.jsonl", b"{}\n"), ("gone.jsonl", None)])
def test_a_file_that_holds_no_trees_is_named(name: str, content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    config = of(f"{SMALL} metarl.warmstart.style=trees metarl.warmstart.path={tmp_path / name}")
    with pytest.raises(ConfigError, match=f"metarl.warmstart.path = .*{name}"):
        demonstration_source(config, (TASK,), TOKENIZER)


def valued(value: float) -> Tree:
    nodes = TREE.nodes
    return replace(TREE, nodes=(nodes[0], *(replace(node, value=value, seen=node.id) for node in nodes[1:])))


@pytest.mark.parametrize("value", [0.0, 0.25, 1.0])
def test_the_word_of_a_step_is_hopeful_as_often_as_its_value_says(value: float, tmp_path: Path) -> None:
    write_trees(tmp_path / "trees.jsonl", [valued(value)])
    config = of(f"{SMALL} metarl.warmstart.style=values metarl.warmstart.path={tmp_path / 'trees.jsonl'}")
    traces = traces_of(Demonstrations(demonstration_source(config, (TASK,), TOKENIZER), seed=1), 2000)
    paths = {tuple(node.text for node in TREE.path(n.id)) for n in TREE.nodes[1:]}
    assert {trace.segments[0].ids for trace in traces} == {value_context(TASK, path, TOKENIZER) for path in paths}
    hopeful, hopeless = value_ids(TOKENIZER)
    said = [trace.segments[1].ids for trace in traces]
    assert set(said) <= {(hopeful,), (hopeless,)} and all(t.segments[1].mask == 1.0 and t.segments[0].mask == 0.0 for t in traces)
    assert abs(said.count((hopeful,)) / len(said) - value) <= 4 * math.sqrt(0.25 / len(said))


def test_a_meta_critic_is_shown_what_the_search_did_before_each_step(tmp_path: Path) -> None:
    tree = valued(0.5)
    write_trees(tmp_path / "trees.jsonl", [tree])
    config = of(
        f"{SMALL} metarl.warmstart.style=values metarl.warmstart.path={tmp_path / 'trees.jsonl'} metarl.warmstart.sees_earlier=true"
    )
    group = next(Demonstrations(demonstration_source(config, (TASK,), TOKENIZER), seed=1))
    shown = {trace.segments[0].ids for trace in group.traces}
    for node in tree.nodes[1:]:
        told = told_earlier(before(tree, node, verdicts=True), TASK)
        path = [n.text for n in TREE.path(node.id)]
        assert value_context(TASK, path, TOKENIZER, told_before_path(told, TASK), config.neox.seq_length - 1) in shown
    assert max(map(len, shown)) > len(value_context(TASK, [n.text for n in TREE.path(TREE.nodes[-1].id)], TOKENIZER))


def test_all_steps_of_a_tree_are_judged_at_once_and_their_common_beginnings_computed_once(tmp_path: Path) -> None:
    write_trees(tmp_path / "trees.jsonl", [valued(0.5)])
    config = of(f"{SMALL} metarl.warmstart.style=values metarl.warmstart.path={tmp_path / 'trees.jsonl'}")
    group = next(Demonstrations(demonstration_source(config, (TASK,), TOKENIZER), seed=1))
    steps = len(TREE.nodes) - 1
    assert sorted(t.id for t in group.traces) == sorted(f"g000000/r{i}" for i in range(steps)) and group.problem_id == TASK.id
    assert {t.segments[0].ids for t in group.traces} == {
        value_context(TASK, [n.text for n in TREE.path(node.id)], TOKENIZER) for node in TREE.nodes[1:]
    }
    stats = pack_sft([group], 1, layout=Layout(2048, share_prefixes=True)).stats
    own = len(TOKENIZER.encode(TASK.prompt)) + sum(len(TOKENIZER.encode(node.text)) for node in TREE.nodes[1:])
    assert stats.loss_tokens == steps and stats.num_rows <= own + steps < stats.num_tokens


def of_values(tree: Tree, **given: object) -> Demonstrations:
    return Demonstrations(values([(tree, TASK)], TOKENIZER), 1, **given)  # type: ignore[arg-type]


def rows_of(groups: Sequence[Group], shared: bool) -> int:
    return pack_sft(groups, 1, layout=Layout(1 << 16, share_prefixes=shared)).stats.num_rows


@pytest.mark.parametrize("shared", [True, False])
def test_a_step_holds_as_many_trees_as_are_computed_for_its_tokens(shared: bool) -> None:
    tree = valued(0.5)
    (alone,) = of_values(tree, step_tokens=1, max_tokens=1 << 20, shared=shared).step()
    assert len(alone.traces) == 1, "one label, however little a step may hold"
    whole = next(of_values(tree))
    one = rows_of([whole], shared)
    groups = of_values(tree, step_tokens=10 * one, shared=shared).step()
    assert 10 * one <= rows_of(groups, shared) < 12 * one, "which word a step gets is drawn, so trees differ in their last tokens"
    assert all(len(group.traces) == len(tree.nodes) - 1 for group in groups) and len({t.id for g in groups for t in g.traces}) == len(
        groups
    ) * len(whole.traces)
    part = of_values(tree, step_tokens=one // 2, shared=shared)
    for group in (next(part) for _ in range(5)):
        assert 1 < len(group.traces) < len(tree.nodes) - 1 and rows_of([group], shared) <= one // 2, "a step holds one demonstration"


def test_a_label_that_is_too_long_does_not_cost_its_tree() -> None:
    whole = next(of_values(valued(0.5)))
    lengths = sorted(t.num_tokens for t in whole.traces)
    shown = of_values(valued(0.5), max_tokens=lengths[-1] - 1)
    part = next(shown)
    assert len(part.traces) == sum(n < lengths[-1] for n in lengths) > 0 and shown.skipped == 0
    nothing = of_values(valued(0.5), max_tokens=lengths[0] - 1)
    with pytest.raises(ConfigError, match="raise seq_length"):
        next(nothing)


class Says:
    """Log-probs of the next token by what the prompt ends in."""

    async def next_token(self, prompts: Sequence[Sequence[int]], ids: Sequence[int]) -> Sequence[Sequence[float]]:
        self.prompts, self.ids = [TOKENIZER.decode(p) for p in prompts], list(ids)
        return [(math.log(0.6), math.log(0.2)) if p.endswith("=21") else (-math.inf, -math.inf) for p in self.prompts]


def test_the_value_is_the_share_of_the_hopeful_word_and_unknown_where_neither_is_said() -> None:
    model = Says()
    scores = asyncio.run(WordValue(model, TOKENIZER).score([GOOD, BAD], None))
    assert scores.values[0] == pytest.approx(0.75) and math.isnan(scores.values[1]) and scores.num_tokens == 2
    assert model.prompts[0] == f"{TASK.prompt} 7 *3 =21" and model.ids == list(value_ids(TOKENIZER))
    assert asyncio.run(WordValue(model, TOKENIZER).score([GOOD, BAD], 1)).num_tokens == 0, "what it cannot pay it does not ask"


def test_words_that_begin_alike_make_no_reward_model() -> None:
    class OneToken:
        eos_id, vocab_size = 0, 2

        def encode(self, text: str) -> tuple[int, ...]:
            return (1,)

        def encode_prompt(self, text: str) -> tuple[int, ...]:
            return (1,)

        def decode(self, ids: Sequence[int]) -> str:
            return ""

    with pytest.raises(ConfigError, match="same token"):
        value_ids(OneToken())


@pytest.mark.parametrize("template", ["", "Q {problem}"])
def test_a_search_over_rows_of_text_problems_asks_what_the_run_asks(tmp_path: Path, template: str) -> None:
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"problem": f"What is {i}+2?", "answer": i + 2}) + "\n" for i in range(9)))
    problems = load_problems(ProblemsConfig(source="jsonl", path=str(tmp_path / "texts.jsonl"), template=template), 1).train
    make_rows.write_rows(tmp_path / "rows.jsonl", problems)
    read = [row.problem for row in read_rows(tmp_path / "rows.jsonl", False, Asking.of(template) if template else Asking())]
    assert [(p.id, p.task, p.prompt, p.answer) for p in read if p] == [(p.id, p.task, p.prompt, p.answer) for p in problems]
