"""Countdown and the Game of 24: what is a solution, what only looks like one, and where the final answer stands."""

from __future__ import annotations

import time
from fractions import Fraction

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neox_rl.config.schema import RewardConfig, VerifyConfig
from neox_rl.errors import ConfigError
from neox_rl.types import Problem, Reason, Verdict
from neox_rl.verify.arithmetic import (
    ExpressionError,
    Game,
    check_arithmetic,
    check_arithmetic_gold,
    check_game,
    evaluate,
    final_expression,
)
from neox_rl.verify.reward import reward
from neox_rl.verify.verifier import make_verifier

GAME = Game((4, 6, 7, 7), 24)

SOLUTIONS = [
    "4 * 6 + 7 - 7",
    "4*6+(7-7)",
    "4 \u00d7 6 + 7 \u2212 7",
    "4 x 6 + 7 - 7 = 24",
    "24 = 4 * 6 + 7 - 7",
    "(7 / 7) * 4 * 6 = 1 * 4 * 6 = 24",
    r"\frac{7}{7} \times 4 \cdot 6",
    r"$\left(7 \div 7\right) \times 4 \times 6$",
    r"\boxed{4 \times 6 \times \frac{7}{7}}",
    "Answer: 4*6*7/7 = 24",
    "**Answer:** (4)(6) + 7 - 7",
    "The final answer is 4*6 + 7 - 7.",
    "<think>4*6*1*1 = 24?</think>\nSo <answer> 4 * 6 * 7 / 7 </answer>",
    "Steps:\n7 - 7 = 0 (left: 0 4 6)\nAnswer: 4 * 6 + (7 - 7) = 24",
    "First I thought \\boxed{4*6} but no: \\boxed{4*6*7/7}",
    "7 -7 =0 low back 7 /7 =1 4 *6 =24 24 *1 =24 goal solution 4 * 6 * ( 7 / 7 ) <eos>",
    "-7 + 7 + 4*6",
]
HACKS = [
    "4*6*1*1",
    "4*6",
    "4*6+7-7+0",
    "4*6*7/7*7/7",
    "6*4",
    "24",
    "24 = 24",
    "4*5 = 24",
    "4*6+7-7 = 25",
    "25 = 4*6+7-7",
    "46 - 7 - 7 - 8",
    "4 6 + 7 - 7",
    "4**6 - 7 - 7",
    "4*6 + 7//7 - 1",
    "4*6*7/7 # 24",
    "4*6*7/7; print(24)",
    "4*6*7/7, 1+1",
    "4*6*7/7 or 3*8",
    "\u0664*6*7/7",
    "\uff14*6*7/7",
    "4\u00b2 + 7 + 7 - 6",
    "4*6*7/(7-7)",
    "4*6*(7-7)/(7-7)",
    "4*6*0/0",
    "4*6*7/7.0",
    "04*6*7/7",
    "4e0*6*7/7",
    "4*6*--7/7",
    "4*6*7^(7-7)",
    "abs(4*6*7/7)",
    "4*6*7/7 <answer>1+1</answer>",
    "solution 4 * 6 * 7 / 7 solution 4 * 6 * 7 / 7",
    "solution 4 * 6 * 7 / 7 <eos> 1",
    "__import__('os').system('true') or 4*6*7/7",
    "I believe 4*6*7/7 is right, but my answer: none",
]


@pytest.mark.parametrize("text", SOLUTIONS)
def test_a_solution_is_accepted_however_it_is_written(text: str) -> None:
    assert check_game(GAME, text).reason is Reason.MATCH


@pytest.mark.parametrize("text", HACKS)
def test_nothing_but_a_solution_is_accepted(text: str) -> None:
    assert check_game(GAME, text).reason in (Reason.MISMATCH, Reason.NO_ANSWER)


@pytest.mark.parametrize("text", ["", "\n", "I give up.", "<think>4*6*7/7</think>", "numbers are hard"])
def test_no_answer_is_told_apart_from_a_wrong_one(text: str) -> None:
    assert check_game(GAME, text).reason is Reason.NO_ANSWER


def test_use_all_is_a_switch() -> None:
    assert check_game(GAME, "4 * 6").reason is Reason.MISMATCH
    assert check_game(GAME, "4 * 6", use_all=False).reason is Reason.MATCH
    assert check_game(GAME, "4 * 6 + 6 - 6", use_all=False).reason is Reason.MISMATCH
    assert check_game(Game((3, 24), 24), "8 * 3 = 24", use_all=False).reason is Reason.MISMATCH


def test_fractions_are_exact() -> None:
    assert check_game(Game((3, 3, 8, 8), 24), "8 / (3 - 8 / 3)").reason is Reason.MATCH
    assert evaluate("1/3 + 1/3 + 1/3").value == 1
    assert evaluate("2/3/4").value == Fraction(1, 6)
    assert evaluate("2-3-4").value == -5


