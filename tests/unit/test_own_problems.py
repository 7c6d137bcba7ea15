"""A file of free-text problems from nothing: its tokenizer, the demonstrations of its worked solutions, and which problems fit a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from neox_rl.config.schema import ProblemsConfig, TokenizerConfig
from neox_rl.errors import ConfigError
from neox_rl.problems import make_tokenizer, make_word_problems
from neox_rl.problems.files import read_problems, worked_solution
from neox_rl.problems.make_word_problems import word_problems
from neox_rl.problems.sources import problems_of_run
from neox_rl.problems.tokenizer import load_tokenizer
from neox_rl.search.demonstrations import Demonstrations, TraceStyle, written
from neox_rl.types import Problem, Reason, Role
from neox_rl.verify.math import check_math
from tests.unit.small_run import small_config, traces_of

JSONL = ProblemsConfig(source="jsonl")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two commands of the README write."""
    root = tmp_path_factory.mktemp("made")
    assert make_word_problems.main(["--num", "300", "--steps", "2", "--out", str(root / "problems.jsonl")]) == 0
    assert make_tokenizer.main([str(root / "problems.jsonl"), "--vocab", "400", "--out", str(root / "tokenizer")]) == 0
    return root


def test_word_problems_are_seeded_different_and_right() -> None:
    rows = word_problems(200, 3, 50, 0.0, seed=1)
    assert rows == word_problems(200, 3, 50, 0.0, seed=1) != word_problems(200, 3, 50, 0.0, seed=2)
    assert len({row["problem"] for row in rows}) == 200
    for row in rows:
        steps = row["solution"].split(". ")[:-1]
        sides = [step.split(" = ") for step in steps]
        assert len(steps) == 3 and all(check_math(right, left).reason is Reason.MATCH for left, right in sides)
        assert check_math(row["answer"], row["solution"]).reason is Reason.MATCH
    terse = [row["solution"].startswith("The answer") for row in word_problems(200, 3, 50, 0.5, seed=1)]
    assert 70 < sum(terse) < 130


def test_any_text_comes_back_from_the_tokenizer_and_digits_stand_alone(made: Path) -> None:
    tokenizer = load_tokenizer(TokenizerConfig(str(made / "tokenizer")), JSONL)
    for text in ("Ada has 2048 apples.", "\\boxed{\\frac{1}{2}}", "\u7b54\u6848 \u00e9 \U0001f600\n\ttabs"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [tokenizer.decode([i]) for i in tokenizer.encode("2048")] == list("2048")
    assert tokenizer.vocab_size <= 400 and tokenizer.decode([tokenizer.eos_id]) == ""


def test_a_vocabulary_that_cannot_spell_every_byte_is_refused(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        make_tokenizer.main([str(made / "problems.jsonl"), "--vocab", "100", "--out", str(made / "small")])
    assert "--vocab 100" in capsys.readouterr().err and not (made / "small").exists()


SOLUTIONS = [
    ({"question": "q", "answer": "She has 2+2=<<2+2=4>>4.\n#### 4"}, "4", "She has 2+2=4.\nThe answer is \\boxed{4}."),
    ({"problem": "q", "solution": "So \\boxed{7}."}, "7", "So \\boxed{7}."),
    ({"problem": "q", "solution": "So it is 7."}, "7", "So it is 7.\nThe answer is \\boxed{7}."),
    ({"question": "q", "solution": ["One way.", "Another."], "final_answer": ["7"]}, "7", "One way.\nThe answer is \\boxed{7}."),
    ({"problem": "q", "answer": "7"}, "7", ""),
    ({"question": "q", "answer": "7"}, "7", ""),
]


@pytest.mark.parametrize(("row", "answer", "expected"), SOLUTIONS)
def test_a_worked_solution_ends_in_the_boxed_answer(row: dict[str, object], answer: str, expected: str) -> None:
    solution = worked_solution(row, answer)
    assert solution == expected
    assert not solution or check_math(answer, solution).reason is Reason.MATCH


def test_written_demonstrations_are_prompt_then_solution_with_loss_on_the_solution_alone(made: Path) -> None:
    tokenizer = load_tokenizer(TokenizerConfig(str(made / "tokenizer")), JSONL)
    problems, _ = read_problems(made / "problems.jsonl", "math")
    by_id = {p.id: p for p in problems}
    for trace in traces_of(Demonstrations(written(problems, TraceStyle(), tokenizer), seed=1, max_tokens=200), 20):
        problem = by_id[trace.problem_id]
        prompt, solution = trace.segments
        assert (prompt.role, prompt.mask) == (Role.PROMPT, 0.0) and tokenizer.decode(prompt.ids) == problem.prompt
        assert (solution.role, solution.mask) == (Role.SOLUTION, 1.0) and solution.ids[-1] == tokenizer.eos_id
        assert tokenizer.decode(solution.ids).strip() == problem.meta["solution"]


def test_problems_without_solutions_are_not_shown_and_none_at_all_is_refused(made: Path) -> None:
    tokenizer = load_tokenizer(TokenizerConfig(str(made / "tokenizer")), JSONL)
    solved = Problem("a", "math", "q\n", "1", "a", {"solution": "\\boxed{1}"})
    bare = Problem("b", "math", "q\n", "1", "b")
    source = written([solved, bare], TraceStyle(), tokenizer)
    assert {trace.problem_id for trace in traces_of(Demonstrations(source, seed=1), 20)} == {"a"}
    with pytest.raises(ConfigError, match="none of 1 training problems has a worked solution"):
        written([bare], TraceStyle(), tokenizer)


def test_prompts_that_leave_no_room_are_left_out_and_counted(tmp_path: Path, made: Path) -> None:
    rows = [{"problem": f"{'word ' * 60 if i < 5 else ''}{i}", "answer": "1"} for i in range(40)]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = small_config(tmp_path, problems={"source": "jsonl", "path": str(tmp_path / "mixed.jsonl")})
    tokenizer = load_tokenizer(TokenizerConfig(str(made / "tokenizer")), JSONL)
    problems = problems_of_run(config, tokenizer)
    assert problems.counts["prompts_too_long"] == 5 and len(problems.train) + len(problems.heldout) == 35
    with pytest.raises(ConfigError, match="raise seq_length"):
        problems_of_run(replace(config, neox=replace(config.neox, seq_length=100)), tokenizer)
