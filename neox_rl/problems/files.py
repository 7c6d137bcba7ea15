"""Problems with free-text questions from files: JSON lines or parquet, in the row shapes of the public mathematics sets.

| row | question | answer |
|---|---|---|
| ``{problem, answer}`` (also Omni-MATH) | ``problem`` | ``answer`` |
| GSM8K ``{question, answer}`` | ``question`` | what follows ``####`` in ``answer``; all of it without that mark |
| MATH ``{problem, solution}`` | ``problem`` | the last ``\\boxed{}`` of ``solution`` |
| OlympiadBench ``{question, final_answer}`` | ``question`` | the entries of ``final_answer``, joined by commas |

A worked solution (``solution`` as text or a list of texts, or what stands before ``####`` in GSM8K) is kept in
``meta["solution"]``, ending in the boxed answer: what a warm start of style ``written`` imitates.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from neox_rl.config.schema import ProblemsConfig
from neox_rl.errors import ConfigError
from neox_rl.problems.split import ProblemSet
from neox_rl.types import Problem

INSTRUCTION = "Reason step by step, and put the final answer within \\boxed{}."
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")
"""GSM8K's calculator annotations: ``48/2 = <<48/2=24>>24``."""
Row = Mapping[str, Any]


def from_files(cfg: ProblemsConfig, seed: int) -> ProblemSet:
    """Problems of ``cfg.path``; held out: those of ``cfg.heldout_path``, or a share of ``path`` by hash of the text.

    The hash does not depend on ``seed`` or on the file's order, so a problem stays held out when the file grows. Empty
    answers, duplicates, and training problems that are also held out are left out and counted. Raises ConfigError
    naming file and line.
    """
    if not cfg.path:
        raise ConfigError("problems.source jsonl needs problems.path: a JSONL or parquet file of problems")
    train, counts = read_problems(Path(cfg.path), cfg.task, cfg.template)
    if cfg.heldout_path:
        heldout, heldout_counts = read_problems(Path(cfg.heldout_path), cfg.task, cfg.template)
        held = {p.id for p in heldout}
        counts |= {f"heldout_{name}": n for name, n in heldout_counts.items()}
        counts["also_heldout"] = sum(p.id in held for p in train)
    else:
        heldout = [p for p in train if _fraction(p.cluster) < cfg.heldout_frac]
        held = {p.id for p in heldout}
    kept = tuple(p for p in train if p.id not in held)
    if not kept:
        raise ConfigError(f"{cfg.path}: no training problem is left ({counts}); lower problems.heldout_frac or give other files")
    return ProblemSet(kept, tuple(heldout), counts)


def read_problems(path: Path, task: str, template: str = "") -> tuple[list[Problem], dict[str, int]]:
    """The problems of one file in its order, and ``{rows, empty_answers, duplicates}``. Raises ConfigError.

    A ``template`` says all that is said to the policy beside the problem; without one INSTRUCTION does.
    """
    problems: dict[str, Problem] = {}
    counts = {"rows": 0, "empty_answers": 0, "duplicates": 0}
    for where, row in _rows(path):
        counts["rows"] += 1
        text, answer = _question_and_answer(row, where)
        if not answer:
            counts["empty_answers"] += 1
            continue
        problem = _problem(task, text if template else f"{text}\n{INSTRUCTION}\n", text, answer)
        if problem.id in problems:
            counts["duplicates"] += 1
            continue
        solution = worked_solution(row, answer)
        problems[problem.id] = replace(problem, meta={"source": where, **({"solution": solution} if solution else {})})
    if not problems:
        raise ConfigError(f"{path}: no usable problem ({counts})")
    return list(problems.values()), counts


def worked_solution(row: Row, answer: str) -> str:
    """The row's own solution, ending in ``answer`` in the form that INSTRUCTION asks for; empty when the row has none."""
    match row:
        case {"solution": str() as text} | {"solution": [str() as text, *_]}:
            worked = text.strip()
        case {"answer": str() as text} if "####" in text:
            worked = _CALCULATOR.sub("", text.rpartition("####")[0]).strip()
        case _:
            worked = ""
    if not worked or last_boxed(worked) == answer:
        return worked
    return f"{worked}\nThe answer is \\boxed{{{answer}}}."


def last_boxed(text: str) -> str:
    """The content of the last ``\\boxed{...}``, braces balanced; empty when there is none."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return ""
    start += len("\\boxed{")
    depth = 1
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start:i].strip()
    return ""


def _problem(task: str, prompt: str, text: str, answer: str) -> Problem:
    digest = hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:16]
    return Problem(id=f"{task}/{digest}", task=task, prompt=prompt, answer=answer, cluster=digest)


def _fraction(digest: str) -> float:
    return int(digest, 16) / (1 << 4 * len(digest))


def _question_and_answer(row: Row, where: str) -> tuple[str, str]:
    match row:
        case {"question": str() as text, "final_answer": list() as parts} if all(isinstance(part, str | int | float) for part in parts):
            answer = ", ".join(str(part).strip() for part in parts)
        case {"question": str() as text, "answer": str() | int() | float() as given}:
            answer = str(given).rpartition("####")[2]
        case {"problem": str() as text, "answer": str() | int() | float() as given}:
            answer = str(given)
        case {"problem": str() as text, "solution": str() as solution}:
            answer = last_boxed(solution)
        case _:
            raise ConfigError(
                f"{where}: fields {sorted(row)} hold no problem; a row is {{problem, answer}}, GSM8K {{question, answer}}, "
                "MATH {problem, solution} or OlympiadBench {question, final_answer}, questions as text"
            )
    if not text.strip():
        raise ConfigError(f"{where}: the problem text is empty; remove the row")
    return text.strip(), answer.strip()


def unspeakable(row: object) -> bool:
    """Whether JSON holds half of a surrogate pair: legal there, but no text that could be hashed, sent to a server or printed."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return True
    return False


def _rows(path: Path) -> Iterator[tuple[str, Row]]:
    """``(file:line, row)``. Blank lines are passed over."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file of problems; paths are relative to the working directory")
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{where}: not a JSON line ({error}); write one object a line") from error
            if not isinstance(row, dict):
                raise ConfigError(f"{where}: a {type(row).__name__} where an object was expected; write one object a line")
            if unspeakable(row):
                raise ConfigError(
                    f"{where}: half of a surrogate pair, an escape such as \\ud800 alone; write both halves, or remove the row"
                )
            yield where, row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{path}: parquet needs pyarrow, which is not installed: pip install pyarrow, or convert the file to JSON lines"
        ) from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except ValueError as error:
        raise ConfigError(f"{path}: not a parquet file ({error})") from error
    for i, row in enumerate(rows, 1):
        yield f"{path}:{i}", row
