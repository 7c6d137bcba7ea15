"""What the experiments compute from their measurements, and how they keep what they have made."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from neox_rl.config.load import load_config
from neox_rl.engines.mcore_state import rank_file
from neox_rl.problems.sources import load_problems
from neox_rl.search.earlier import earlier_of, told_before_path
from neox_rl.search.trees import tree_line
from neox_rl.telemetry.paths import RunPaths
from neox_rl.telemetry.stats import Interval
from neox_rl.telemetry.status import Status, write_status
from neox_rl.types import NO_NODE, Node, Problem, Tree

TOOLS = Path(__file__).resolve().parents[2] / "tools/experiments"


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Imports a program of tools/experiments, whose modules are found beside it when it is run; none of them is left behind."""
    monkeypatch.syspath_prepend(str(TOOLS))
    known = set(sys.modules)

    yield importlib.import_module
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(TOOLS)):
            del sys.modules[name]


def test_a_mean_that_rounding_put_outside_its_interval_is_drawn(experiment) -> None:
    common: ModuleType = experiment("common")
    figure, (axes,) = common.panels(1)
    common.error_bars(axes, [1.0, 2.0], [Interval(1.0 + 1e-16, 1.0, 1.0, 3), Interval(0.3, 0.30000000000000004, 0.4, 3)], "a", "black")
    common.plt.close(figure)


def test_other_settings_make_another_run(experiment) -> None:
    job = experiment("common").Job
    assert job("a", ("train_iters=1",)).name == job("a", ("train_iters=1",)).name
    others = (job("a", ("train_iters=2",)), job("a", ("train_iters=1",), "rl2"), job("a", ("train_iters=1",), data="other"))
    assert len({job("a", ("train_iters=1",)).name, *(other.name for other in others)}) == 4


def test_a_run_that_was_stopped_is_made_again(experiment, tmp_path: Path) -> None:
    job = experiment("common").Job("a", ())
    paths = RunPaths.of(tmp_path / job.name)
    paths.root.mkdir()
    paths.summary.write_text("{}")
    for steps, finished in ((83, False), (650, True)):
        write_status(paths.status, Status(phase="done", step=steps, total_steps=650))
        assert job.finished(tmp_path) is finished


def test_a_job_that_fails_gives_its_core_to_the_next(experiment, tmp_path: Path) -> None:
    common = experiment("common")
    ran: list[int | None] = []

    class Failing(common.Job):  # type: ignore[misc, name-defined]
        def run(self, work: Path, core: int | None) -> None:
            ran.append(core)
            raise SystemExit(f"{self.title} failed")

    jobs = [Failing(str(number), ()) for number in range(3 * len(common.CORES))]
    with pytest.raises(SystemExit, match="failed"):
        common.run_jobs(jobs, argparse.Namespace(work=tmp_path, end=np.inf))
    assert len(ran) == len(jobs)


def test_levels_are_of_equal_size_and_follow_the_people_where_they_are_known(experiment, tmp_path: Path) -> None:
    common = experiment("common")
    hands = [(1, 1, 4, 6), (1, 1, 11, 11), (3, 3, 8, 8), (1, 5, 5, 5)]
    rates = tmp_path / "24.csv"
    lines = [f"1,{' '.join(map(str, hand))},4.4,{rate}%,1,1" for hand, rate in zip(hands, (99.2, 99.6, 40.0, 60.0), strict=True)]
    rates.write_text("\n".join(["Rank,Puzzles,AMT (s),Solved rate,1-sigma Mean (s),1-sigma STD (s)", *lines]) + "\n")
    problems = [Problem(str(i), "game24", "", "24", str(i), {"numbers": list(hand[::-1]), "target": 24}) for i, hand in enumerate(hands)]
    assert common.levels(problems, rates) == {"1": 0, "0": 1, "3": 2, "2": 3}


