"""What a person sees in the terminal: the live panel, plain lines, the table."""

from __future__ import annotations

import io
import json
import re
import time
from pathlib import Path

import pytest
from rich.console import Console
from synthetic_run import write_run

from neox_rl.telemetry.display import LiveDisplay, View, clock, sparkline
from neox_rl.telemetry.jsonl import write_json
from neox_rl.telemetry.paths import RunPaths
from neox_rl.telemetry.status import ProcessState, Status, write_status
from neox_rl.telemetry.summary import write_summary
from neox_rl.telemetry.table import print_table


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    paths = write_run(tmp_path_factory.mktemp("runs") / "finished")
    write_summary(paths.root)
    return paths


def test_the_terminal_names_who_is_not_as_it_began() -> None:
    view = View("run")
    processes = {"server-0": ProcessState("restarting", 2, 3), "server-1": ProcessState("lost", 3, 3), "orchestrator": ProcessState()}
    status = Status(phase="rl", servers={"server-0": "lost", "server-1": "lost", "joiner": "serving"})
    assert view.update(status, 0.0, processes) == (
        "[0:00] rl | servers 1 of 3 serving; server-0 lost, server-1 lost | processes server-0 restarting (2 of 3), server-1 lost"
    )
    quiet = View("run").update(Status(phase="rl", servers={"server-0": "serving"}), 0.0, {"trainer": ProcessState()})
    assert quiet == "[0:00] rl"


def console(terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=100, color_system=None), out


def test_the_table_compares_before_and_after_and_ends_with_the_paths(finished: RunPaths) -> None:
    shown, out = console(False)
    print_table(finished, json.loads(finished.summary.read_text()), shown)
    text = out.getvalue()
    for part in (
        "accuracy, greedy",
        "accuracy, sampled",
        "Wrong steps",
        "False goal claims",
        "by chance",
        "Tokens an attempt",
        str(finished.report),
    ):
        assert part in text
    assert re.search(r"Wrong steps an attempt +3\.23 +1\.23 +-2\.00 *\n +Wrong steps +21\.0 % +10\.0 % +-11\.0 points", text)


def test_a_pipe_gets_a_plain_line_at_each_phase_and_every_ten_seconds() -> None:
    view = View("run")
    status = [
        Status(phase="starting"),
        Status(phase="rl", step=1, total_steps=9, reward=0.25, staleness_mean=0.5, staleness_max=1, bound=2),
    ]
    assert view.update(status[0], 100.0) == "[0:00] starting"
    assert view.update(status[0], 109.0) is None
    assert view.update(status[0], 110.5) == "[0:10] starting"
    assert view.update(status[1], 111.0) == "[0:11] rl | step 1/9 | reward 0.250 | staleness 0.50 mean, 1 max, bound 2"
    assert view.update(status[1], 112.0) is None


def test_the_panel_shows_phase_progress_trend_and_time_to_the_end() -> None:
    view, (shown, out) = View("run"), console(True)
    for step in range(1, 6):
        rate = {"tokens_per_s_generated": 6500.0, "tokens_per_s_trained": 2000.0}
        status = Status(
            phase="rl", step=step, total_steps=10, reward=step / 10, heldout_accuracy=0.5, queue_ready=3, queue_inflight=9, eta_s=75, **rate
        )
        view.update(status, float(step))
    shown.print(view.panel(65.0))
    text = out.getvalue()
    for part in (
        "✓ warm start",
        "● RL",
        "○ report",
        "step 5/10",
        "1:15 left",
        "0.500",
        "▁",
        "█",
        "50.0 %",
        "6,500 generated",
        "3 ready, 9 in flight",
        "1:04 elapsed",
    ):
        assert part in text, part


def test_a_failed_run_is_marked_where_it_failed() -> None:
    view, (shown, out) = View("run"), console(True)
    view.update(Status(phase="warmstart"), 0.0)
    view.update(Status(phase="failed", message="server-0 died"), 1.0)
    shown.print(view.panel(1.0))
    assert "✗ warm start" in out.getvalue()
    assert "server-0 died" in out.getvalue()


def test_the_display_follows_the_status_file_until_its_block_ends(tmp_path: Path) -> None:
    shown, out = console(False)
    with LiveDisplay(tmp_path / "status.json", tmp_path / "processes.json", "run", shown):
        write_status(tmp_path / "status.json", Status(phase="warmstart", step=1, total_steps=5))
        deadline = time.monotonic() + 60
        while "warmstart" not in out.getvalue() and time.monotonic() < deadline:
            time.sleep(0.05)
        write_status(tmp_path / "status.json", Status(phase="done", message="[bold]x"))
    assert [text.split("] ", 1)[1] for text in out.getvalue().splitlines()] == ["warmstart | step 1/5", "done | [bold]x"]


def test_a_terminal_gets_one_live_panel(tmp_path: Path) -> None:
    shown, out = console(True)
    write_json(tmp_path / "status.json", {"phase": "rl", "unknown key": 1})
    with LiveDisplay(tmp_path / "status.json", tmp_path / "processes.json", "my run", shown):
        pass
    assert "my run" in out.getvalue()


def test_small_formats() -> None:
    assert (clock(5), clock(187), clock(3729), clock(-3)) == ("0:05", "3:07", "1:02:09", "0:00")
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([2.0, 2.0]) == "▁▁"
