"""Searches that are written as lines of text: what is wrong with them, and the rates that a report shows."""

from __future__ import annotations

import pytest

from neox_rl.search.analyze_lines import analyze_lines, equations_of, summarize_lines
from neox_rl.search.domain import BACK_LINE, SOLUTION_LINE, WRONG_LINE
from neox_rl.search.quality import analysis_of, summary
from neox_rl.telemetry.rows import SEARCH_METRICS
from neox_rl.types import Problem


def test_lines_are_analyzed_move_by_move() -> None:
    text = f"2+2=4\n2 + 3 = 6\n{WRONG_LINE}\n{WRONG_LINE}\n2 + 3 = 6\n{BACK_LINE}\n{BACK_LINE}\n{BACK_LINE}\n2+2=4\n{SOLUTION_LINE}\n2+2=4"
    seen = analyze_lines(text)
    assert (seen.num_steps, seen.num_backtracks, seen.num_illegal_backtracks, seen.num_misplaced) == (4, 3, 1, 1)
    assert (seen.num_equations, seen.num_false_equations, seen.num_repeated) == (4, 2, 2)
    assert seen.search_frac == pytest.approx((text.index(SOLUTION_LINE)) / len(text))
    assert analyze_lines("").num_steps == 0


def test_lines_of_many_outputs_are_rates_by_the_names_of_the_report() -> None:
    told = f"1+1 = 2\n{WRONG_LINE}\n{BACK_LINE}\n2+2 = 5\n{SOLUTION_LINE}\n2+2 = 5\n"
    rates = summarize_lines([analyze_lines(told), analyze_lines("so 3 * 3 = 9\n")])
    assert rates == pytest.approx(
        {
            "outputs": 2,
            "wrong_nodes_per_output": 0.5,
            "wrong_nodes_frac": 1 / 3,
            "mean_nodes": 1.5,
            "repeated_nodes_frac": 0,
            "illegal_backtracks_per_output": 0.5,
            "misplaced_per_output": 0,
            "search_words_frac": (1 + told.index(SOLUTION_LINE) / len(told)) / 2,
        }
    )
    assert rates.keys() - SEARCH_METRICS == {"outputs"} and "misplaced_per_output" not in summarize_lines([analyze_lines("a\n")])
    assert summary([]) == {} and analysis_of(Problem("g", "goal_finding", "", "", ""), "3", 1) is None


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("so 3 * 5 = 15.", [True]),
        ("3*5=16 and 4-5=-1", [False, True]),
        ("0.5 + 0.25 = 0.75", [True]),
        ("1 + 2 * 3 = 7", []),
        ("7 / 0 = 7", [False]),
        ("x1 + 2 = 4", []),
        ("6/4 = 1.5", [True]),
    ],
)
def test_only_plain_equations_are_judged(line: str, expected: list[bool]) -> None:
    assert equations_of(line) == expected
