"""The problems of ``python -m neox_rl.search``, one JSON line each, and the line that it prints for each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neox_rl.errors import ConfigError
from neox_rl.metacot import SOLUTION, prompt_text
from neox_rl.search.domain import Domain
from neox_rl.types import NO_NODE, Json, Problem, Tree

TARGET = 24
MAX_ROW_BYTES = 1 << 20
ARITHMETIC_TEMPLATE = (
    "Use each of the numbers {numbers} once, with + - * and /, to make {target}. Write one operation a line, as in 3 * 5 = 15; "
    "its result takes the place of its two numbers.\n"
)
TEXT_TEMPLATE = "{problem}\nReason step by step, one step a line, and put the final answer within \\boxed{}.\n"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the file; ``error`` says why there is no problem in it."""

    number: int
    problem: Problem | None = None
    error: str = ""


def read_rows(path: Path, words: bool, template: str, plain: Callable[[str], str] = str) -> list[Row]:
    """Every line that is not blank. ``words``: prompts in the words of ``neox_rl.metacot``. ``plain``: what is done to a problem's text
    before it is put into ``template``, which may hold special tokens. Raises ConfigError when there is no file."""
    try:
        with path.open("rb") as file:
            return [_row(number, line, words, template, plain) for number, line in enumerate(file, 1) if line.strip()]
    except OSError as error:
        raise ConfigError(f"--problems {path}: {error.strerror}; give a file of JSON lines") from error


def _row(number: int, line: bytes, words: bool, template: str, plain: Callable[[str], str]) -> Row:
    if len(line) > MAX_ROW_BYTES:
        return Row(number, error=f"line {number} has {len(line)} bytes, at most {MAX_ROW_BYTES} are read")
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Row(number, error=f"line {number} is not JSON: {error}")
    match data:
        case {"numbers": list() as numbers} | {"nums": list() as numbers}:
            return Row(number, _arithmetic(number, data, numbers, words, template))
        case {"problem": str() as text, "answer": str() | int() | float() as answer} if text.strip():
            return Row(number, _text(number, data, plain(text), str(answer), template))
        case {"question": str() as text, "answer": str() | int() | float() as answer} if text.strip():
            return Row(number, _text(number, data, plain(text), str(answer).rpartition("####")[2], template))
    return Row(number, error=f"line {number} holds no problem; a row is {{numbers, target}} (24 unless given) or {{problem, answer}}")


def _arithmetic(number: int, data: Mapping[str, Any], numbers: list[Any], words: bool, template: str) -> Problem:
    target = data.get("target", TARGET)
    meta: dict[str, Json] = {"numbers": numbers, "target": target}
    if data.get("max_value") is not None:
        meta["max_value"] = data["max_value"]
    listed = ", ".join(map(str, numbers))
    filled = (template or ARITHMETIC_TEMPLATE).replace("{numbers}", listed).replace("{target}", str(target))
    prompt = prompt_text(numbers, target) if words and not template else filled
    task = "game24" if target == TARGET else "countdown"
    return Problem(_id(number, data), task, prompt, str(target), listed, meta)


def _text(number: int, data: Mapping[str, Any], text: str, answer: str, template: str) -> Problem:
    return Problem(_id(number, data), "math", (template or TEXT_TEMPLATE).replace("{problem}", text.strip()), answer.strip(), text)


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