def test_fits_find_the_curve_that_made_the_points(experiment) -> None:
    test_time = experiment("test_time")
    true = (0.8, 1.2, 5.0)
    points = [Interval(float(test_time.sigmoid(np.log2(b), *true)), 0.0, 1.0, 80) for b in test_time.BUDGETS]
    assert np.allclose(test_time.fitted(points), true, rtol=0.1)
    assert test_time.between(points) == pytest.approx(2 ** (5.0 + np.log(0.5 / 0.3) / 1.2), rel=0.05)  # where top / (1 + e^..) is 1/2
    slope, reach, _, fit = test_time.line([(1e6, 100.0), (2e6, 50.0), (4e6, 25.0), (8e6, 12.5)])
    assert slope == pytest.approx(-1.0)
    assert reach == pytest.approx(0.0, abs=1e-6)
    assert fit == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("scores", "labels", "accuracy", "cut"),
    [
        ([0.5] * 6, [False, True] * 3, 0.5, 0.5),
        ([0.5] * 6, [False] * 3 + [True] * 3, 0.5, 0.5),
        ([0.1, 0.2, 0.2, 0.9], [False, True, False, True], 0.75, 0.2),
        ([0.1, 0.2, 0.3], [False, False, True], 1.0, 0.3),
        ([0.1, 0.2, 0.3], [True, True, True], 1.0, 0.1),
        ([0.1, 0.2], [False, False], 1.0, np.inf),
    ],
)
def test_the_best_cut_parts_no_equal_scores(experiment, scores: list[float], labels: list[bool], accuracy: float, cut: float) -> None:
    assert experiment("prm").best_accuracy(scores, labels) == (accuracy, cut)


