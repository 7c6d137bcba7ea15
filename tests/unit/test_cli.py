"""The command line: one clear line a mistake and status 2; a dry run starts nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from neox_rl.config.load import load_resolved
from neox_rl.run.cli import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text("raise SystemExit('a dry run must not run this')\n")
    (tmp_path / "job.yml").write_text("train_iters: 7\nmetarl:\n  name: job\n  warmstart: {steps: 5}\n")
    return tmp_path


def call(directory: Path, *arguments: str) -> int:
    return main([str(directory / "train.py"), "-d", str(directory), *arguments])


def test_a_dry_run_prints_the_resolved_config_the_processes_and_the_bound(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(directory, "job", "--dry-run", "--set", "metarl.staleness.delivery_slack=3", "--name", "other") == 0
    out = capsys.readouterr().out
    (directory / "printed.yml").write_text(out)
    config = load_resolved(directory / "printed.yml")
    assert (config.neox.train_iters, config.metarl.name, config.metarl.staleness.delivery_slack) == (7, "other", 3)
    for line in (
        "# run        runs/other",
        "M parameters",
        "S = admission_slack 1 + delivery_slack 3 = 4",
        "1 x vLLM server",
        "1 x training rank",
    ):
        assert line in out


def test_a_dry_run_of_a_resume_finds_what_would_stop_it(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = ["--set", f"metarl.runs_dir={directory}"]
    assert call(directory, "job", "--dry-run", "--resume", "--name", "nope", *runs) == 2
    assert f"error: --resume: there is no run {directory}/nope;" in capsys.readouterr().err


def test_restarts_are_a_flag_of_their_own(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(directory, "job", "--dry-run", "--restarts", "2") == 0
    (directory / "printed.yml").write_text(capsys.readouterr().out)
    assert load_resolved(directory / "printed.yml").metarl.restarts == 2
    assert call(directory, "job", "--dry-run", "--restarts", "-1") == 2


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["gone"], ["gone.yml: cannot be read"]),
        (["job", "job"], ["written twice"]),
        (["job", "--set", "metarl.rollout.grup_size=4"], ["did you mean metarl.rollout.group_size?"]),
        (["job", "--set", "metarl.rollout.top_p=0.5", "--set", "sequence_parallel=true"], ["sequence_parallel = true", "top_p = 0.5"]),
        (["job", "--name", "../x"], ["metarl.name = '../x'"]),
    ],
)
def test_bad_input_is_one_clear_line_a_mistake_and_status_2(
    directory: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], lines: list[str]
) -> None:
    assert call(directory, *arguments) == 2
    captured = capsys.readouterr()
    errors = captured.err.splitlines()
    assert captured.out == "" and len(errors) == len(lines)
    assert all(error.startswith("error: ") and line in error for error, line in zip(errors, lines, strict=True))


def test_a_missing_script_says_what_the_first_argument_is(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(directory / "job.yml") + "x", str(directory / "job.yml")]) == 2
    assert "the first argument is the script" in capsys.readouterr().err


def test_warnings_and_notes_do_not_stop_a_run(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (directory / "site.yml").write_text("log-interval: 10\nmetarl: {network: {bind_host: 10.0.0.1}}\n")
    assert call(directory, "job", "site", "--dry-run") == 0
    err = capsys.readouterr().err
    assert "note: log_interval (" in err and "warning: metarl.network.bind_host" in err


def test_deepy_from_a_shell(directory: Path) -> None:
    command = [sys.executable, str(ROOT / "deepy.py"), str(directory / "train.py"), str(directory / "job.yml")]
    ran = subprocess.run([*command, "--set", "num_layer=2"], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert (ran.returncode, ran.stdout) == (2, "") and ran.stderr.count("\n") == 1 and "did you mean num_layers?" in ran.stderr
    ran = subprocess.run([*command, "--dry-run"], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0 and "staleness" in ran.stdout
