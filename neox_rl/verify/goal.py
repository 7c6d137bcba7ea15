"""Whether an attempt names the goal: its last word is the goal's number."""

from __future__ import annotations

from neox_rl.types import Problem, Reason
from neox_rl.verify.finding import Finding

GOAL_TASK = "goal_finding"
MAX_DIGITS = 9


def check_goal(problem: Problem, text: str) -> Finding:
    words = text[-200:].split()
    guess = words[-1].strip(".:,") if words else ""
    if not (guess.isascii() and guess.isdigit() and len(guess) <= MAX_DIGITS):
        return Finding(Reason.NO_ANSWER, guess[:MAX_DIGITS])
    return Finding(Reason.MATCH if guess == problem.answer else Reason.MISMATCH, guess)
