"""Problem files: the row shapes of the public sets, what is counted, what is refused and where."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from neox_rl.config.schema import ProblemsConfig
from neox_rl.errors import ConfigError
from neox_rl.problems.files import from_files, last_boxed, read_problems


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"problem": "q", "answer": "3/4"}, "3/4"),
        ({"problem": "q", "answer": 12}, "12"),
        ({"question": "q", "answer": "She has 2+2=<<2+2=4>>4.\n#### 4,000"}, "4,000"),
        ({"question": "q", "answer": "4"}, "4"),
        ({"problem": "q", "solution": r"first \boxed{1}, so \boxed{\frac{1}{2}}", "level": "Level 5"}, r"\frac{1}{2}"),
        ({"problem": "q", "solution": r"proof with \boxed{9}", "answer": "7"}, "7"),
        ({"question": "q", "final_answer": ["2", "$-3$"], "is_multiple_answer": True}, "2, $-3$"),
    ],
)
def test_row_shapes(tmp_path: Path, row: dict[str, Any], answer: str) -> None:
    (problem,), counts = read_problems(write(tmp_path / "a.jsonl", [row]), "math")
    assert problem.answer == answer and problem.task == "math"
    assert problem.prompt.startswith("q\n") and "\\boxed{}" in problem.prompt
    assert counts == {"rows": 1, "empty_answers": 0, "duplicates": 0}


def test_duplicates_and_empty_answers_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [
        {"problem": "a b", "answer": "1"},
        {"problem": "a  b ", "answer": "2"},
        {"problem": "c", "answer": " "},
        {"problem": "d", "solution": "no box"},
    ]
    problems, counts = read_problems(write(tmp_path / "a.jsonl", rows), "math")
    assert [p.answer for p in problems] == ["1"], "the first of the duplicates stays"
    assert counts == {"rows": 4, "empty_answers": 2, "duplicates": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "not a JSON line"),
        ("[1, 2]", "a list where an object was expected"),
        ('{"gold": "1", "pred": "2"}', r"fields \['gold', 'pred'\] hold no problem"),
        ('{"problem": "  ", "answer": "2"}', "problem text is empty"),
        ('{"question": "q", "final_answer": [null]}', "hold no problem"),
        ("\udcff", "not a JSON line"),
        ("[" * 100_000, "not a JSON line"),
        (r'{"problem": "q \ud800", "answer": "2"}', "half of a surrogate pair"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"problem": "q", "answer": "1"}\n\n' + line + "\n", errors="surrogateescape")
    with pytest.raises(ConfigError, match=rf"bad\.jsonl:3: .*{message}"):
        read_problems(path, "math")


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_problems(tmp_path / "none.jsonl", "math")
    with pytest.raises(ConfigError, match="no usable problem"):
        read_problems(write(tmp_path / "empty.jsonl", []), "math")


def test_held_out_by_hash_does_not_depend_on_seed_order_or_growth(tmp_path: Path) -> None:
    rows = [{"problem": f"question {i}", "answer": str(i)} for i in range(400)]
    small = from_files(ProblemsConfig(source="jsonl", path=str(write(tmp_path / "a.jsonl", rows[:300]))), seed=1)
    large = from_files(ProblemsConfig(source="jsonl", path=str(write(tmp_path / "b.jsonl", rows[::-1]))), seed=2)
    assert len(small.train) + len(small.heldout) == 300 and 45 < len(small.heldout) < 105
    assert {p.id for p in small.heldout} < {p.id for p in large.heldout}
    assert {p.id for p in small.train} < {p.id for p in large.train}


def test_held_out_file_wins_over_training_problems(tmp_path: Path) -> None:
    rows = [{"problem": f"question {i}", "answer": str(i)} for i in range(10)]
    train, heldout = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[:3])
    problems = from_files(ProblemsConfig(source="jsonl", path=str(train), heldout_path=str(heldout)), seed=1)
    assert len(problems.train) == 7 and len(problems.heldout) == 3 and problems.counts["also_heldout"] == 3
    with pytest.raises(ConfigError, match="no training problem is left"):
        from_files(ProblemsConfig(source="jsonl", path=str(heldout), heldout_path=str(train)), seed=1)


@pytest.mark.parametrize(
    ("text", "boxed"), [(r"\boxed{a{b}c}", "a{b}c"), (r"\boxed{1} \boxed{2}", "2"), (r"\boxed{open", ""), ("none", "")]
)
def test_last_boxed(text: str, boxed: str) -> None:
    assert last_boxed(text) == boxed


def test_parquet_goes_through_pyarrow_or_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    if importlib.util.find_spec("pyarrow") is None:
        path.write_bytes(b"PAR1")
        with pytest.raises(ConfigError, match="pip install pyarrow"):
            read_problems(path, "math")
        return
    pyarrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"problem": ["q"], "answer": ["5"]}), path)
    assert [p.answer for p in read_problems(path, "math")[0]] == ["5"]
    path.write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match="not a parquet file"):
        read_problems(path, "math")
