"""Servers that are slow with a version: what a new start would not help is not started again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zmq

from neox_rl.rollout.vllm_control import VllmControl
from neox_rl.run.members import State
from neox_rl.weights.wire import STAGED, control
from tests.unit.small_run import small_snapshot
from tests.unit.test_run_members import Story
from tests.unit.test_run_versions import LIMITS, Run, server, story, until


def test_a_server_whose_copies_come_too_late_is_not_started_again_and_why_is_said(tmp_path: Path) -> None:
    async def told(run: Run) -> None:
        quick, far = run.spec("quick"), run.spec("far")
        async with server(run, quick), server(run, far) as it:
            it.deaf = True  # the acks of its workers come from here
            await run.serving(quick)
            run.keeper.add(far, lambda why: run.restarts.append(("far", why)))
            await run.until_state("far", State.STAGING)
            member = run.keeper.members.get("far")
            assert member is not None
            with zmq.Context() as context, context.socket(zmq.DEALER) as acks:
                acks.setsockopt(zmq.LINGER, 0)
                acks.connect(run.publisher.address)
                for version in range(1, 5):  # three quarters of the time that a copy may take go by for each
                    run.publish(version)
                    await run.until_live(version)
                    member.owes_since -= 45.0
                    for who in member.workers:
                        acks.send_multipart(control(STAGED, version=version - 1, who=who, digest=small_snapshot(version - 1).digest))
                    await until(lambda late=version - 1: member.copied == late, f"the copy of v{version - 1} to be noted")
            assert run.restarts == [] and run.states() == {"quick": "serving", "far": "staging"}
            assert member.why == "its copy of v3 came when v4 was live: raise metarl.weights.publish_every, or give it a faster link"
            member.owes_since -= 60.0
            await run.until_state("far", State.LOST)
            assert [name for name, _ in run.restarts] == ["far"], "where no copy comes any more it is"

    story(told, tmp_path, replace(LIMITS, stage_s=30.0, switch_s=30.0))


def test_a_copy_that_comes_too_late_counts_once_and_one_that_is_in_time_has_it_serve() -> None:
    told = Story("quick", "far")
    far = told.of["far"]
    told.members.offer(0, 0.0)
    told.serving(0, "quick")
    told.members.begin(far, "far@1", 0.0)
    for version in (1, 2, 3):
        told.members.offer(version, version * 10.0)
        told.serving(version, "quick", at=version * 10.0)
        assert told.members.copied(far, version - 1, version * 10.0 + 5.0) == (version == 2), "it is said once"
        assert not told.members.copied(far, version - 1, version * 10.0 + 9.0)
        assert far.owes_since == version * 10.0 + 5.0
        assert ("publish_every" in far.why) == (version > 1), "the first copy of one that has just come says nothing of its link"
    told.serving(3, "far", at=39.0)
    assert told.states() == {"quick": "serving", "far": "serving"} and far.why == ""
    told.serving(5, "quick", at=50.0)
    assert not told.members.copied(far, 4, 51.0) and "publish_every" not in far.why, "the one before it was in time"


def test_a_server_has_the_time_of_a_switch_to_attest_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its next step computes all keys and values of what is in flight anew, before it answers anything."""
    asked: list[tuple[str, float]] = []
    call = VllmControl._call

    async def seen(self: VllmControl, method: str, route: str, deadline_s: float, **request: Any) -> dict[str, Any]:
        asked.append((route, deadline_s))
        return await call(self, method, route, deadline_s, **request)

    monkeypatch.setattr(VllmControl, "_call", seen)

    async def told(run: Run) -> None:
        spec = run.spec("a")
        async with server(run, spec):
            await run.serving(spec)
            attests = next(i for i, (route, _) in enumerate(asked) if route == "/wake_up") + 1
            assert asked[attests] == ("/weight_info", run.limits.switch_s)

    story(told, tmp_path)
