"""What the scripted generator makes of a context that others have spoken in: calls of a tool, and what it goes on with after the answer.

Every other script calls. Most calls make a number of the problem, and what is written next reads it in the answer: in goal finding it is
the door that is named, in the arithmetic games a search follows. One call in eight divides by zero, and one program in eight never ends.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import cast

from neox_rl.metacot import EPISODE
from neox_rl.ports import Tokenizer
from neox_rl.types import Problem

_ANSWER = re.compile(r"[=>] *(.*)")


def last_said(begun: Sequence[int], tokenizer: Tokenizer) -> tuple[tuple[int, ...], str] | None:
    """Of the tokens behind a prompt, those from what was last said to the policy on, and the first line of a tool's answer; None where it
    alone has spoken so far.

    Words of a tool follow the policy's EOS; those before an episode follow whatever ended the one before.
    """
    ends = [at for at, token in enumerate(begun) if token == tokenizer.eos_id]
    behind = tuple(begun[ends[-1] + 1 if ends else 0 :])
    words = tokenizer.decode(behind).strip()
    if EPISODE in words:
        return behind, ""
    return (behind, words.split("\n")[0]) if ends and words else None


def words_with(tool: str, problem: Problem, number: int, rng: random.Random, heard: str) -> str:
    """A call of ``tool`` by the script ``number``, or what it makes of an answer; empty where a script follows that knows no tool."""
    doors = cast("int | None", problem.meta.get("num_goals"))
    if found := _ANSWER.match(heard):
        return found[1] if doors and found[1].isdigit() else ""
    if tool == "none" or number % 2:
        return ""
    asked = "1 / 0" if number % 16 == 2 else f"{rng.randrange(doors)} + 1" if doors else _product(problem)
    if tool == "calculator":
        return f"[CALC {asked}]"
    program = "while True: pass" if number % 16 == 6 else f"print({asked})"
    return f"[PYTHON]\n{program}\n[/PYTHON]"


def _product(problem: Problem) -> str:
    first, second, *_ = cast("list[int]", problem.meta["numbers"])
    return f"{first} * {second}"
