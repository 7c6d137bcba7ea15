"""A run that continues from a checkpoint has each step once in its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from neox_rl.telemetry.jsonl import JsonlWriter, read_jsonl
from neox_rl.telemetry.paths import RunPaths
from neox_rl.telemetry.rewind import cut, rewind


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_steps_after_the_checkpoint_are_cut_and_an_open_writer_goes_on_behind_the_cut(tmp_path: Path) -> None:
    paths = RunPaths.of(tmp_path)
    write(paths.metrics, [{"phase": "sft", "step": 1}, {"phase": "sft", "step": 2}, *({"phase": "rl", "step": s} for s in (1, 2, 3))])
    write(paths.evaluations, [{"label": "warmstart", "step": 0}, {"label": "step 2", "step": 2}, {"label": "final", "step": 3}])
    write(paths.rollouts, [{"label": "train", "step": 1}, {"label": "train", "step": 3}])
    writer = JsonlWriter(paths.metrics)
    rewind(paths, sft_step=2, rl_step=2)
    writer.write({"phase": "rl", "step": 3, "again": True})
    assert [(row["phase"], row["step"]) for row in read_jsonl(paths.metrics)] == [("sft", 1), ("sft", 2), ("rl", 1), ("rl", 2), ("rl", 3)]
    assert [row["label"] for row in read_jsonl(paths.evaluations)] == ["warmstart", "step 2"]
    assert [row["step"] for row in read_jsonl(paths.rollouts)] == [1]


def test_a_checkpoint_of_the_warm_start_has_no_evaluation_yet(tmp_path: Path) -> None:
    paths = RunPaths.of(tmp_path)
    write(paths.metrics, [{"phase": "sft", "step": 1}, {"phase": "sft", "step": 2}])
    write(paths.evaluations, [{"label": "warmstart", "step": 0}])
    rewind(paths, sft_step=1, rl_step=0)
    assert len(read_jsonl(paths.metrics)) == 1 and read_jsonl(paths.evaluations) == []


def test_the_final_evaluation_is_made_again(tmp_path: Path) -> None:
    paths = RunPaths.of(tmp_path)
    write(paths.evaluations, [{"label": "warmstart", "step": 0}, {"label": "final", "step": 3}])
    rewind(paths, sft_step=0, rl_step=3)
    assert [row["label"] for row in read_jsonl(paths.evaluations)] == ["warmstart"]


def test_a_torn_row_is_cut_and_a_missing_file_stays_missing(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n{"a": 2')
    cut(file, lambda row: True)
    cut(tmp_path / "none.jsonl", lambda row: True)
    assert file.read_text() == '{"a": 1}\n' and not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize("name", ["metrics", "evaluations", "rollouts"])
def test_two_resumes_after_crashes_in_the_middle_of_a_row_lose_no_earlier_row(tmp_path: Path, name: str) -> None:
    paths = RunPaths.of(tmp_path)
    file: Path = getattr(paths, name)
    row: dict[str, object] = {"phase": "rl", "label": "train"}
    write(file, [row | {"step": step} for step in range(1, 11)])
    for checkpoint in (8, 12, 12):
        with file.open("a") as torn:
            torn.write('{"phase":"rl","label":"tr')
        writer = JsonlWriter(file)  # opened before the checkpoint is known, as by a process that starts
        rewind(paths, sft_step=0, rl_step=checkpoint)
        for step in range(checkpoint + 1, 15):
            writer.write(row | {"step": step})
        assert [found["step"] for found in read_jsonl(file)] == list(range(1, 15))


def test_a_line_torn_in_the_middle_of_a_file_costs_only_itself(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"step": 1}\n{"st\n\n{"step": 2}\n{"step": 3}\n')
    cut(file, lambda row: row["step"] <= 2)
    assert [row["step"] for row in read_jsonl(file)] == [1, 2]
