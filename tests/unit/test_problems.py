"""Generated problems: solvable, split by multiset, the same for the same seed; and the cursor over them."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from neox_rl.arithmetic import legal_moves, solutions
from neox_rl.config.schema import ProblemsConfig
from neox_rl.errors import ConfigError
from neox_rl.metacot import prompt_text
from neox_rl.problems.solver import rationally_solvable
from neox_rl.problems.sources import ProblemCursor, load_problems
from neox_rl.problems.split import ProblemSet

GAME24 = ProblemsConfig(source="game24", num_numbers=4, max_number=13)


@pytest.fixture(scope="module")
def countdown() -> ProblemSet:
    return load_problems(ProblemsConfig(), seed=1)


def test_countdown_holds_every_solvable_problem_once(countdown: ProblemSet) -> None:
    ids = [p.id for p in (*countdown.train, *countdown.heldout)]
    assert len(ids) == len(set(ids)) == 1720
    assert countdown.counts == {"train_clusters": 124, "heldout_clusters": 41}
    for problem in countdown.heldout:
        numbers, target = problem.meta["numbers"], problem.meta["target"]
        assert next(solutions(tuple(numbers), target, 60), None) is not None, problem.id
        assert sorted(problem.prompt.split()) == sorted(prompt_text(numbers, target).split()) and problem.answer == str(target)
    assert "countdown/3,5,7->26" in ids


def test_as_many_heldout_problems_are_behind_each_door() -> None:
    """A policy that only names one door is right 1/N of the time then, whichever it names."""
    doors = ProblemsConfig(source="goal_finding", num_goals=4)
    for seed in (1, 2):
        heldout = load_problems(doors, seed).heldout
        assert set(Counter(p.answer for p in heldout[:300]).values()) == {75}
        assert {p.cluster for p in heldout}.isdisjoint(p.cluster for p in load_problems(doors, seed).train)


@pytest.mark.parametrize("cfg", [ProblemsConfig(), GAME24])
def test_train_and_heldout_share_no_multiset_whatever_the_seed(cfg: ProblemsConfig) -> None:
    sets = [load_problems(cfg, seed) for seed in (1, 2)]
    for problems in sets:
        assert {p.cluster for p in problems.train}.isdisjoint(p.cluster for p in problems.heldout)
        assert problems.heldout
    assert sets[0] != sets[1], "another seed holds other multisets out"
    assert load_problems(cfg, 1) == sets[0]


def test_game24_plays_in_integers_and_says_how_many_hands_need_fractions() -> None:
    problems = load_problems(GAME24, seed=1)
    assert len(problems.train) + len(problems.heldout) + problems.counts["beyond_integer_steps"] == 1362
    assert all(p.meta["target"] == 24 and p.task == "game24" for p in problems.train)


def test_exactly_1362_of_the_1820_hands_reach_24_over_the_rationals() -> None:
    hands = itertools.combinations_with_replacement(range(1, 14), 4)
    assert sum(rationally_solvable(hand, 24) for hand in hands) == 1362
    assert rationally_solvable((1, 3, 4, 6), 24), "6 / (1 - 3/4)"


def test_rational_solver_never_divides_by_zero() -> None:
    assert rationally_solvable((0, 0), 0) and rationally_solvable((0, 3), 0) and rationally_solvable((0, 3), 3)
    assert not rationally_solvable((0, 3), 1) and not rationally_solvable((0, 0), 1)
    assert not rationally_solvable((2, 3), 0)


def test_integer_steps_are_a_subset_of_the_rational_ones() -> None:
    for hand in itertools.combinations_with_replacement(range(1, 10), 3):
        if any(True for _ in solutions(hand, 24, 1000)):
            assert rationally_solvable(hand, 24)
    assert legal_moves((1, 3, 4, 6), 60) and not list(solutions((1, 3, 4, 6), 24, 1000))


def test_limit_keeps_that_many_training_problems_and_all_held_out(countdown: ProblemSet) -> None:
    limited = load_problems(ProblemsConfig(limit=50), seed=1)
    assert len(limited.train) == 50 and {p.id for p in limited.train} < {p.id for p in countdown.train}
    assert limited.heldout == countdown.heldout


def test_the_first_held_out_problems_are_spread_over_the_multisets(countdown: ProblemSet) -> None:
    assert len({p.cluster for p in countdown.heldout[:128]}) > 30


def test_too_many_multisets_are_sampled_by_seed() -> None:
    cfg = ProblemsConfig(num_numbers=3, max_number=60, limit=10)
    problems = load_problems(cfg, seed=3)
    assert problems.counts["train_clusters"] + problems.counts["heldout_clusters"] <= 5000
    assert problems == load_problems(cfg, seed=3)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (ProblemsConfig(max_target=61), "max_value 60"),
        (ProblemsConfig(source="game24", num_numbers=5), "num_numbers 5"),
        (ProblemsConfig(source="game24", max_number=14), "max_number 14"),
        (ProblemsConfig(source="game24", max_value=20), "max_value 20"),
        (ProblemsConfig(source="magic"), "'magic'"),
        (ProblemsConfig(max_number=2, num_numbers=2, heldout_frac=0.9), "leave nothing to train on"),
        (ProblemsConfig(source="jsonl"), r"problems\.path"),
    ],
)
def test_rules_that_clash_are_refused_by_name(cfg: ProblemsConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_problems(cfg, seed=1)


def test_cursor_visits_every_problem_once_an_epoch_in_changing_order(countdown: ProblemSet) -> None:
    problems = countdown.train[:20]
    cursor = ProblemCursor(problems, seed=5)
    epochs = [[cursor.next().id for _ in problems] for _ in range(3)]
    assert all(sorted(epoch) == sorted(p.id for p in problems) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("taken", [0, 7, 20, 33])
def test_restored_cursor_continues_exactly(countdown: ProblemSet, taken: int) -> None:
    problems = countdown.train[:20]
    cursor, resumed = ProblemCursor(problems, seed=5), ProblemCursor(problems, seed=5)
    for _ in range(taken):
        cursor.next()
    resumed.restore(cursor.state())
    assert [cursor.next() for _ in range(30)] == [resumed.next() for _ in range(30)]


def test_cursor_refuses_the_state_of_another_run(countdown: ProblemSet) -> None:
    state = ProblemCursor(countdown.train, seed=5).state()
    for other in (ProblemCursor(countdown.train, seed=6), ProblemCursor(countdown.train[1:], seed=5)):
        with pytest.raises(ConfigError, match="does not fit"):
            other.restore(state)
    with pytest.raises(ConfigError, match="does not fit"):
        ProblemCursor(countdown.train, seed=5).restore({**state, "position": -1})
