"""The problems of ``python -m neox_rl.search``, one JSON line each, and the line that it prints for each.

A ``prompt`` (``neox_rl.problems.make_rows``) is asked as it stands, a ``problem`` or ``question`` with TEXT_PROMPT's instruction behind it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from neox_rl.config.schema import PLACE
from neox_rl.errors import ConfigError
from neox_rl.metacot import SOLUTION, prompt_text
from neox_rl.problems.files import unspeakable
from neox_rl.search.domain import Domain
from neox_rl.types import NO_NODE, Json, Problem, Tree

TARGET = 24
MAX_ROW_BYTES = 1 << 20
ARITHMETIC_PROMPT = (
    "Use each of the numbers {numbers} once, with + - * and /, to make {target}. Write one operation a line, as in 3 * 5 = 15; "
    "its result takes the place of its two numbers.\n"
)
TEXT_PROMPT = PLACE + "\nReason step by step, one step a line, and put the final answer within \\boxed{}.\n"
_PLACES = re.compile(r"\{(?:problem|numbers|target)\}")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the file; ``error`` says why there is no problem in it."""

    number: int
    problem: Problem | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Asking:
    """A ``--template`` in two: ``frame``, with PLACE for all from its first place to its last; and that part, with the places that
    ``arithmetic`` rows fill in, empty where it is PLACE itself. Both are empty without a template."""

    frame: str = ""
    arithmetic: str = ""

    @classmethod
    def of(cls, template: str) -> Self:
        """Raises ConfigError for a template without a place."""
        places = list(_PLACES.finditer(template))
        if not places:
            raise ConfigError("--template has no place for a problem; write {problem} in it, or {numbers} and {target}")
        if PLACE in template:
            return cls(template)
        start, end = places[0].start(), places[-1].end()
        return cls(template[:start] + PLACE + template[end:], template[start:end])


def read_rows(path: Path, words: bool, asking: Asking) -> list[Row]:
    """Every line that is not blank. ``words``: prompts in the words of ``neox_rl.metacot``. Prompts are without the frame of ``asking``,
    which is the tokenizer's. Raises ConfigError when there is no file."""
    try:
        with path.open("rb") as file:
            return [_row(number, line, words, asking) for number, line in enumerate(file, 1) if line.strip()]
    except OSError as error:
        raise ConfigError(f"--problems {path}: {error.strerror}; give a file of JSON lines") from error


def _row(number: int, line: bytes, words: bool, asking: Asking) -> Row:
    if len(line) > MAX_ROW_BYTES:
        return Row(number, error=f"line {number} has {len(line)} bytes, at most {MAX_ROW_BYTES} are read")
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Row(number, error=f"line {number} is not JSON: {error}")
    if unspeakable(data):
        return Row(number, error=f"line {number} holds half of a surrogate pair, an escape such as \\ud800 alone, which is no text")
    match data:
        case {"numbers": list() as numbers} | {"nums": list() as numbers}:
            return Row(number, _arithmetic(number, data, numbers, words, asking.arithmetic))
        case {"problem": str() as text, "answer": str() | int() | float() as answer} if text.strip():
            return Row(number, _text(number, data, text, str(answer), asking))
        case {"question": str() as text, "answer": str() | int() | float() as answer} if text.strip():
            return Row(number, _text(number, data, text, str(answer).rpartition("####")[2], asking))
        case {"prompt": str() as prompt, "answer": str() | int() | float() as answer} if prompt.strip():
            return Row(number, Problem(_id(number, data), "math", prompt, str(answer).strip(), prompt))
    known = "{numbers, target} (24 unless given), {problem, answer} or {prompt, answer}"
    return Row(number, error=f"line {number} holds no problem; a row is {known}")


def _arithmetic(number: int, data: Mapping[str, Any], numbers: list[Any], words: bool, asked: str) -> Problem:
    target = data.get("target", TARGET)
    meta: dict[str, Json] = {"numbers": numbers, "target": target}
    if data.get("max_value") is not None:
        meta["max_value"] = data["max_value"]
    listed = ", ".join(map(str, numbers))
    filled = (asked or ARITHMETIC_PROMPT).replace("{numbers}", listed).replace("{target}", str(target))
    prompt = prompt_text(numbers, target) if words and not asked else filled
    task = "game24" if target == TARGET else "countdown"
    return Problem(_id(number, data), task, prompt, str(target), listed, meta)


def _text(number: int, data: Mapping[str, Any], text: str, answer: str, asking: Asking) -> Problem:
    prompt = (PLACE if asking.frame else TEXT_PROMPT).replace(PLACE, text.strip())
    return Problem(_id(number, data), "math", prompt, answer.strip(), text)


def _id(number: int, data: Mapping[str, Any]) -> str:
    given = data.get("id")
    return str(given) if isinstance(given, str | int) else f"line {number}"


def result_line(row: Row, tree: Tree, domain: Domain) -> dict[str, Json]:
    """``answer``: the expression, or what the verifier read in a text; null where the search has none that it could stand for."""
    answer: str | None = None
    verdict = tree.nodes[tree.answer].verdict if tree.answer != NO_NODE else None
    if verdict is not None:
        if domain.checkable:
            texts = [node.text for node in tree.path(tree.answer)]
            answer = domain.answer(texts).removeprefix(f"{SOLUTION} ")
        else:
            answer = verdict.extracted
    return {
        "id": tree.problem_id,
        "solved": verdict is not None and verdict.correct,
        "answer": answer,
        "nodes": len(tree.nodes) - 1,
        "tokens": tree.num_tokens,
        "end": tree.end.value,
        "counts": dict(tree.counts),
        **({"error": tree.error} if tree.error else {}),
    }


def error_line(row: Row, error: str) -> dict[str, Json]:
    id = row.problem.id if row.problem is not None else f"line {row.number}"
    return {"id": id, "solved": False, "answer": None, "nodes": 0, "tokens": 0, "end": "malformed", "error": error}
