"""What a run does with the problems of a file before it trains on them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from neox_rl.config.schema import VerifyConfig
from neox_rl.errors import ConfigError
from neox_rl.problems.split import ProblemSet
from neox_rl.run.readable import with_readable_answers
from neox_rl.types import Problem, Verdict
from neox_rl.verify.verifier import TaskVerifier, make_verifier


@pytest.fixture(scope="module")
def verifier() -> Iterator[TaskVerifier]:
    verifier = make_verifier(VerifyConfig(deadline_s=60.0), "math")
    yield verifier
    verifier.close()


def problem(name: str, answer: str) -> Problem:
    return Problem(name, "math", name, answer, name)


def test_problems_that_nobody_can_solve_are_left_out_and_counted(
    verifier: TaskVerifier, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    found = ProblemSet((problem("a", "12"), problem("b", "\\frac{1}{0}")), (problem("c", ""), problem("d", "x+1")), {"rows": 4})
    with caplog.at_level(logging.WARNING):
        kept = with_readable_answers(found, verifier, "file.jsonl", tmp_path / "known.json")
    assert [p.id for p in (*kept.train, *kept.heldout)] == ["a", "d"] and kept.counts == {"rows": 4, "unreadable_answers": 2}
    assert "1 training and 1 held-out problems are left out, their answers cannot be read: b, c" in caplog.text


def test_a_file_without_one_readable_answer_is_refused(verifier: TaskVerifier, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"file\.jsonl: the verifier can read the answer of none of its 1 training problems"):
        with_readable_answers(ProblemSet((problem("b", "\\frac{1}{0}"),), ()), verifier, "file.jsonl", tmp_path / "known.json")


def test_answers_are_read_once_a_run_and_again_when_the_file_is_another(
    verifier: TaskVerifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, found = tmp_path / "known.json", ProblemSet((problem("a", "x+1"), problem("b", "\\frac{1}{0}")), ())
    first = with_readable_answers(found, verifier, "file.jsonl", memory)
    asked: list[str] = []
    check = verifier.check_gold

    def asking(problem: Problem) -> Verdict:
        asked.append(problem.id)
        return check(problem)

    monkeypatch.setattr(verifier, "check_gold", asking)
    assert with_readable_answers(found, verifier, "file.jsonl", memory) == first and not asked
    other = ProblemSet((problem("a", "x+1"), problem("b", "\\frac{1}{2}")), ())
    assert len(with_readable_answers(other, verifier, "file.jsonl", memory).train) == 2 and asked == ["a", "b"]