def test_an_ambiguous_product_after_a_division_is_refused() -> None:
    assert evaluate("2(1+3)").value == 8
    with pytest.raises(ExpressionError, match="two readings"):
        evaluate("8/2(1+3)")


@pytest.mark.parametrize(
    "text",
    ["(" * 3000 + "1" + ")" * 3000, "9" * 1_000_000, "1+" * 500_000 + "1", "\0" * 9999 + "4", "\ud800", "(" * 10_000, "<answer>" * 9999],
)
def test_hostile_text_costs_milliseconds(text: str) -> None:
    started = time.process_time()
    assert check_game(GAME, text).reason is not Reason.MATCH
    assert time.process_time() - started < 2.0


@given(st.text(alphabet="0123456789+-*/()=\\{} fracboxed<answer>solution\n\u00d7", max_size=80))
def test_any_text_gets_a_finding_and_a_match_is_true(text: str) -> None:
    finding = check_game(Game((1, 2, 3), 6), text)
    if finding.reason is Reason.MATCH:
        left = final_expression(text).split("=")
        assert any(sorted(evaluate(side).numbers) == [1, 2, 3] and evaluate(side).value == 6 for side in left)


def _problem(task: str, answer: str = "", **meta: object) -> Problem:
    return Problem("p", task, "", answer, "c", meta)  # type: ignore[arg-type]


def test_the_problem_says_the_game() -> None:
    assert check_arithmetic(_problem("game24", numbers=[4, 6, 7, 7]), "4*6*7/7").reason is Reason.MATCH
    assert check_arithmetic(_problem("countdown", numbers=[3, 5, 7], target=26), "7*3+5").reason is Reason.MATCH


@pytest.mark.parametrize(
    "meta", [{}, {"numbers": [1, 2]}, {"numbers": [], "target": 3}, {"numbers": [1, "2"], "target": 3}, {"numbers": [1, True], "target": 2}]
)
def test_a_problem_without_a_game_is_a_bad_gold_answer(meta: dict[str, object]) -> None:
    assert check_arithmetic(_problem("countdown", **meta), "1+2").reason is Reason.BAD_GOLD
    assert check_arithmetic_gold(_problem("countdown", **meta)).reason is Reason.BAD_GOLD


@pytest.mark.parametrize(
    ("answer", "reason"),
    [("", Reason.MATCH), ("26", Reason.MATCH), ("7*3+5", Reason.MATCH), ("7*3+6", Reason.BAD_GOLD), ("27", Reason.BAD_GOLD)],
)
def test_the_gold_answer_is_the_target_or_a_solution(answer: str, reason: Reason) -> None:
    assert check_arithmetic_gold(_problem("countdown", answer, numbers=[3, 5, 7], target=26)).reason is reason


def test_the_verifier_of_arithmetic_runs_in_this_process() -> None:
    verifier = make_verifier(VerifyConfig(), "game24")
    before, begin = psutil.Process().children(), time.perf_counter()
    verdict = verifier.check_sync(_problem("game24", numbers=[4, 6, 7, 7]), "4*6*7/7")
    assert verdict.correct and verdict.extracted == "4*6*7/7" and 0 < verdict.ms <= 1e3 * (time.perf_counter() - begin)
    assert set(psutil.Process().children()) <= set(before)
    assert verifier.counts == {Reason.MATCH: 1}
    with pytest.raises(ConfigError, match="known tasks: countdown, game24, goal_finding, math"):
        make_verifier(VerifyConfig(), "chess")


def test_reward_of_a_verdict() -> None:
    config = RewardConfig(correct=1.0, wrong=-0.5, token_cost=0.5)
    right, wrong = (Verdict(c, "", r, 0.0) for c, r in ((True, Reason.MATCH), (False, Reason.TIMEOUT)))
    assert reward(wrong, 10, 100, config) == -0.5
    assert reward(right, 0, 100, config) == 1.0
    assert reward(right, 50, 100, config) == 0.75
    assert reward(right, 10_000, 100, config) == -0.5, "a long correct answer is never worth less than a wrong one"


def test_reward_charges_false_steps_whatever_the_verdict_and_at_most_five() -> None:
    config = RewardConfig(wrong_step_cost=0.1)
    right, wrong = Verdict(True, "", Reason.MATCH, 0.0), Verdict(False, "", Reason.MISMATCH, 0.0)
    assert reward(right, 1, 10, config, num_wrong_steps=2) == pytest.approx(0.8)
    assert reward(wrong, 1, 10, config, num_wrong_steps=2) == pytest.approx(-0.2)
    assert reward(right, 1, 10, config, num_wrong_steps=500) == pytest.approx(0.5)
