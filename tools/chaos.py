"""Kills, stops, adds and takes away processes of a run at random, has it end, and audits what it left.

    python tools/chaos.py configs/debug/fake_generator.yml --kills 40 --seed 1
    python tools/chaos.py configs/debug/fake_generator.yml --kills 5 --seed 1 --servers real

The faults come every few steps, some right after one another, so that what heals is hit too: ``kill -9`` of a server, a worker inside
one, the orchestrator, a training rank, the launcher (then ``--resume``), a guardian, a joined server and its agent; servers that join and
leave; processes that stand still for seconds, and, with ``--hangs``, for good: a server, the orchestrator or a rank that the run must
find, name and replace. Every other orchestrator that is killed, and every other launcher, finds the journal's end as a machine that lost
its power may leave it, or a byte flipped before that. Who, what and when is drawn from ``--seed``, and how the run answers decides what is
there to be struck next. ``--kills`` counts kills; the other faults come on top. With ``--set num_gpus=2`` there are two ranks to strike.

Exit status 1: the run did not end well in time, something of it was left, or the audit found a violation. 2: bad input.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
from audit import report
from chaos_journal import FLIP, harm
from chaos_run import ChaosRun, alive, send

from neox_rl.config.load import parse
from neox_rl.config.machine import Machine
from neox_rl.config.rules import check
from neox_rl.config.run import RunConfig
from neox_rl.errors import ConfigError
from neox_rl.run.audit_files import audit_run
from neox_rl.run.endpoints import free_port
from neox_rl.run.resume import has_checkpoint
from neox_rl.telemetry.events import Event, read_events
from neox_rl.telemetry.paths import RunPaths

KILLS = {"server": 8, "worker": 5, "orchestrator": 6, "rank": 2, "launcher": 1, "agent": 2, "joined": 2, "guardian": 1}
"""Roles, and how often each is drawn beside the others; one that takes longest to come back, least."""
STOPS = {"server": 4, "orchestrator": 2, "rank": 1, "agent": 1, "joined": 2}
HANGS = {"server": 2, "orchestrator": 1, "rank": 1}
MIX = {"kill": 12, "stop": 4, "join": 2, "leave": 2, "hang": 1}
TORN = 0.5
"""Share of the killed orchestrators and launchers whose successor finds the journal harmed."""
MAX_JOINED = 2
LONGEST_STOP_S = 8.0
BURST = 0.3
"""Share of the faults that come right after the one before."""
STEPS_A_FAULT, BUDGET = 3, 6
STEPS_LEFT = 20
"""At the end, without a fault."""
END_S = 120.0
HANG_S = 60.0
POLL_S = 0.1
FAST = (
    *("checkpoint_factor=4", "metarl.warmstart.steps=4", "metarl.evaluation.num_problems=4", "metarl.rollout.flush_tokens=16"),
    *("metarl.rollout.groups_per_step=3", "metarl.rollout.group_size=2", "metarl.rollout.record_every=0"),
    *("metarl.restarts=100000", "metarl.orchestrator_restarts=100000", "metarl.servers.max_restarts=100000"),
    *("metarl.servers.heartbeat_s=2.0", "metarl.deadlines.silence_s=10.0", "metarl.deadlines.shutdown_s=8.0"),
    "metarl.audit=stop",
)
FOUND_IN = ("metarl.servers.start_timeout_s=90.0",)  # a server that is silent; where none is to be, a slow start may take longer
SERVERS = {
    "scripted": ("metarl.rollout.generator=scripted", "metarl.servers.num_servers=3", "metarl.scripted.token_s=0.004"),
    "real": (
        *("metarl.rollout.generator=vllm", "metarl.servers.num_servers=1", "metarl.servers.max_num_seqs=32"),
        *("metarl.servers.kv_cache_gib=0.25", "metarl.servers.heartbeat_s=6.0", "metarl.servers.start_timeout_s=300.0"),
    ),
}


@dataclass
class Fault:
    """``t_ns`` is when it struck; a process that was stopped, when it went on. ``who`` is the part of the run."""

    kind: str
    who: str
    t_ns: int
    healed_s: float | None = None


@dataclass(slots=True)
class Hung:
    """A process that stands still until the run ends it: by ``until``, which other faults put off."""

    process: psutil.Process
    role: str
    name: str
    t_ns: int
    until: float


class ViolationError(Exception):
    """What must not happen did."""


@dataclass
class Chaos:
    """``torment`` strikes until ``kills`` processes were killed, and has the run end."""

    run: ChaosRun
    config: RunConfig
    rng: random.Random
    kills: int
    hang_s: float
    join_flags: Sequence[str] = ()
    hangs: bool = False
    faults: list[Fault] = field(default_factory=list)
    done: int = 0
    _stopped: list[tuple[float, psutil.Process, str, str]] = field(default_factory=list)
    _hung: list[Hung] = field(default_factory=list)
    _steps: int = 0
    _moved: float = field(default_factory=time.monotonic)
    _joins: int = 0
    _struck: set[tuple[str, str]] = field(default_factory=set)

    def torment(self) -> None:
        """Raises ViolationError."""
        begin = time.monotonic()
        while self.done < self.kills:
            gap = 0 if self.rng.random() < BURST else self.rng.randint(1, 2 * STEPS_A_FAULT)
            if not self._wait(gap, self.rng.uniform(0.0, 1.5)):
                break
            self._strike(begin)
        while not self._wait_for_end():
            pass

    # waiting

    def _look(self) -> bool:
        """Whether the run goes on. Stopped processes go on in time. Raises ViolationError for a run that failed or stands still."""
        now = time.monotonic()
        for entry in [entry for entry in self._stopped if entry[0] <= now]:
            self._stopped.remove(entry)
            if send(entry[1], signal.SIGCONT):
                self.faults.append(Fault(f"stop {entry[2]}", entry[3], time.time_ns()))
        self._look_at_the_hung(now)
        code = self.run.launcher.poll()
        if code is not None and code != 0:
            raise ViolationError(f"the run ended with status {code}; see {self.run.output}")
        phase, step = self.run.position()
        if (here := hash((phase, step))) != self._steps:
            self._steps, self._moved = here, now
        if now - self._moved > self.hang_s:
            raise ViolationError(f"no step for {self.hang_s:.0f} s: the run stands still at {phase} {step}; see {self.run.paths.logs}")
        time.sleep(POLL_S)
        return code is None

    def _look_at_the_hung(self, now: float) -> None:
        for hung in list(self._hung):
            if not alive(hung.process):
                self._hung.remove(hung)
                self.faults.append(Fault(f"hang {hung.role}", hung.name, hung.t_ns))
            elif now > hung.until and self.run.launcher.poll() is None:
                raise ViolationError(f"{hung.role} {hung.name} stands still for {self._patience():.0f} s, and nobody ended it")

    def _patience(self) -> float:
        """By then the run has found who stands still."""
        metarl = self.config.metarl
        return max(metarl.servers.start_timeout_s, metarl.deadlines.silence_s, metarl.deadlines.ranks_start_s) + HANG_S

    def _wait(self, steps: int, seconds: float) -> bool:
        """``steps`` more steps of the trainer and then some; False where the run ends, or has only steps left that are to be quiet."""
        at, goal = self._step(), self._step() + steps
        while self._look():
            now = self._step()
            if now < at:  # a rollback: those steps come again
                goal -= at - now
            at = now
            if now >= goal:
                break
        end = time.monotonic() + seconds
        while time.monotonic() < end and self._look():
            pass
        return self.run.launcher.poll() is None and self._step() < self.config.neox.train_iters - STEPS_LEFT / 2

    def _step(self) -> int:
        phase, step = self.run.position()
        return step if phase == "rl" else -1 if phase in ("starting", "warmstart", "evaluate") else self.config.neox.train_iters

    def _wait_for_end(self) -> bool:
        return not self._look()

    # striking

    def _strike(self, begin: float) -> None:
        mix = {kind: share for kind, share in MIX.items() if kind != "hang" or self.hangs}
        kind = self.rng.choices(list(mix), list(mix.values()))[0] if self._joins else "join"
        for hung in self._hung:  # who would find it may be struck
            hung.until = time.monotonic() + self._patience()
        if kind == "join" or (kind == "leave" and not self._joined()):
            self._join(begin)
        elif kind == "leave":
            name = self.rng.choice(self._joined())
            self.run.agents[name].send_signal(signal.SIGTERM)
            self._note(begin, "leave", name)
        else:
            self._hit(kind, begin)

    def _joined(self) -> list[str]:
        return sorted(name for name, agent in self.run.agents.items() if agent.poll() is None)

    def _join(self, begin: float) -> None:
        if len(self._joined()) < MAX_JOINED and self.run.paths.endpoints.exists():
            self._joins += 1
            name = f"joiner-{self._joins}"
            self.run.join(name, self.join_flags)
            self._note(begin, "join", name)

    def _hit(self, kind: str, begin: float) -> None:
        weights = {"kill": KILLS, "stop": STOPS, "hang": HANGS}[kind]
        victims = self.run.victims()
        still = {hung.process for hung in self._hung}  # the run is to find them
        victims.by_role = {role: [process for process in found if process not in still] for role, found in victims.by_role.items()}
        roles = [role for role in weights if victims.by_role[role] and (role != "launcher" or self._can_resume())]
        if kind == "hang":  # one at a time, and not the last server
            roles = [] if self._hung or self._step() < 0 else [r for r in roles if r != "server" or len(victims.by_role[r]) > 1]
        if roles in ([], ["launcher"]):  # one that was just started again, with nothing under it yet: killing it again meets nothing new
            return
        # Each role is struck once before any is struck again: a short run has something of everything.
        roles = [role for role in roles if (kind, role) not in self._struck] or roles
        role = self.rng.choices(roles, [weights[role] for role in roles])[0]
        self._struck.add((kind, role))
        victim = self.rng.choice(sorted(victims.by_role[role], key=lambda process: victims.names[process.pid]))
        name = victims.names[victim.pid]
        if kind != "kill":
            if not any(process == victim for _, process, _, _ in self._stopped) and send(victim, signal.SIGSTOP):
                self._halt(kind, victim, role, name)
                print(f"{time.monotonic() - begin:7.1f} s  step {self._step():4d}  {kind} {role} {name}", flush=True)
        elif send(victim, signal.SIGKILL):
            self.done += 1
            self._note(begin, f"kill {role}", name)
            if role == "launcher":
                self._await_end()
            if role in ("launcher", "orchestrator") and self.rng.random() < TORN:
                self._harm(begin)  # its writer is dead, and nobody goes on with it yet
            if role == "launcher":
                self.run.launch(resume=True)

    def _harm(self, begin: float) -> None:
        rng = random.Random(self.rng.random())
        if self.run.paths.journal.is_dir() and (did := harm(self.run.paths.journal, rng)):
            self._note(begin, did[0], f"journal: {did[1]}")

    def _halt(self, kind: str, victim: psutil.Process, role: str, name: str) -> None:
        if kind == "stop":
            self._stopped.append((time.monotonic() + self.rng.uniform(0.3, LONGEST_STOP_S), victim, role, name))
        else:
            self._hung.append(Hung(victim, role, name, time.time_ns(), time.monotonic() + self._patience()))

    def _can_resume(self) -> bool:
        return has_checkpoint(self.config, self.run.paths)

    def _await_end(self) -> None:
        """All that the launcher started must end by itself, also what stands still."""
        self.run.launcher.wait()
        agents = {agent.pid for agent in self.run.agents.values()}
        end = time.monotonic() + self.config.metarl.deadlines.shutdown_s + 20.0
        while left := [p for p in self.run.processes() if p.pid not in agents and not agents & _above(p)]:
            if time.monotonic() > end:
                raise ViolationError(f"the launcher was killed, and {[p.pid for p in left]} live on")
            for _, process, _, _ in self._stopped:  # the tormentor's own doing: a stopped process hears no SIGTERM
                send(process, signal.SIGCONT)
            time.sleep(POLL_S)
        self._stopped.clear()
        self._hung.clear()  # they ended with the others, and nobody was there to name them

    def _note(self, begin: float, kind: str, who: str) -> None:
        print(f"{time.monotonic() - begin:7.1f} s  step {self._step():4d}  {kind} {who}", flush=True)
        self.faults.append(Fault(kind, who, time.time_ns()))


def _above(process: psutil.Process) -> set[int]:
    try:
        return {parent.pid for parent in process.parents()}
    except psutil.Error:
        return set()


def unnamed(faults: Sequence[Fault], events: Sequence[Event]) -> list[str]:
    """Processes that stood still and are gone, of which the launcher says nothing; with the ranks it starts the orchestrator again, too."""
    died = [(event.t_ns, event.fields.get("process")) for event in events if event.name == "died"]
    missing = []
    for fault in (fault for fault in faults if fault.kind.startswith("hang")):
        names = {fault.who, "trainer"} if fault.who == "orchestrator" else {fault.who}
        if not any(t_ns >= fault.t_ns and who in names for t_ns, who in died):
            missing.append(f"{fault.kind} {fault.who}: it was ended, and nothing says so")
    return missing


def time_healing(faults: Sequence[Fault], events: Sequence[Event]) -> None:
    """Seconds until all was as before, where it was before the next fault of the same part; a short stop heals unseen."""
    for fault in faults:
        later = [event for event in events if event.t_ns >= fault.t_ns]
        fault.healed_s = next(((event.t_ns - fault.t_ns) / 1e9 for event in _healing(fault, later)), None)


def _healing(fault: Fault, later: Sequence[Event]) -> list[Event]:
    """The events that say so, the first of them first."""
    trained = [event for event in later if event.name == "train_step"]
    if fault.who in ("trainer", "launcher"):
        return trained
    if fault.who == "orchestrator":
        back = next((event.t_ns for event in later if event.name == "recovered"), 1 << 62)
        return [event for event in trained if event.t_ns >= back]
    return [event for event in later if event.process == fault.who and event.name == ("left" if fault.kind in LEAVING else "serving")]


LEAVING = ("leave", "kill agent")


def table(faults: Sequence[Fault]) -> str:
    lines = [f"{'fault':<20} {'count':>5} {'healed':>6} {'median s':>9} {'max s':>7}"]
    for kind in sorted({fault.kind for fault in faults}):
        found = [fault for fault in faults if fault.kind == kind]
        times = [fault.healed_s for fault in found if fault.healed_s is not None]
        spread = f"{statistics.median(times):9.1f} {max(times):7.1f}" if times else f"{'-':>9} {'-':>7}"
        lines.append(f"{kind:<20} {len(found):5d} {len(times):6d} {spread}")
    return "\n".join(lines)


def settings(options: argparse.Namespace, runs: Path, name: str) -> list[str]:
    """What the run is started with, the caller's own words last."""
    steps = round(options.kills * sum(MIX.values()) / MIX["kill"] * BUDGET) + 2 * STEPS_LEFT
    mine = [f"metarl.runs_dir={runs}", f"metarl.name={name}", f"train_iters={steps}", f"metarl.network.join_port={free_port('127.0.0.1')}"]
    return [*mine, *FAST, *(FOUND_IN if options.hangs else ()), *SERVERS[options.servers], *options.set]


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    runs, name = options.runs_dir, f"chaos-{options.servers}-{options.seed}"
    scratch = runs / f"{name}.tmp"
    try:
        sets = settings(options, runs, name)
        config = parse([Path(options.config)], sets).config
        check(config, Machine.here())
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    arguments = ["train.py", str(Path(options.config).resolve()), *(word for setting in sets for word in ("--set", setting))]
    run = ChaosRun(arguments, RunPaths.of(runs / name), scratch)
    rng, flags = random.Random(options.seed), options.join_flags.split()
    chaos = Chaos(run, config, rng, options.kills, options.hang_s, flags, options.hangs)
    wrong: list[str] = []
    begin = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        chaos.torment()
        wrong += run.left(END_S)
    except ViolationError as error:
        wrong.append(str(error))
    finally:
        run.kill_everything()
    wrong += run.left(10.0) + run.left_over({fault.who for fault in chaos.faults if fault.kind == "kill agent"})
    time_healing(chaos.faults, events := read_events(run.paths.events))
    wrong += unnamed(chaos.faults, events)
    print(f"\n{chaos.done} kills, {len(chaos.faults)} faults in {time.monotonic() - begin:.0f} s, seed {options.seed}\n")
    print(f"{table(chaos.faults)}\n")
    try:
        audited = audit_run(run.paths)
        print(f"{report(audited)}\n")
        wrong += audited.audit.violations + ["the run is not done"] * (not audited.finished)
        if audited.audit.undecided and not any(fault.kind == FLIP for fault in chaos.faults):
            wrong.append("records of the journal are lost, and the audit cannot decide")
    except ConfigError as error:
        wrong.append(f"no audit: {error}")
    print("\n".join(f"VIOLATION: {word}" for word in wrong) or "0 violations: nothing lost or doubled, nothing hung, nothing left")
    return 1 if wrong else 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/chaos.py", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("--kills", type=int, required=True, help="kills; joins, leaves, stops, torn journals and hangs come on top")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--servers", choices=tuple(SERVERS), default="scripted")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for deepy.py (repeatable)")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--hang-s", type=float, default=400.0, help="seconds without a step after which the run hangs")
    parser.add_argument("--hangs", action="store_true", help="some stand still until the run ends them")
    parser.add_argument("--join-flags", default="", help="more words for the agents of servers that join, as in '--cores 1'")
    options = parser.parse_args(argv)
    if options.kills < 1:
        parser.error(f"--kills {options.kills}: must be at least 1")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
