"""Which checkpoint the ranks go on from is rank 0's to say, whatever a network file system shows to the others."""

from __future__ import annotations

import json
from pathlib import Path

from tests.invariance.launching import run_ranks


def view(directory: Path, latest: str, *steps: str) -> None:
    for step in steps:
        (directory / step).mkdir(parents=True)
        (directory / step / "meta.json").write_text("{}")
    directory.mkdir(exist_ok=True)
    if latest:
        (directory / "latest").write_text(latest)


def test_all_ranks_go_on_from_what_rank_0_finds(tmp_path: Path) -> None:
    behind, blind, damaged, nothing, foreign = roots = [tmp_path / name for name in ("behind", "blind", "damaged", "nothing", "foreign")]
    for root in roots:
        root.mkdir()
    view(behind / "0", "step000040", "step000020", "step000040")
    view(behind / "1", "step000020", "step000020", "step000040")
    view(blind / "0", "step000040", "step000020", "step000040")
    view(blind / "1", "step000020", "step000020")
    view(damaged / "0", "step000060", "step000040")
    view(damaged / "1", "step000040", "step000040")
    view(nothing / "0", "")
    view(nothing / "1", "step000040", "step000040")
    for rank in "01":
        view(foreign / rank, "global_step7" if rank == "0" else "")
        (foreign / rank / "global_step7").mkdir()
    run_ranks(2, [{"root": str(root), "foreign": root == foreign} for root in roots], tmp_path / "out", "tests.unit.located_worker")
    ranks = [json.loads((tmp_path / "out" / f"said{rank}.json").read_text()) for rank in range(2)]
    assert [said[0] for said in ranks] == ["step000040"] * 2
    for said in ranks:
        assert said[1].startswith("UnreadableError: ") and "1 of 2 ranks do not see" in said[1]
        assert said[2].startswith("DamagedError: ") and "names 'step000060'" in said[2]
        assert said[3].startswith("WeightError: ") and "neither a checkpoint" in said[3]
        assert said[4] == "global_step7"
