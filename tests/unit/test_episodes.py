"""Meta-RL rollouts: what the objectives are worth, what the protocol reads and says, and the closed forms of goal finding."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Sequence
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neox_rl.config.schema import VerifyConfig
from neox_rl.episodes.calculator import CalculatorError, calculator, evaluate
from neox_rl.episodes.environments import Judged, Stepwise, environment_of, reached
from neox_rl.episodes.objectives import Objective, credits, discounted, qstar_reward, solved, tagged, tags_of, total
from neox_rl.episodes.protocol import Ending, Feedback, Outcome, Progress, Rules, announcement, read_ending
from neox_rl.episodes.rollout import Episodes, Rollout, num_calls
from neox_rl.episodes.sandbox import Limits, PythonSandbox
from neox_rl.episodes.tools import Tool, calculate, python_tool
from neox_rl.errors import ConfigError
from neox_rl.metacot import STOP
from neox_rl.problems.countdown import arithmetic_problem
from neox_rl.problems.goal_finding import goal_problem, memoryless_success, meta_success
from neox_rl.types import MAX_CALLS, Completion, Finish, Problem, Role, SamplingParams, Verdict, VersionSpan
from neox_rl.verify.verifier import TaskVerifier, make_verifier

REWARDS = [0.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("objective", "worth", "credited"),
    [
        (Objective.SUM, 2.0, (2.0, 2.0, 1.0, 1.0)),
        (Objective.FINAL, 1.0, (1.0, 1.0, 1.0, 1.0)),
        (Objective.ANY, 1.0, (1.0, 1.0, 0.0, 0.0)),
        (Objective.FIRST, 0.0, (0.0, 0.0, 0.0, 0.0)),
    ],
)
def test_each_objective_by_hand(objective: Objective, worth: float, credited: tuple[float, ...]) -> None:
    assert total(REWARDS, objective) == worth and credits(REWARDS, objective) == credited


@given(st.lists(st.floats(-10, 10), max_size=8), st.sampled_from(list(Objective)))
def test_the_first_episode_is_credited_with_everything(rewards: list[float], objective: Objective) -> None:
    found = credits(rewards, objective)
    assert len(found) == len(rewards)
    assert not rewards or found[0] == pytest.approx(total(rewards, objective))


def test_discount_and_the_likelihood_of_a_solution() -> None:
    assert discounted(1.0, 100, 0.99) == pytest.approx(0.366, abs=1e-3) and discounted(1.0, 10**6, 1.0) == 1.0
    with pytest.raises(ValueError, match="gamma"):
        discounted(1.0, 3, 1.5)
    assert qstar_reward([-0.5, -0.5]) == -1.0 and qstar_reward([-0.5, -0.5], [-2.0, -1.0]) == 2.0
    with pytest.raises(ValueError, match="without it"):
        qstar_reward([-0.5], [-1.0, -1.0])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("try 3", Ending("try 3")),
        (f"try 3\n{STOP}\n", Ending("try 3", stop=True)),
        ("try 3\n[RESET s1]", Ending("try 3", reset="s1")),
        (f"a\nb\n[RESET s1]\n{STOP}", Ending("a\nb", True, "s1")),
        (f"{STOP}\nand on", Ending(f"{STOP}\nand on")),
        ("[RESET s1]\n[RESET s2]", Ending("[RESET s1]", reset="s2")),
        ("[RESET ../../x y]", Ending("[RESET ../../x y]")),
        (f"15 +7 =22 low [RESET s1] {STOP}", Ending("15 +7 =22 low", True, "s1")),
        (f"{STOP} {STOP}", Ending(STOP, stop=True)),
        (f"un{STOP}", Ending(f"un{STOP}")),
        ("x" * 70 + " [RESET s1]", Ending("x" * 70, reset="s1")),
        ("", Ending("")),
    ],
)
def test_the_end_of_an_episode_is_read_from_its_last_lines(text: str, expected: Ending) -> None:
    assert read_ending(text) == expected


def progress(feedback: Feedback = Feedback.BINARY) -> Progress:
    return Progress(Rules(3, feedback, 10, 25, 1000))


def test_feedback_is_nothing_a_bit_or_a_line() -> None:
    outcome = Outcome(0.0, False, "Not\nthere.\n[STOP]")
    said = [announcement(2, outcome, feedback) for feedback in Feedback]
    assert said == ["\n[EPISODE 2]\n", "\n[EPISODE 2] wrong\n", "\n[EPISODE 2] Not there. STOP]\n"]
    assert announcement(3, outcome, Feedback.NONE, "s1", "numbers 4 5") == "\n[EPISODE 3] from s1 numbers 4 5\n"


def test_an_answer_that_is_repeated_holds_no_marker() -> None:
    said = Outcome(0.0, False, "wrong 4\n[EPISODE 3] right [STOP] [RESET s1]")
    assert announcement(2, said, Feedback.TEXT) == "\n[EPISODE 2] wrong 4 EPISODE 3] right STOP] RESET s1]\n"


def test_episodes_end_by_number_by_tokens_and_by_the_policy() -> None:
    wrong = Outcome(0.0, False)
    by_number, by_tokens, by_policy = progress(), progress(), progress()
    for _ in range(2):
        by_number.end_episode(Ending("x"), wrong, 4)
        assert not by_number.done
    by_number.end_episode(Ending("x"), wrong, 4)
    assert by_number.done and by_number.ends == [4, 8, 12]
    left = []
    while not by_tokens.done:
        left.append(by_tokens.tokens_left(0))
        by_tokens.end_episode(Ending("x"), wrong, left[-1])
    assert left == [10, 10, 5] and progress().tokens_left(995) == 5
    by_policy.end_episode(Ending("x", stop=True), wrong, 1)
    assert by_policy.done


def test_a_reset_leads_to_a_state_that_was_named_and_nowhere_else() -> None:
    story = progress()
    story.end_episode(Ending("x", reset="s9"), Outcome(0.0, False, states=frozenset({"s1"})), 1)
    assert (story.begins_at, story.unknown_resets) == (None, 1)
    story.end_episode(Ending("x\n[EPISODE 9] right", reset="s1"), Outcome(0.0, False), 1)
    assert (story.begins_at, story.unknown_resets, story.forged_markers) == ("s1", 1, 1)


def test_rules_without_an_episode_are_refused() -> None:
    for rules in ((0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1), (1, 1, 1, 0)):
        with pytest.raises(ConfigError, match="at least 1"):
            Rules(rules[0], Feedback.NONE, *rules[1:])


class Letters:
    """A character a token."""

    eos_id, vocab_size = 0, 1 << 16

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(map(ord, text))

    def encode_prompt(self, text: str) -> tuple[int, ...]:
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


class Player:
    """A policy as a function of the context."""

    def __init__(self, play: Callable[[str], str]) -> None:
        self.play = play

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
        ids = Letters().encode(self.play(Letters().decode(prompt_ids)))
        cut = ids[: params.max_tokens]
        finish = Finish.STOP if cut == ids else Finish.LENGTH
        return (Completion(cut, (-0.1,) * len(cut), (VersionSpan(5, 0, len(cut)),), finish),)


def worth(problem: Problem, verdict: Verdict, text: str, num_tokens: int) -> float:
    return float(verdict.correct)


def verifier_of(problem: Problem) -> TaskVerifier:
    return make_verifier(VerifyConfig(), problem.task)


def roll_out(problem: Problem, play: Callable[[str], str], episodes: int, tool: Tool | None = None, **limits: int) -> Rollout:
    sizes = {"max_episode_tokens": 40, "max_tokens": 400, "max_context": 4000} | limits
    made = Episodes(Player(play), Letters(), Rules(episodes, Feedback.BINARY, **sizes), Objective.ANY, tool)
    environment = environment_of(problem, verifier_of(problem), worth)
    return asyncio.run(made.roll_out(problem, environment, SamplingParams(100), "g000000/r0"))


@pytest.mark.parametrize("episodes", [1, 3, 6])
def test_goal_finding_with_and_without_memory_comes_out_as_the_closed_forms_say(episodes: int) -> None:
    """The one who remembers goes through the doors in order; the other draws afresh, whatever stands in the context."""
    goals, trials, rng = 6, 600, random.Random(episodes)
    problems = [goal_problem(goals, 1, i) for i in range(trials)]
    orderly = [roll_out(p, lambda context: str(1 + context.count("[EPISODE")), episodes).trace.reward for p in problems]
    forgetful = [roll_out(p, lambda _: str(rng.randint(1, goals)), episodes).trace.reward for p in problems]
    for found, expected in ((orderly, meta_success(goals, episodes)), (forgetful, memoryless_success(goals, episodes))):
        error = math.sqrt(max(expected * (1 - expected), 1e-9) / trials)
        assert abs(sum(found) / trials - expected) <= 4 * error + 1e-9


def test_a_rollout_trains_what_the_policy_wrote_and_nothing_else() -> None:
    problem = next(p for i in range(99) if (p := goal_problem(3, 2, i)).answer == "2")
    made = roll_out(problem, lambda context: f"door {1 + context.count('[EPISODE')}", 3)
    parts = [(s.role, Letters().decode(s.ids), s.mask, s.episode, s.version) for s in made.trace.segments]
    assert parts == [
        (Role.PROMPT, problem.prompt, 0.0, 0, -1),
        (Role.THINK, "door 1", 1.0, 0, 5),
        (Role.ENV, "\n[EPISODE 2] wrong\n", 0.0, 0, -1),
        (Role.THINK, "door 2", 1.0, 1, 5),
        (Role.ENV, "\n[EPISODE 3] right\n", 0.0, 1, -1),
        (Role.THINK, "door 3", 1.0, 2, 5),
    ]
    assert (
        made.trace.reward == 1.0
        and made.rewards == (0.0, 1.0, 0.0)
        and made.trace.verdict.extracted == "-+-"
        and made.trace.verdict.correct
    )
    assert all(len(s.logprobs) == (len(s.ids) if s.version >= 0 else 0) for s in made.trace.segments)


def test_what_a_calculator_says_is_context_and_a_policy_that_only_calls_comes_to_an_end() -> None:
    problem = goal_problem(3, 2, 0)
    asks = roll_out(problem, lambda context: "1" if "= 21" in context else "[CALC 3*7]", 1, calculate)
    assert [(s.role, Letters().decode(s.ids)) for s in asks.trace.segments[1:]] == [
        (Role.THINK, "[CALC 3*7]"),
        (Role.ENV, "\n= 21\n"),
        (Role.THINK, "1"),
    ]
    assert [(s.mask, s.version, s.logprobs != ()) for s in asks.trace.segments[1:]] == [(1.0, 5, True), (0.0, -1, False), (1.0, 5, True)]
    forever = roll_out(problem, lambda _: "[CALC 1]", 2, calculate)
    assert sum(s.role is Role.ENV for s in forever.trace.segments) <= 2 * MAX_CALLS + 1
    assert num_calls(asks.trace) == 1 and 2 <= num_calls(forever.trace) < sum(s.role is Role.ENV for s in forever.trace.segments)
    assert all(sum(len(s.ids) for s in forever.trace.segments if s.episode == e and s.mask) <= 40 for e in (0, 1))


@pytest.mark.parametrize(
    ("after", "extracted", "stopped", "unknown"),
    [("1", "++", False, 0), (STOP, "-", True, 0), (f"1 {STOP}", "+", True, 0), ("[RESET s1]", "--", False, 2)],
)
def test_first_words_behind_an_answer_are_not_the_end_of_the_call(after: str, extracted: str, stopped: bool, unknown: int) -> None:
    problem = next(p for i in range(99) if (p := goal_problem(3, 2, i)).answer == "1")
    made = roll_out(problem, lambda context: after if "= 21" in context.split("[EPISODE")[-1] else "[CALC 3*7]", 2, calculate)
    assert made.trace.verdict.extracted == extracted
    assert (made.progress.stopped, made.progress.unknown_resets) == (stopped, unknown)


def test_what_a_program_prints_is_context_without_loss_and_the_episode_goes_on() -> None:
    problem, box = goal_problem(3, 2, 0), PythonSandbox(1, Limits(wall_s=60.0))
    program = "[PYTHON]\nprint(6 * 7)\n[/PYTHON]"
    try:
        made = roll_out(problem, lambda context: "1" if "> 42" in context else program, 1, python_tool(box), max_episode_tokens=100)
    finally:
        box.close()
    told = [(s.role, Letters().decode(s.ids), s.mask, s.logprobs != ()) for s in made.trace.segments[1:]]
    assert told == [(Role.THINK, program, 1.0, True), (Role.ENV, "\n> 42\n", 0.0, False), (Role.THINK, "1", 1.0, True)]


GAME = arithmetic_problem("countdown", (3, 5, 7), 26, 60)


def test_states_have_the_names_of_the_order_in_which_legal_steps_reached_them() -> None:
    text = "5 *3 =15 15 +7 =22 low 15 -7 =8 low back 7 *3 =21 21 +5 =26 goal"
    assert reached(GAME, text) == [(7, 15), (5, 21)]
    assert reached(GAME, "5 *3 =15 7 *5 =35 back 7 *3 =21") == [(7, 15)], "nothing behind a false step has a name"
    assert reached(GAME, "9 *3 =27") == reached(GAME, "5 *3 =16") == reached(GAME, "back 5 *3 =15") == reached(GAME, "") == []


def test_an_episode_from_a_named_state_is_the_rest_of_the_game() -> None:
    """First from the start, then from s2: what was made of the numbers there counts, and an answer to the whole game does not."""
    plays = {1: "5 *3 =15 15 +7 =22 low back 7 *3 =21 21 -5 =16 low [RESET s2]", 2: "21 +5 =26 goal solution 21 + 5 [RESET s2]"}
    plays[3] = "solution ( 7 * 3 ) + 5"
    made = roll_out(GAME, lambda context: plays[1 + context.count("[EPISODE")], 3, max_episode_tokens=100)
    assert made.trace.verdict.extracted == "-+-" and made.progress.unknown_resets == 0
    said = [Letters().decode(s.ids) for s in made.trace.segments if s.role is Role.ENV]
    assert said == [f"\n[EPISODE {k}] {word} from s2 numbers 5 21 target 26 search\n" for k, word in ((2, "wrong"), (3, "right"))]


def test_the_policy_stops_and_what_does_not_fit_is_not_said() -> None:
    stopped = roll_out(GAME, lambda _: f"solution 1 {STOP}", 5)
    assert len(stopped.progress.outcomes) == 1 and stopped.progress.stopped and stopped.trace.verdict.extracted == "-"
    problem = goal_problem(3, 2, 0)
    prompt = len(problem.prompt)
    for room in range(1, 60):
        made = roll_out(problem, lambda _: "1", 3, max_context=prompt + room)
        assert made.trace.num_tokens <= prompt + room and len(made.progress.outcomes) == 1 + (room > 20) + (room > 40), room


def test_an_episode_that_the_budget_ends_has_no_answer_whatever_it_holds() -> None:
    problem = next(p for i in range(99) if (p := goal_problem(3, 2, i)).answer == "2")
    made = roll_out(problem, lambda _: "the door is 2 222", 1, max_episode_tokens=13)
    assert Letters().decode(made.trace.segments[1].ids).endswith("2") and not made.trace.verdict.correct
    assert made.trace.finish is Finish.LENGTH


def test_the_environment_speaks_of_the_answer_and_names_states_where_there_are_any() -> None:
    async def said(problem: Problem, text: str, finished: bool = True) -> Outcome:
        environment = environment_of(problem, verifier_of(problem), worth)
        environment.reset(None)
        return await environment.step(text, 3, finished)

    assert isinstance(environment_of(GAME, verifier_of(GAME), worth), Stepwise)
    assert type(environment_of(goal_problem(3, 2, 0), verifier_of(goal_problem(3, 2, 0)), worth)) is Judged
    wrong = asyncio.run(said(GAME, "5 *3 =15 solution 3 + 5"))
    assert (wrong.message, wrong.states, wrong.correct) == ("wrong 3 + 5", frozenset({"s1"}), False)
    assert asyncio.run(said(GAME, "solution ( 7 * 3 ) + 5")) == Outcome(1.0, True, "right ( 7 * 3 ) + 5")
    assert asyncio.run(said(GAME, "solution ( 7 * 3 ) + 5", finished=False)).message == "wrong"


def test_rewards_are_discounted_by_all_that_was_written_before_them() -> None:
    problem = next(p for i in range(99) if (p := goal_problem(3, 2, i)).answer == "2")
    made = Episodes(Player(lambda context: "ab 2"), Letters(), Rules(2, Feedback.NONE, 40, 400, 4000), Objective.SUM)
    environment = environment_of(problem, verifier_of(problem), worth)
    found = asyncio.run(made.roll_out(problem, environment, SamplingParams(100), "x", gamma=0.9))
    assert found.rewards == pytest.approx((0.9**4, 0.9**8)) and found.trace.reward == pytest.approx(0.9**4 + 0.9**8)


def test_where_a_token_begins_the_solution_it_is_the_search_before_it_that_is_discounted() -> None:
    """(21): gamma^|Z|, and S is no part of Z."""
    problem = next(p for i in range(99) if (p := goal_problem(3, 2, i)).answer == "2")
    made = Episodes(Player(lambda context: "ab 2"), Letters(), Rules(2, Feedback.NONE, 40, 400, 4000), Objective.SUM, None, ord(" "))
    environment = environment_of(problem, verifier_of(problem), worth)
    found = asyncio.run(made.roll_out(problem, environment, SamplingParams(100), "x", gamma=0.9))
    assert found.rewards == pytest.approx((0.9**2, 0.9**6))


def test_a_token_that_begins_no_solution_does_not_make_the_search_behind_it_free() -> None:
    problem = next(p for i in range(99) if (p := goal_problem(3, 2, i)).answer == "2")
    made = Episodes(Player(lambda context: "a b 2"), Letters(), Rules(1, Feedback.NONE, 40, 400, 4000), Objective.SUM, None, ord(" "))
    environment = environment_of(problem, verifier_of(problem), worth)
    found = asyncio.run(made.roll_out(problem, environment, SamplingParams(100), "x", gamma=0.9))
    assert found.rewards == pytest.approx((0.9**3,))


@pytest.mark.parametrize("right", [(), (True,), (False,), (True, False), (False, True), (False, True, False)])
def test_a_rollout_is_right_where_its_objective_has_a_reward(right: tuple[bool, ...]) -> None:
    """Also of one that stopped before its last episode: the last that there was earns the reward of ``final``."""
    for objective in Objective:
        assert solved(right, objective) == (total([float(each) for each in right], objective) > 0)


def test_each_discount_has_its_tag() -> None:
    assert tags_of((1.0,)) == {1.0: ""} and tags_of((1.0, 0.9)) == {0.9: "work quickly", 1.0: "take your time"}
    assert list(tags_of((0.9, 1.0, 0.99)).values()) == ["work quickly", "take a moment", "take your time"]
    assert tagged("a b search", "work quickly") == "a b search\nwork quickly\n" and tagged("a\n", "") == "a\n"
    with pytest.raises(ValueError, match="4 discounts"):
        tags_of((0.1, 0.2, 0.3, 0.4))


@pytest.mark.parametrize(
    ("text", "value"),
    [("3 * (5 + 2)", 21), ("-2 - -3", 1), ("1/3 + 1/6", Fraction(1, 2)), ("0.1 + 0.2", Fraction(3, 10)), ("2*3-4/2", 4)],
)
def test_the_calculator_is_exact(text: str, value: Fraction) -> None:
    assert evaluate(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1/0",
        "1 +",
        "(1",
        "1)",
        "2**3",
        "__import__('os')",
        "9" * 21,
        "(" * 30 + "1" + ")" * 30,
        "99999999999999999999*" * 9 + "1",
        "1 2",
    ],
)
def test_what_is_no_expression_or_too_large_is_an_error_that_the_policy_reads(text: str) -> None:
    with pytest.raises(CalculatorError):
        evaluate(text)
    if text and "\n" not in text:
        assert (calculator(f"so [CALC {text}]") or "\n= error").startswith("\n= error")


@given(st.text(max_size=300))
def test_no_text_makes_the_protocol_or_the_calculator_raise(text: str) -> None:
    read_ending(text)
    calculator(f"[CALC {text}]")
    assert calculator("nothing to do") is None
