"""Who serves, what is live, and who is left behind: stories with times in seconds and no sockets."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from neox_rl.run.members import Member, Members, State
from neox_rl.types import NO_VERSION

BEAT = 1.0
START = "(metarl.servers.start_timeout_s of the run)"


class Story:
    """Members whose changes are written down as words."""

    def __init__(self, *names: str) -> None:
        self.said: list[str] = []
        self.live: list[int] = []
        self.members = Members(BEAT, 0.0, lambda m: self.said.append(f"{m.name} {m.state} v{m.version}"), self.live.append)
        self.of = {name: self.members.join(name, f"http://{name}", 1, 0.0) for name in names}

    def serving(self, version: int, *names: str, at: float = 0.0) -> None:
        for name in names:
            if not self.of[name].incarnation:
                self.members.begin(self.of[name], f"{name}@1", at)
            self.members.attested(self.of[name], version, f"d{version}", at)

    def states(self) -> dict[str, str]:
        return {member.name: str(member.state) for member in self.members.all}


def test_a_version_is_live_once_every_serving_member_attests_it() -> None:
    story = Story("a", "b")
    story.serving(0, "a")
    assert story.live == [0], "b does not serve yet, so nobody waits for it"
    story.serving(0, "b")
    story.serving(1, "a")
    assert story.live == [0]
    story.serving(1, "b")
    assert story.live == [0, 1] and {m.digest for m in story.members.serving} == {"d1"}


def test_who_is_late_by_more_than_a_heartbeat_is_left_behind_and_comes_back_by_itself() -> None:
    story = Story("a", "b")
    story.serving(0, "a", "b")
    story.serving(1, "a", at=10.0)
    story.members.tick(11.0)
    assert story.live == [0] and story.states() == {"a": "serving", "b": "serving"}
    story.members.tick(11.01)
    assert story.live == [0, 1] and story.states()["b"] == "suspended"
    assert story.of["b"].why == "still at v0, 1 s after the first served v1"
    story.members.answers(story.of["b"], math.inf, 12.0)
    assert story.states()["b"] == "suspended", "it answers, but with v0"
    story.serving(1, "b", at=13.0)
    assert story.states()["b"] == "serving" and story.live == [0, 1]


def test_the_delay_counts_from_the_first_version_that_was_missed() -> None:
    story = Story("a", "b")
    story.serving(0, "a", "b")
    for version, at in ((1, 10.0), (2, 10.6), (3, 11.2)):
        story.serving(version, "a", at=at)
        story.members.tick(at)
    assert story.live == [0, 3]


def test_one_that_is_always_late_costs_one_heartbeat_and_is_waited_for_again_once_it_was_in_time() -> None:
    story = Story("a", "b")
    story.serving(0, "a", "b")
    delays = dict[int, float]()
    for version, behind_s in ((1, 1.5), (2, 1.5), (3, 1.5), (4, 0.5), (5, 0.5), (6, 1.5), (7, 1.5)):
        at, comes = version * 10.0, False
        story.serving(version, "a", at=at)
        for now in (at + 0.05 * tick for tick in range(1, 100)):
            if not comes and now >= at + behind_s:
                comes = True
                story.serving(version, "b", at=now)
            story.members.tick(now)
            if story.live[-1] == version and version not in delays:
                delays[version] = round(now - at, 2)
        assert story.states() == {"a": "serving", "b": "serving"}, "it serves in between"
    assert delays == {1: 1.05, 2: 0.05, 3: 0.05, 4: 0.05, 5: 0.5, 6: 1.05, 7: 0.05}
    assert story.of["b"].late and "b suspended v2" in story.said and "b suspended v4" not in story.said


def test_one_that_was_started_again_or_has_just_come_is_not_late() -> None:
    story = Story("a", "b")
    story.serving(0, "a", "b")
    story.serving(1, "a", at=10.0)
    story.members.tick(12.0)
    assert story.of["b"].late
    story.members.begin(story.of["b"], "b@2", 20.0)
    story.serving(1, "b", at=30.0)
    assert story.states()["b"] == "serving" and not story.of["b"].late
    story.serving(2, "a", at=40.0)
    story.members.tick(41.0)
    assert story.states()["b"] == "serving", "it is waited for"


def test_a_lone_server_is_never_late() -> None:
    story = Story("a")
    story.serving(0, "a")
    story.members.tick(1e6)
    assert story.states() == {"a": "serving"}


def test_a_dead_one_is_out_at_once_and_live_goes_on() -> None:
    story = Story("a", "b")
    story.serving(0, "a", "b")
    story.serving(1, "a")
    story.members.suspend(story.of["b"], "connection refused", 1.0)
    assert story.live == [0, 1]
    story.members.begin(story.of["b"], "b@2", 5.0)  # it was started again
    assert story.of["b"].version == NO_VERSION and story.states()["b"] == "staging"
    story.serving(2, "a")
    story.serving(1, "b", at=6.0)
    assert story.states()["b"] == "staging" and story.live == [0, 1, 2], "it catches up with what is live before it serves"
    story.serving(2, "b", at=7.0)
    assert story.states()["b"] == "serving"


def test_one_that_was_silent_for_a_moment_goes_on_where_it_was() -> None:
    story = Story("a", "b")
    story.serving(0, "a", "b")
    story.members.suspend(story.of["a"], "no answer", 1.0)
    story.members.answers(story.of["a"], 1.0, 2.0)
    assert story.states() == {"a": "serving", "b": "serving"} and story.of["a"].why == ""


def test_a_lost_one_needs_a_new_start() -> None:
    story = Story("a")
    story.serving(3, "a")
    story.members.lose(story.of["a"], "its switch to v4 failed", 1.0)
    story.members.answers(story.of["a"], 1.0, 2.0)
    assert story.states() == {"a": "lost"} and story.of["a"].workers == frozenset() and story.live == [3]


def test_one_that_left_may_come_again_under_its_name() -> None:
    story = Story("a", "b")
    story.serving(0, "a", "b")
    story.serving(1, "a")
    story.members.leave(story.of["b"], "asked to", 1.0)
    assert story.live == [0, 1] and story.states() == {"a": "serving"}
    story.members.leave(story.of["b"], "asked to", 2.0)
    assert story.said.count("b left v0") == 1
    assert story.members.join("b", "http://b", 2, 2.0).state is State.STARTING


def test_acks_of_an_earlier_life_are_not_its_own() -> None:
    story = Story("a")
    member = story.of["a"]
    assert member.workers == frozenset()
    story.members.begin(member, "a@1", 0.0)
    first = member.workers
    story.members.begin(member, "a@2", 0.0)
    assert first == {"a@1/0"} and member.workers == {"a@2/0"}


def test_hope_ends_when_every_member_is_past_its_deadline_and_each_is_named() -> None:
    story = Story("a", "b")

    def hopeless(now: float, offered: int = NO_VERSION, offered_at: float = 0.0) -> str:
        return story.members.hopeless(now, 30.0, 10.0, offered, offered_at)

    assert not hopeless(29.0)
    assert hopeless(31.0) == "a is starting; b is starting"
    story.members.begin(story.of["a"], "a@1", 31.0)
    assert not hopeless(100.0), "it waits for the trainer"
    assert not hopeless(105.0, 0, 100.0)
    assert hopeless(111.0, 0, 100.0) == "a is staging; b is starting"
    story.serving(0, "a", at=112.0)
    story.members.suspend(story.of["b"], "connection refused", 112.0)
    assert not hopeless(1e6, 0, 100.0)
    assert hopeless(1e6, 1, 900.0) == "a is serving; b is starting (connection refused)"


def test_when_all_have_left_there_is_hope_for_as_long_as_at_the_beginning() -> None:
    story = Story()
    assert not story.members.hopeless(30.0, 30.0, 10.0, 3, 20.0)
    assert story.members.hopeless(30.1, 30.0, 10.0, 3, 20.0) == "no server has joined"
    for begin, name in ((1000.0, "a"), (2000.0, "b")):
        story.members.leave(story.members.join(name, f"http://{name}", 1, begin), "asked to", begin + 100.0)
        assert not story.members.hopeless(begin + 130.0, 30.0, 10.0, 3, 20.0)
        said = f"all servers have left, the last one {name} (asked to)"
        assert story.members.hopeless(begin + 130.1, 30.0, 10.0, 3, 20.0) == said


def test_each_member_has_a_deadline_of_its_own_however_well_the_others_do() -> None:
    story = Story("good", "stuck")
    story.serving(0, "good", "stuck")
    said = ""
    for version in range(1, 400):  # each offer comes long before the last one's deadline
        story.members.offer(version, version * 10.0)
        story.serving(version, "good", at=version * 10.0 + 1.0)
        story.members.tick(version * 10.0 + 5.0)
        assert not story.members.overdue(story.of["good"], math.inf, version * 10.0 + 5.0, 300.0, 180.0)
        if said := story.members.overdue(story.of["stuck"], math.inf, version * 10.0 + 5.0, 300.0, 180.0):
            break
    keys = "(metarl.weights.stage_timeout_s + metarl.weights.switch_timeout_s of the run)"
    assert said == f"it answers, but has v0 and came to no newer one in 180 s {keys}; v19 is offered"
    story.members.lose(story.of["stuck"], said, 195.0)
    assert not story.members.overdue(story.of["stuck"], 195.0, 495.0, 300.0, 180.0), "it has the time of a start again"
    assert story.members.overdue(story.of["stuck"], 195.0, 495.1, 300.0, 180.0) == f"it did not come back in 300 s {START}"


def test_a_server_that_moves_on_or_owes_nothing_has_time() -> None:
    story = Story("slow", "early")
    assert not story.members.overdue(story.of["early"], 0.0, 300.0, 300.0, 10.0)
    assert story.members.overdue(story.of["early"], 0.0, 300.1, 300.0, 10.0) == f"silent for 300 s {START}"
    story.members.begin(story.of["slow"], "slow@1", 0.0)
    assert not story.members.overdue(story.of["slow"], math.inf, 1e6, 300.0, 10.0), "it waits for the trainer"
    for version in range(20):
        story.members.offer(version, version * 5.0)
        if version % 2:
            story.serving(version - 1, "slow", at=version * 5.0)
        assert not story.members.overdue(story.of["slow"], math.inf, version * 5.0, 300.0, 10.0)
    story.serving(19, "slow", at=100.0)
    assert not story.members.overdue(story.of["slow"], math.inf, 1e6, 300.0, 10.0)
    story.members.offer(20, 200.0)
    assert story.members.overdue(story.of["slow"], 205.0, 250.0, 300.0, 10.0) == "", "silent, it may be starting again"
    story.members.offer(18, 251.0)
    assert not story.members.overdue(story.of["slow"], math.inf, 1e6, 300.0, 10.0), "after a rollback it owes nothing"


def test_a_silence_that_was_allowed_does_not_count_as_time_to_stage_and_a_late_probe_does() -> None:
    story = Story("good", "cut off")
    story.serving(0, "good", "cut off")
    member = story.of["cut off"]
    story.members.offer(1, 1.0)
    story.serving(1, "good", at=2.0)
    story.members.suspend(member, "no answer", 3.0)
    assert not story.members.overdue(member, 3.0, 250.0, 300.0, 180.0)
    story.members.answers(member, 3.0, 250.0)
    assert not story.members.overdue(member, math.inf, 250.0, 300.0, 180.0)
    for at in range(260, 420, 10):  # now and then a probe of it comes late
        story.members.answers(member, at - BEAT, float(at))
        story.members.answers(member, math.inf, at + 1.0)
    assert not story.members.overdue(member, math.inf, 428.0, 300.0, 180.0), "1 s before the silence, which began at 3 s"
    assert "came to no newer one in 180 s" in story.members.overdue(member, math.inf, 428.1, 300.0, 180.0)


def test_a_server_that_falls_silent_again_and_again_and_stages_nothing_is_overdue_all_the_same() -> None:
    story = Story("good", "flaps")
    story.serving(0, "good", "flaps")
    story.members.offer(1, 0.0)
    now = 0.0
    for _ in range(18):
        story.members.answers(story.of["flaps"], now + 10.0, now + 15.0 + BEAT)
        now += 15.0 + BEAT
    assert "came to no newer one in 180 s" in story.members.overdue(story.of["flaps"], math.inf, now + 0.1, 300.0, 180.0)


ACTIONS = st.sampled_from(["switch", "suspend", "lose", "answers", "begin", "tick"])


@given(st.lists(st.tuples(ACTIONS, st.integers(0, 2), st.floats(0.0, 2.0)), max_size=60))
def test_live_never_falls_and_no_member_serves_less_than_what_is_live(steps: list[tuple[str, int, float]]) -> None:
    story = Story("a", "b", "c")
    now, newest = 0.0, 0

    def act(what: str, member: Member) -> None:
        nonlocal newest
        if what == "switch" and member.incarnation:
            newest += member.version == newest
            story.members.attested(member, newest, "", now)
        elif what == "suspend":
            story.members.suspend(member, "", now)
        elif what == "lose":
            story.members.lose(member, "", now)
        elif what == "answers":
            story.members.answers(member, now - dt, now)
        elif what == "begin" and member.state is not State.SERVING:
            story.members.begin(member, "x", now)

    for what, index, dt in steps:
        now += dt
        act(what, list(story.of.values())[index])
        story.members.tick(now)
        assert all(member.version >= story.members.live for member in story.members.serving)
    assert story.live == sorted(set(story.live))
