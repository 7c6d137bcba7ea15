"""What summary, report and table say of runs whose rollouts have several episodes."""

from __future__ import annotations

import json
from pathlib import Path

from synthetic_run import write_run

from neox_rl.telemetry.jsonl import read_jsonl
from neox_rl.telemetry.report import write_report
from neox_rl.telemetry.rundata import load_run
from neox_rl.telemetry.summary import build_summary
from neox_rl.telemetry.table import before_after, tag_rows


def test_what_each_episode_found_is_drawn_where_a_rollout_has_several(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "episodes")
    assert "Found by each episode" not in write_report(paths.root).read_text()
    rows = read_jsonl(paths.evaluations)
    for row in rows:
        row["found_by"] = [{"mean": share, "ci95_low": share - 0.1, "ci95_high": share + 0.1, "n": 9} for share in (0.2, 0.4, 0.6)]
    for mode, other in (("sampled", "greedy"), ("greedy", "sampled")):
        paths.evaluations.write_text("".join(json.dumps(row) + "\n" for row in rows if row["mode"] == mode or mode == "sampled"))
        page = write_report(paths.root).read_text()
        assert "Found by each episode" in page and "episode k" in page
        assert f"after RL, {mode}" in page and f"after RL, {other}" not in page, "a curve says how its rollouts were made"
    paths.evaluations.write_text("".join(json.dumps(row | {"found_by": row["found_by"][:1]}) + "\n" for row in rows))
    assert "Found by each episode" not in write_report(paths.root).read_text(), "one attempt: the accuracy again"


def test_a_rollout_of_several_episodes_says_which_of_them_the_accuracy_is_of(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "episodes")
    assert build_summary(load_run(paths.root))["heldout_solved_in"] is None
    rows = read_jsonl(paths.evaluations)
    paths.evaluations.write_text("".join(json.dumps(row | {"solved_in": "the last episode"}) + "\n" for row in rows))
    summary = build_summary(load_run(paths.root))
    page = write_report(paths.root).read_text()
    assert summary["heldout_solved_in"] == "the last episode" and "right in the last episode" in str(before_after(summary).title)
    assert page.count("Held-out accuracy, right in the last episode") == 3, "of the figure, the chart and what the chart is called"
    assert " % in the last episode before RL, and solves " in page.replace("\u00a0", " ")


def test_what_a_policy_does_under_each_tag_is_told_beside_the_accuracy(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "tags")
    assert tag_rows(build_summary(load_run(paths.root))) == [] and "work quickly" not in write_report(paths.root).read_text()

    def interval(mean: float) -> dict[str, float]:
        return {"mean": mean, "ci95_low": mean - 0.1, "ci95_high": mean + 0.1, "n": 9}

    rows = read_jsonl(paths.evaluations)
    for row in rows:
        hasty = 12.0 if row["label"] == "final" else 30.0
        row["by_tag"] = {
            "work quickly": {"accuracy": interval(0.5), "tokens": interval(hasty)},
            "take your time": {"accuracy": interval(0.6), "tokens": interval(30.0)},
        }
    paths.evaluations.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = build_summary(load_run(paths.root))
    assert summary["heldout_by_tag_final_greedy"]["work quickly"] == {"accuracy": interval(0.5), "tokens": interval(12.0)}
    hasty_row, patient_row, *_ = tag_rows(summary)
    assert hasty_row == (
        "“work quickly”, greedy",
        "50.0 % [40.0, 60.0] in 30.0 [29.9, 30.1] tokens",
        "50.0 % [40.0, 60.0] in 12.0 [11.9, 12.1] tokens",
        "-18.0 tokens",
    )
    assert patient_row[0] == "“take your time”, greedy" and patient_row[3] == "+0.0 tokens"
    assert before_after(summary).row_count == before_after({**summary, **{key: None for key in summary if "by_tag" in key}}).row_count + 4
    assert "50.0 % [40.0, 60.0] in 12.0 [11.9, 12.1] tokens" in write_report(paths.root).read_text()