def test_measurements_are_kept_by_the_weights_that_were_measured_and_by_what_was_asked(
    experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is made anew under its old name has other weights, and nothing of the old ones is to pass for them."""
    searching, prm = experiment("searching"), tmp_path / "prm"
    (tmp_path / "config.yml").write_text("seed: 1")
    args = argparse.Namespace(run=tmp_path, work=tmp_path, prm=prm)
    policy, wanted = searching.Checkpoint("SFT 1", tmp_path, 1.0), {"blind": ["--width", "4"], "led": ["--value", "prm"]}

    def made(weights: str, critic: str) -> tuple[Path, Path, Path]:
        prm.mkdir(exist_ok=True)
        (tmp_path / "model.safetensors").write_text(weights)
        (prm / "model.safetensors").write_text(critic)
        home, files = searching.kept(args, policy, [], wanted)
        assert home == files["blind"].parent
        return searching.export_of(args, 1, tmp_path / "model.safetensors"), files["blind"], files["led"]

    first, other, led = made("a", "x"), made("b", "x"), made("a", "y")
    assert first == made("a", "x")
    assert all(one != another for one, another in zip(first, other, strict=True))
    assert [one == another for one, another in zip(first, led, strict=True)] == [True, True, False], "only what asks it"
    monkeypatch.setattr(searching, "SEED", searching.SEED + 1)
    assert made("a", "x")[1:] != first[1:]


EXPRESSION = "( 7 * 3 ) + 5"


def searched(tokens: int, solved: bool = False, end: str = "exhausted") -> dict[str, object]:
    """A line of ``python -m neox_rl.search``."""
    answer = EXPRESSION if solved else None
    return {"id": "p", "solved": solved, "answer": answer, "nodes": 2, "tokens": tokens, "end": "solved" if solved else end, "counts": {}}


def test_a_checkpoint_that_a_run_has_not_is_refused_with_those_that_it_has(experiment, tmp_path: Path) -> None:
    """The main job saves every 200 steps; the points of the tables are of a run that saves every 100."""
    for step in (200, 1400):
        directory = tmp_path / "checkpoints" / f"step{step:06d}"
        directory.mkdir(parents=True)
        rank_file(directory, 0).touch()
    with pytest.raises(SystemExit, match=r"of steps 200, 1400, and not of 1300: .*--checkpoints, .*checkpoint_factor=100"):
        experiment("searching")._exported(argparse.Namespace(run=tmp_path), 1300)


def test_a_tree_and_an_attempt_in_context_that_are_the_same_cost_the_same(experiment, tmp_path: Path) -> None:
    """The trees before the one that was right are paid, as attempts in context are, and so is the answer, which is written there."""
    searching = experiment("searching")
    problem = Problem("p", "countdown", "", "26", "c", {})

    def spent(*lines: dict[str, object]) -> float:
        file, context = tmp_path / "tree.jsonl", tmp_path / "context.json"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        context.write_text(json.dumps({"p": [(True, len(straight.split()))]}))
        found = searching._read({"tree": file}, context, [problem])
        assert found[searching.IN_CONTEXT] == [searching.Spent("p", "c", 16.0)]
        return found["tree"][0].tokens

    straight = f"7 *3 =21 21 +5 =26 goal solution {EXPRESSION} <eos>"
    assert spent(searched(6, solved=True)) == len(straight.split()) == 6 + searching.ANSWER_TOKENS
    assert spent(searched(40), searched(40), searched(20, solved=True)) == 100 + searching.ANSWER_TOKENS
    assert spent(searched(40), searched(40)) == np.inf


def test_a_tree_that_is_exhausted_is_followed_by_another_until_the_budget_is_gone(
    experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searching, asked = experiment("searching"), list[tuple[str, list[str]]]()
    problems = {id: Problem(id, "math", id, "1", id) for id in ("at once", "third", "never", "cut", "free")}
    trees = {
        "at once": [searched(20, solved=True)],
        "third": [searched(40), searched(40), searched(20, solved=True)],
        "never": [searched(200)] * 3,
        "cut": [searched(100, end="budget")],
        "free": [searched(0)],
    }

    async def command(argv: list[str], out: Path) -> None:
        ids = [json.loads(line)["id"] for line in Path(argv[argv.index("--problems") + 1]).read_text().splitlines()]
        seed = argv[argv.index("--seed") + 1]
        asked.append((seed, ids))
        with out.open("a") as file:
            file.writelines(json.dumps({**trees[id][int(seed) - 1], "id": id}) + "\n" for id in ids)

    monkeypatch.setattr(searching, "_command", command)
    servers, out = searching.Servers("", tmp_path, "", None), tmp_path / "tree.jsonl"
    asyncio.run(searching._searches(servers, [], list(problems.values()), True, out))
    assert asked == [("1", list(problems)), ("2", ["third", "never"]), ("3", ["third", "never"])]
    assert {id: len(lines) for id, lines in searching.lines_of(out).items()} == {id: len(lines) for id, lines in trees.items()}
    assert [file.name for file in tmp_path.iterdir()] == [out.name]
    asked.clear()
    asyncio.run(searching._searches(servers, [], list(problems.values()), False, out))
    assert asked == [("1", list(problems))]


def test_best_of_n_pays_for_its_answer_within_its_budget(experiment) -> None:
    searching = experiment("searching")
    asked = searching.commands(argparse.Namespace(), full=False)
    for budget, attempts in ((16, 1), (32, 3), (512, 83)):
        argv = asked[f"{searching.BEST_OF_N}, {budget}"]
        width, paid = (int(argv[argv.index(name) + 1]) for name in ("--width", "--budget-tokens"))
        assert (width, paid) == (attempts, budget - searching.ANSWER_TOKENS)


def test_a_policy_made_anew_is_another_beginning_of_a_reward_model(experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prm, names = experiment("prm"), set()
    monkeypatch.setattr(prm, "shown", lambda *_: "told")
    for weights in ("a", "b"):
        (tmp_path / "model.safetensors").write_text(weights)
        names.add(prm.job(argparse.Namespace(policy=tmp_path, steps=1, setting=prm.PLAIN), "oracle", tmp_path / "trees.jsonl", []).name)
    assert len(names) == 2


def test_a_meta_critic_is_told_in_the_comparison_what_its_search_had_done(experiment, tmp_path: Path) -> None:
    """What it was trained on: the steps before the round of the judged one, and no later ones."""
    prm = experiment("prm")
    problem = Problem("p", "countdown", "numbers 3 5 7 target 26 search", "26", "c", {"numbers": [3, 5, 7], "target": 26, "max_value": 40})
    steps = [Node(1, 0, "5 +3 =8", 1, value=0.2, seen=1), Node(2, 0, "7 *3 =21", 2, value=0.7, seen=2)]
    path = tmp_path / "trees.jsonl"
    path.write_bytes(tree_line(Tree("p", (Node(0, NO_NODE, "", 0), *steps))) + b"\n")
    first, second = prm.steps_of(path, [problem])
    assert (first.solvable, second.solvable) == (False, True)
    assert (first.told, second.told) == (False, True)
    assert told_before_path(earlier_of(second.position), problem) == ("5 +3 =8", "back")


def test_what_a_meta_critic_is_measured_on_has_steps_that_came_after_dead_ends(experiment, tmp_path: Path) -> None:
    """The steps of three numbers all come from the root's one round: nothing had been tried before any of them."""
    prm = experiment("prm")

    def dead_ends(setting: object) -> set[str]:
        args = argparse.Namespace(work=tmp_path, playouts=1, setting=setting)
        config = load_config([prm.ROOT / "configs/metarl.yml"], [args.setting.problems]).metarl
        some = load_problems(config.problems, config.seed).heldout[:4]
        steps = prm.steps_of(prm.trees(args, "monte-carlo", "heldout", some), some)
        return {word for step in steps for text in earlier_of(step.position).texts for word in text.split()} & {"low", "high"}

    assert dead_ends(prm.PLAIN) == set()
    assert dead_ends(prm.EARLIER) == {"low", "high"}


def test_a_reward_model_and_a_meta_critic_are_two_runs(experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prm = experiment("prm")
    monkeypatch.setattr(prm, "shown", lambda *_: "told")
    plain, critic = (
        prm.job(argparse.Namespace(policy=None, steps=1, setting=prm.EARLIER), "oracle", tmp_path, [], sees) for sees in (False, True)
    )
    assert set(critic.settings) - set(plain.settings) == {prm.SEES_EARLIER}
    assert plain.name != critic.name


def test_the_interval_of_a_difference_is_paired(experiment) -> None:
    """One that ranks every problem as another does is no better anywhere, however uncertain both are."""
    prm = experiment("prm")
    steps = [prm.Step(argparse.Namespace(problem=argparse.Namespace(cluster=str(i % 20))), i % 3 == 0, 0.0, 0) for i in range(60)]
    scores = [float((7 * i) % 11) for i in range(60)]
    low, high = prm.interval(scores, steps)
    assert low < high
    assert prm.interval(scores, steps, less=[10.0 * score for score in scores]) == (0.0, 0.0)


def test_a_search_chooses_among_the_steps_of_a_round(experiment) -> None:
    """What tells late steps from early ones tells none of these apart."""
    prm = experiment("prm")
    at = argparse.Namespace(problem=argparse.Namespace(id="p", cluster="c"))
    steps = [prm.Step(at, solvable, 0.0, seen) for solvable, seen in ((True, 1), (False, 1), (False, 6), (True, 6), (False, 11))]
    assert prm.choices(steps) == [(0, 1), (3, 2)]
    assert prm.preferred([-step.seen for step in steps], prm.choices(steps)) == [0.5, 0.5]
    assert prm.preferred([0.9, 0.1, 0.4, 0.3, 0.8], prm.choices(steps)) == [1.0, 0.0]


def test_half_is_the_median_of_what_each_problem_took(experiment) -> None:
    """Two of four at 40 tokens: half are solved within 40, and a line from 32 to 64 would say 64."""
    test_time, spent = experiment("test_time"), experiment("searching").Spent
    found = {"tree": [spent(str(i), str(i), tokens) for i, tokens in enumerate((np.inf, 40.0, np.inf, 40.0))]}
    assert test_time.half_at(found, "tree") == 40.0
    assert test_time.half_at({"tree": found["tree"][:3]}, "tree") == np.inf
    found |= {"like it": list(found["tree"]), "other": found["tree"][::-1]}
    assert test_time.alike(found, ["tree", "other", "like it"]) == [["tree", "like it"], ["other"]]


def test_the_interval_over_seeds_is_that_of_their_mean(experiment) -> None:
    meta_rl = experiment("meta_rl")
    seeds = [[Interval(mean, 0.0, 1.0, 300)] * meta_rl.DOORS for mean in (0.4, 0.5, 0.6)]
    first = meta_rl.over_seeds(seeds)[0]
    assert first.mean == pytest.approx(0.5)
    assert first.high - first.mean == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)  # t of 2 degrees of freedom
