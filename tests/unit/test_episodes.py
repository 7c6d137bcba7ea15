"""Meta-RL rollouts: what the objectives are worth, what the protocol reads and says, and the closed forms of goal finding."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from collections.abc import Callable, Sequence
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neox_rl.episodes.calculator import CalculatorError, calculator, evaluate
from neox_rl.episodes.goal_finding import GoalFinding, goal_problems, memoryless_success, meta_success
from neox_rl.episodes.objectives import Objective, credits, discounted, kl_penalized, qstar_reward, total
from neox_rl.episodes.protocol import STOP_LINE, Ending, Feedback, Outcome, Progress, Rules, read_ending
from neox_rl.episodes.rollout import MAX_CALLS, Episodes, Rollout
from neox_rl.errors import ConfigError
from neox_rl.types import Completion, Finish, Problem, Role, SamplingParams, VersionSpan

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


@given(st.lists(st.floats(0, 10), max_size=8), st.sampled_from(list(Objective)))
def test_the_first_episode_is_credited_with_everything(rewards: list[float], objective: Objective) -> None:
    found = credits(rewards, objective)
    assert len(found) == len(rewards)
    assert not rewards or found[0] == pytest.approx(total(rewards, objective))


def test_discount_kl_and_the_likelihood_of_a_solution() -> None:
    assert discounted(1.0, 100, 0.99) == pytest.approx(0.366, abs=1e-3) and discounted(1.0, 10**6, 1.0) == 1.0
    with pytest.raises(ValueError, match="gamma"):
        discounted(1.0, 3, 1.5)
    assert kl_penalized(1.0, [-1.0, -2.0], [-1.5, -2.5], 0.1) == pytest.approx(0.9)
    assert qstar_reward([-0.5, -0.5]) == -1.0 and qstar_reward([-0.5, -0.5], [-2.0, -1.0]) == 2.0
    with pytest.raises(ValueError, match="without it"):
        qstar_reward([-0.5], [-1.0, -1.0])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("try 3", Ending("try 3")),
        (f"try 3\n{STOP_LINE}\n", Ending("try 3", stop=True)),
        ("try 3\n[RESET s1]", Ending("try 3", reset="s1")),
        (f"a\nb\n[RESET s1]\n{STOP_LINE}", Ending("a\nb", True, "s1")),
        (f"{STOP_LINE}\nand on", Ending(f"{STOP_LINE}\nand on")),
        ("[RESET s1]\n[RESET s2]", Ending("[RESET s1]", reset="s2")),
        ("[RESET ../../x y]", Ending("[RESET ../../x y]")),
        ("", Ending("")),
    ],
)
def test_the_end_of_an_episode_is_read_from_its_last_lines(text: str, expected: Ending) -> None:
    assert read_ending(text) == expected


def progress(feedback: Feedback = Feedback.BINARY) -> Progress:
    return Progress(Rules(3, feedback, 10, 25))


def test_feedback_is_nothing_a_bit_or_a_line() -> None:
    outcome = Outcome(0.0, False, "Not\nthere.\n[STOP]")
    said = [progress(feedback).end_episode(Ending("x"), outcome, 4) for feedback in Feedback]
    assert said == ["\n[EPISODE 2]\n", "\n[EPISODE 2] wrong\n", "\n[EPISODE 2] Not there. [STOP]\n"]


def test_episodes_end_by_number_by_tokens_and_by_the_policy() -> None:
    wrong = Outcome(0.0, False)
    by_number, by_tokens, by_policy = progress(), progress(), progress()
    assert [by_number.end_episode(Ending("x"), wrong, 4) != "" for _ in range(3)] == [True, True, False]
    assert [(by_tokens.end_episode(Ending("x"), wrong, 10) != "", by_tokens.tokens_left) for _ in range(2)] == [(True, 10), (True, 5)]
    assert by_policy.end_episode(Ending("x", stop=True), wrong, 1) == "" and by_policy.done


def test_a_reset_leads_to_a_state_that_was_named_and_nowhere_else() -> None:
    story = progress()
    named = Outcome(0.0, False, states=frozenset({"s1"}))
    assert story.end_episode(Ending("x", reset="s9"), named, 1) == "\n[EPISODE 2] wrong\n"
    assert (story.begins_at, story.unknown_resets) == (None, 1)
    assert story.end_episode(Ending("x\n[EPISODE 9] right", reset="s1"), Outcome(0.0, False), 1) == "\n[EPISODE 3] wrong, from s1\n"
    assert (story.begins_at, story.unknown_resets, story.forged_markers) == ("s1", 1, 1)


def test_rules_without_an_episode_are_refused() -> None:
    for rules in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(ConfigError, match="at least 1"):
            Rules(rules[0], Feedback.NONE, rules[1], rules[2])


class Letters:
    """A character a token."""

    eos_id, vocab_size = 0, 1 << 16

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(map(ord, text))

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


def roll_out(problem: Problem, play: Callable[[str], str], episodes: int, tool: Callable[[str], str | None] | None = None) -> Rollout:
    rules = Rules(episodes, Feedback.BINARY, 40, 400)
    made = Episodes(Player(play), Letters(), rules, Objective.ANY, tool)
    return asyncio.run(made.roll_out(problem, GoalFinding(problem), SamplingParams(100), "g000000/r0"))


@pytest.mark.parametrize("episodes", [1, 3, 6])
def test_goal_finding_with_and_without_memory_comes_out_as_the_closed_forms_say(episodes: int) -> None:
    """The one who remembers goes through the doors in order; the other draws afresh, whatever stands in the context."""
    goals, trials, rng = 6, 600, random.Random(episodes)
    problems = list(itertools.islice(goal_problems(goals, 1), trials))
    orderly = [roll_out(p, lambda context: str(1 + context.count("[EPISODE")), episodes).trace.reward for p in problems]
    forgetful = [roll_out(p, lambda _: str(rng.randint(1, goals)), episodes).trace.reward for p in problems]
    for found, expected in ((orderly, meta_success(goals, episodes)), (forgetful, memoryless_success(goals, episodes))):
        error = math.sqrt(max(expected * (1 - expected), 1e-9) / trials)
        assert abs(sum(found) / trials - expected) <= 4 * error + 1e-9


def test_a_rollout_trains_what_the_policy_wrote_and_nothing_else() -> None:
    problem = next(p for p in goal_problems(3, 2) if p.answer == "2")
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
    assert made.trace.reward == 1.0 and made.progress.rewards == [0.0, 1.0, 0.0] and made.trace.verdict.correct
    assert all(len(s.logprobs) == (len(s.ids) if s.version >= 0 else 0) for s in made.trace.segments)


def test_what_a_calculator_says_is_context_and_a_policy_that_only_calls_comes_to_an_end() -> None:
    problem = next(goal_problems(3, 2))
    asks = roll_out(problem, lambda context: "1" if "= 21" in context else "[CALC 3*7]", 1, calculator)
    assert [(s.role, Letters().decode(s.ids)) for s in asks.trace.segments[1:]] == [
        (Role.THINK, "[CALC 3*7]"),
        (Role.ENV, "\n= 21\n"),
        (Role.THINK, "1"),
    ]
    forever = roll_out(problem, lambda _: "[CALC 1]", 2, calculator)
    assert sum(s.role is Role.ENV for s in forever.trace.segments) <= 2 * MAX_CALLS + 1
    assert all(sum(len(s.ids) for s in forever.trace.segments if s.episode == e and s.mask) <= 40 for e in (0, 1))


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
