"""Who is started again after a death, and how silence and standstill are told from patience. No clock."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from neox_rl.errors import GIVES_UP
from neox_rl.run.processes import ORCHESTRATOR, RANKS
from neox_rl.run.recovery import HEALTHY_S, LONGEST_BACKOFF_S, SOON_S, Act, Recovery
from neox_rl.run.signs import Signs
from neox_rl.run.watch import Watch
from neox_rl.telemetry.heartbeat import Beat, interval_s
from tests.unit.small_run import small_config, small_paths


def recovery(root: Path, servers: int = 2, restarts: int = 0, started: int = 1) -> Recovery:
    config = small_config(root, servers={"max_restarts": servers})
    found = Recovery(replace(config, metarl=replace(config.metarl, restarts=restarts, orchestrator_restarts=2)))
    for name in (*(f"server-{i}" for i in range(started)), ORCHESTRATOR, RANKS):
        found.started(name, 0.0)
    return found


def falls(found: Recovery, name: str, *times: float) -> list[Act]:
    """The decisions on deaths at these times, each right after a start."""
    acts = []
    for now in times:
        acts.append(found.fell(name, now, -9).act)
        found.started(name, now)
    return acts


def test_a_server_is_started_again_until_its_limit_and_then_the_run_ends_with_the_last_one(tmp_path: Path) -> None:
    assert falls(recovery(tmp_path), "server-0", 1, 2, 3) == [Act.RESTART, Act.RESTART, Act.END]


def test_the_others_go_on_without_a_server_that_is_beyond_help(tmp_path: Path) -> None:
    found = recovery(tmp_path, servers=0, started=2)
    first, last = found.fell("server-1", 1.0, 0), found.fell("server-0", 2.0, 0)
    assert (first.act, last.act) == (Act.GO_ON, Act.END)
    assert "the other servers go on" in first.why and "no other server is left" in last.why


def test_servers_that_joined_count_as_others(tmp_path: Path) -> None:
    assert recovery(tmp_path, servers=0).fell("server-0", 1.0, -9, others_serve=True).act is Act.GO_ON


def test_restarts_are_forgiven_after_a_while_of_health_and_not_in_a_crash_loop(tmp_path: Path) -> None:
    found, later = recovery(tmp_path), HEALTHY_S + 10
    assert falls(found, "server-0", 1, 2, later, later + 1, later + 2) == [Act.RESTART, Act.RESTART, Act.RESTART, Act.RESTART, Act.END]


def test_a_lone_death_is_healed_at_once_and_each_further_one_later(tmp_path: Path) -> None:
    found = recovery(tmp_path, servers=9)
    delays = [found.fell("server-0", 1.0, -9).delay_s for _ in range(9)]
    assert delays[:4] == [0.0, 1.0, 2.0, 4.0] and delays == sorted(delays) and delays[-1] == LONGEST_BACKOFF_S


def test_a_death_after_a_while_of_work_waits_for_nothing(tmp_path: Path) -> None:
    found, now = recovery(tmp_path, servers=9), 0.0
    for _ in range(9):
        found.started("server-0", now)
        now += SOON_S + 1
        assert found.fell("server-0", now, -9).delay_s == 0.0


def test_ranks_resume_as_often_as_the_user_allowed_however_long_they_were_well(tmp_path: Path) -> None:
    assert falls(recovery(tmp_path), RANKS, 1) == [Act.END]
    assert falls(recovery(tmp_path, restarts=2), RANKS, 1, 1000, 2000) == [Act.RESUME, Act.RESUME, Act.END]


def test_an_error_that_would_come_again_is_not_tried_again(tmp_path: Path) -> None:
    found = recovery(tmp_path, restarts=5)
    assert {found.fell(name, 1.0, GIVES_UP).act for name in ("server-0", ORCHESTRATOR, RANKS)} == {Act.END}


# --- signs of life


def beat(rank: int, number: int, doing: str = "train_step phase rl step 4", pid: int = 0) -> Beat:
    return Beat(f"trainer-{rank}", pid or 100 + rank, "here", number, doing)


def told(signs: Signs, *rounds: tuple[float, list[Beat]]) -> None:
    for now, beats in rounds:
        signs.hear({b.process: b for b in beats}, now, 1.0)


def test_the_silent_rank_is_named_with_what_it_was_at(tmp_path: Path) -> None:
    signs = Signs(silence_s=5.0, step_s=100.0, start_s=30.0)
    told(signs, *((float(t), [beat(0, t + 1), beat(1, min(t, 2) + 1)]) for t in range(9)))
    assert signs.stuck("trainer-", 7.0) == ""
    said = signs.stuck("trainer-", 8.0)
    assert said == "shows no sign of life for 6 s: trainer-1 (pid 101 on here), at train_step phase rl step 4"


def test_a_standstill_names_all_who_wait_and_first_who_has_waited_longest() -> None:
    signs = Signs(silence_s=5.0, step_s=10.0, start_s=30.0)
    told(
        signs,
        *((float(t), [beat(0, t + 1, "publish version 4" if t > 2 else "train_step"), beat(1, t + 1, "train_step")]) for t in range(15)),
    )
    said = signs.stuck("trainer-", 14.0)
    assert (
        said.startswith("stands still for 14 s: trainer-1 (pid 101 on here), at train_step; trainer-0 ") and "at publish version 4" in said
    )


def test_a_rank_that_does_not_take_what_rank_0_has_is_named(tmp_path: Path) -> None:
    """It shows life, and waits as it may: only that rank 0 waits for ranks, and no longer for a batch, gives it away."""
    signs = Signs(silence_s=5.0, step_s=10.0, start_s=30.0)
    doing = ["wait_batch phase rl step 4"] * 20 + ["hand_over"] * 20
    told(signs, *((float(t), [beat(0, t + 1, doing[t]), beat(1, t + 1, doing[0]), beat(2, t + 1, "train_step")]) for t in range(27)))
    assert signs.stuck("trainer-", 26.0).startswith("stands still for 26 s: trainer-2 ")
    signs.forget("trainer-2")
    assert signs.stuck("trainer-", 29.0) == ""
    said = signs.stuck("trainer-", 31.0)
    assert (
        said.startswith("stands still for 11 s: trainer-0 ") and "; who did not take it: trainer-1 (pid 101 on here), at wait_batch" in said
    )


@pytest.mark.parametrize(
    "doing", ["wait_batch phase rl step 4", "evaluate label final version 9", "build", "load directory d", "wait_disk directory d"]
)
def test_waits_with_deadlines_of_their_own_are_no_standstill(doing: str) -> None:
    signs = Signs(silence_s=5.0, step_s=10.0, start_s=30.0)
    told(signs, *((float(t), [beat(0, t + 1, doing)]) for t in range(40)))
    assert signs.stuck("trainer-", 39.0) == ""


@pytest.mark.parametrize("doing", ["build", "load directory d"])
def test_a_rank_that_is_built_or_loads_may_be_silent_as_long_as_a_start_may_take(doing: str) -> None:
    signs = Signs(silence_s=5.0, step_s=10.0, start_s=30.0)
    told(signs, *((float(t), [beat(0, 1, doing), beat(1, t + 1, doing)]) for t in range(40)))
    assert signs.stuck("trainer-", 30.0) == ""
    assert signs.stuck("trainer-", 31.0) == f"shows no sign of life for 31 s: trainer-0 (pid 100 on here), at {doing}"


def test_time_in_which_the_launcher_was_stopped_itself_counts_for_nothing() -> None:
    signs = Signs(silence_s=5.0, step_s=10.0, start_s=30.0)
    told(signs, (0.0, [beat(0, 1)]), (1.0, [beat(0, 1)]), (500.0, [beat(0, 1)]))
    assert signs.stuck("trainer-", 500.5) == ""
    told(signs, *((500.0 + t, [beat(0, 1)]) for t in range(1, 6)))
    assert "no sign of life" in signs.stuck("trainer-", 505.0)


def test_a_successor_under_the_same_name_starts_anew() -> None:
    signs = Signs(silence_s=5.0, step_s=100.0, start_s=30.0)
    told(signs, (0.0, [beat(0, 7)]), (1.0, [beat(0, 7)]), (2.0, [beat(0, 7)]), (3.0, [beat(0, 1, pid=555)]), (4.0, [beat(0, 1, pid=555)]))
    assert signs.stuck("trainer-", 7.0) == ""
    signs.forget("trainer-")
    assert signs.heard_of("trainer-") == []


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("at", ["", "prepare"])
def test_an_orchestrator_that_does_not_come_up_is_named_with_what_it_is_at_and_not_the_ranks_that_wait_for_it(
    tmp_path: Path, at: str, up: bool
) -> None:
    config = small_config(tmp_path)
    paths, start_s = small_paths(config), config.metarl.deadlines.ranks_start_s
    watch, begun = Watch(config, paths), time.monotonic()

    def said(now: float) -> list[str]:
        return [watch.reason_to_end(name, up, begun + now) for name in (ORCHESTRATOR, RANKS)]

    def beats(doing: str, number: int) -> None:
        row = asdict(replace(beat(0, number, doing), process=ORCHESTRATOR))
        paths.beats.joinpath(f"{ORCHESTRATOR}.json").write_text(json.dumps(row))

    if at:
        beats(at, 1)
    assert said(start_s - 1.0) == ["", ""]
    if at:
        beats(at, 2)
    heard = f"{ORCHESTRATOR} (pid 100 on here), at {at}" if at else f"nothing was heard of {ORCHESTRATOR}"
    late, ranks = said(start_s + 1.0)
    assert late.startswith(f"did not come up within {start_s:.0f} s: {heard}; ") and ranks == ""
    beats("generate", 3)
    assert said(start_s + 2.0) == ["", ""], "it serves, and hears the ranks from now on"
    beats("generate", 4)
    assert said(2 * start_s + 1.0) == ["", ""]
    beats("generate", 5)
    late, ranks = said(2 * start_s + 3.0)
    found = f"did not come up within {start_s:.0f} s: nothing was heard of trainer-0"
    assert late == "" and (ranks == "" if up else ranks.startswith(found))


def test_a_rank_that_gave_another_one_up_is_named_with_the_one_that_is_silent(tmp_path: Path) -> None:
    """As a collective ends that waits for a stopped rank: in the other one, by its deadline."""
    config = small_config(tmp_path)
    paths, second_s = small_paths(config), interval_s(config.metarl.deadlines.silence_s) / 3
    watch = Watch(config, paths)
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as waiting:

        def hear(look: int) -> str:
            for row in (beat(0, look + 1, pid=waiting.pid), beat(1, min(look, 2) + 1, pid=os.getpid()), beat(2, look + 1, pid=os.getpid())):
                paths.beats.joinpath(f"{row.process}.json").write_text(json.dumps(asdict(row) | {"host": socket.gethostname()}))
            return watch.reason_to_end(RANKS, True, look * second_s)

        assert [hear(look) for look in range(12)] == [""] * 12
        waiting.kill()
    assert [hear(look) for look in (12, 13, 14)] == [""] * 3, "its runner has a moment to end"
    said = hear(15)
    assert said.startswith(f"lost trainer-0 (pid {waiting.pid} on ") and "trainer-2" not in said
    assert f"at train_step phase rl step 4; and no sign of life from trainer-1 (pid {os.getpid()} on " in said
