"""A short run in which everything is killed once, and some is stopped, joins and leaves: ``tools/chaos.py`` as a user calls it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.runs import ROOT
from tools.chaos import main


def test_a_tormented_run_ends_and_its_audit_finds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs/debug/fake_generator.yml")
    status = main([config, "--kills", "7", "--seed", "7", "--servers", "scripted", "--runs-dir", str(tmp_path), "--hang-s", "100"])
    said = capsys.readouterr().out
    assert status == 0, said
    assert "7 kills" in said and "0 violations" in said
    assert all(f"kill {role}" in said for role in ("server", "orchestrator", "rank", "launcher")), said
