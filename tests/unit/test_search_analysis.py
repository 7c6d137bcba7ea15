"""What the analysis sees in a policy's search: each flaw once, where it is, and nothing where all is right."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neox_rl import metacot
from neox_rl.metacot import BACK, GOAL, HIGH, LOW, SOLUTION, Step, prompt_text, step_text
from neox_rl.search.analyze import SearchAnalysis, analyze, summarize
from neox_rl.search.dfs import dfs
from neox_rl.search.linearize import linearize, text_of
from neox_rl.search.render import render
from neox_rl.search.replay import Flaw, Kind, replay
from neox_rl.types import Problem

NUMBERS, TARGET = [3, 5, 7], 26
PROBLEM = Problem(
    "countdown/3,5,7->26", "countdown", prompt_text(NUMBERS, TARGET), "26", "3,5,7", {"numbers": [3, 5, 7], "target": 26, "max_value": 60}
)


def step(left: int, operator: str, right: int, result: int) -> str:
    return step_text(Step(left, operator, right, result))


GOOD = f"{step(7, '*', 3, 21)} {step(21, '+', 5, 26)} {GOAL} {SOLUTION} ( 7 * 3 ) + 5"


def look(text: str) -> SearchAnalysis:
    return analyze(PROBLEM, text)


def flaws(text: str) -> list[Flaw]:
    return [p.flaw for p in replay(PROBLEM, text) if p.flaw is not None]


@given(st.integers(0, 10_000))
def test_a_demonstration_has_no_flaw(seed: int) -> None:
    tree = dfs(PROBLEM, random.Random(seed))
    text = text_of(linearize(tree, PROBLEM))
    seen = look(f"{text} {metacot.EOS}")
    assert flaws(text) == [] and seen.num_repeated == seen.num_early_backtracks == seen.num_junk_words == 0
    assert seen.num_nodes == seen.nodes_to_goal == len(tree.nodes) - 1
    assert seen.num_dead_ends == seen.num_leaves - 1
    assert seen.reached_goal and seen.has_answer
    assert [line.kind for line in render(PROBLEM, text)][-2:] == ["goal", "solution"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (step(9, "+", 3, 12), [Flaw.OPERAND]),
        (step(3, "+", 3, 6), [Flaw.OPERAND]),
        (step(7, "*", 3, 22), [Flaw.ARITHMETIC]),
        (step(7, "/", 3, 2), [Flaw.ILLEGAL]),
        (step(3, "-", 7, 4), [Flaw.ILLEGAL]),
        (f"{step(7, '*', 5, 35)} {step(35, '*', 3, 105)}", [Flaw.ILLEGAL]),
        (step(3, "+", 7, 10), []),
        (f"{step(7, '*', 3, 21)} {step(21, '-', 5, 16)} {HIGH}", [Flaw.COMPARISON]),
        (f"{step(7, '*', 3, 21)} {step(21, '+', 5, 26)} {LOW}", [Flaw.COMPARISON]),
        (f"{step(7, '*', 3, 21)} {step(21, '-', 5, 16)} {GOAL}", [Flaw.FALSE_GOAL]),
        (f"{step(7, '*', 3, 21)} {GOAL}", [Flaw.FALSE_GOAL]),
        (f"{step(7, '*', 3, 21)} {LOW}", [Flaw.MISPLACED]),
        (BACK, [Flaw.BACKTRACK]),
        (f"{step(7, '*', 3, 21)} {BACK} {BACK}", [Flaw.BACKTRACK]),
        ("what is this", [Flaw.JUNK]),
    ],
)
def test_each_flaw_is_seen_once(text: str, expected: list[Flaw]) -> None:
    assert flaws(text) == expected


def test_steps_below_a_slip_are_judged_by_themselves_but_reach_no_true_goal() -> None:
    text = f"{step(7, '*', 3, 20)} {step(20, '+', 5, 25)} {LOW} {step(20, '+', 6, 26)} {GOAL} {step(20, '+', 5, 26)} {GOAL}"
    seen = look(text)
    assert flaws(text) == [Flaw.ARITHMETIC, Flaw.OPERAND, Flaw.ARITHMETIC]
    assert seen.num_wrong == 3 and seen.num_false_goals == 0 and not seen.reached_goal and not seen.first_on_path
    below = f"{step(7, '*', 3, 20)} {step(20, '+', 5, 25)} {LOW} {BACK} {GOOD}"
    assert look(below).reached_goal, "after going back the search is sound again"


def test_trying_the_same_again_is_repetition() -> None:
    first = f"{step(7, '+', 3, 10)} {step(10, '+', 5, 15)} {LOW}"
    again = f"{step(10, '+', 5, 15)} {LOW} {BACK} {step(3, '+', 7, 10)}"
    assert [p.repeated for p in replay(PROBLEM, f"{first} {again}") if p.kind in (Kind.STEP, Kind.LEAF)] == [False, False, True, True]


def test_early_backtracks_leave_untried_steps_behind() -> None:
    all_tried = f"{step(10, '+', 5, 15)} {LOW} {step(10, '-', 5, 5)} {LOW} {step(10, '*', 5, 50)} {HIGH} {step(10, '/', 5, 2)} {LOW}"
    assert look(f"{step(7, '+', 3, 10)} {all_tried} {BACK}").num_early_backtracks == 0
    assert look(f"{step(7, '+', 3, 10)} {step(10, '+', 5, 15)} {LOW} {BACK}").num_early_backtracks == 1


def test_order_is_told_from_chance() -> None:
    seen = look(GOOD)
    assert seen.first_on_path and seen.first_on_path_chance == pytest.approx(1 / 9), "only 7 * 3 of nine steps leads to 26"
    assert seen.nodes_to_goal == 2 < seen.expected_nodes
    assert not look(f"{step(7, '+', 3, 10)} {BACK} {GOOD}").first_on_path


def test_a_policy_without_any_event_is_counted_too() -> None:
    seen = look("")
    assert (seen.num_nodes, seen.reached_goal, seen.first_on_path, seen.has_answer) == (0, False, False, False)
    assert not look(SOLUTION).has_answer


def test_summary_gives_rates_over_all_outputs() -> None:
    wrong = f"{step(7, '*', 3, 22)} {step(22, '+', 5, 27)} {GOAL} {SOLUTION} 3"
    summary = summarize([look(GOOD), look(wrong), look("")])
    assert summary["wrong_nodes_per_output"] == pytest.approx(1 / 3) and summary["wrong_nodes_frac"] == pytest.approx(1 / 4)
    assert summary["false_goals_per_output"] == summary["first_on_path_frac"] == summary["reached_goal_frac"] == pytest.approx(1 / 3)
    assert summary["answer_frac"] == pytest.approx(2 / 3) and summary["mean_nodes_to_goal"] == 2
    assert summary["search_words_frac"] == pytest.approx((7 + 7) / (15 + 9)), "the solution is not search"
    assert summary["search_effort"] == pytest.approx(2 / look(GOOD).expected_nodes)
    assert summarize([]) == {"outputs": 0.0}, "a rate with nothing to count over is left out"
    assert "search_effort" not in summarize([look(wrong)])


def test_rendered_lines_show_depth_outcome_and_what_is_wrong() -> None:
    text = f"{step(7, '+', 3, 10)} {step(10, '+', 5, 15)} {HIGH} {step(10, '+', 5, 15)} {LOW} {BACK} uh {LOW} {GOOD}"
    rows = [(line.depth, line.kind, line.note, line.repeated) for line in render(PROBLEM, text)]
    assert rows == [
        (0, "step", "", False),
        (1, "dead_end", "comparison", False),
        (1, "dead_end", "", True),
        (1, "back", "", False),
        (0, "junk", "junk", False),
        (0, "stray", "misplaced", False),
        (0, "step", "", False),
        (1, "goal", "", False),
        (0, "solution", "", False),
    ]
    assert all(line.wrong == bool(line.note) for line in render(PROBLEM, text))


words = st.sampled_from(
    [*metacot.MARKERS, metacot.EOS, *map(str, range(9)), *(f"{op}{n}" for op in "+-*/=" for n in range(9)), "\x00", "=", "+"]
)


@given(st.one_of(st.lists(words, max_size=60).map(" ".join), st.text(max_size=80)))
def test_no_text_breaks_the_analysis(text: str) -> None:
    seen = look(text)
    assert seen.num_wrong + seen.num_leaves >= 0 and seen.num_wrong <= seen.num_nodes
    assert len(render(PROBLEM, text)) <= max(1, len(text.split()))
