"""Checks a run by what it wrote down: journal records, events, metrics and checkpoints go in, violations come out. Pure.

    bound         no trained token is older than S, and those that are were masked, token by token
    admission     no token is older than its ticket's admission allows, or made by a version that was not there yet
    once          in the timeline that survives no ticket is trained twice, and none is lost
    problems      every position of the problem cursor was trained by one ticket, refused, or is open: no problem is passed over, none comes
                  twice in an epoch; what damage of the journal lost is told by name
    steps         steps follow one another; those that a rollback undid were done again
    policy        the policies that made the trained tokens are of this timeline, by the digest of their weights
    digests       servers hold and serve what the trainer published, by digest
    versions      versions of a server never fall while it lives
    checkpoints   a checkpoint and the journal agree on what was trained
    metrics       each step has one row, and its token counts are those of the journal
    summary       counts of the summary are those of journal and metrics

``Audit`` takes records in their order, a whole journal or one at a time. What cannot be judged for want of a record is a gap, never right.
Beside a run that goes on it keeps what a rollback may still undo, and no findings: its memory does not grow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from neox_rl.config.run import RunConfig
from neox_rl.queue.consumption import Trained
from neox_rl.queue.history import KEPT_VERSIONS
from neox_rl.queue.records import Record
from neox_rl.queue.staleness import bound, oldest_version
from neox_rl.queue.state import name
from neox_rl.run.audit_problems import Spent, named
from neox_rl.run.audit_results import MAX_NAMED, Result, names
from neox_rl.types import NO_VERSION, Json

CHECKS = ("bound", "admission", "once", "problems", "steps", "policy", "digests", "versions", "checkpoints", "metrics", "summary")


@dataclass(frozen=True, slots=True)
class Rule:
    """What the journal's ``opened`` record says that the run must keep to."""

    groups_per_step: int
    admission_slack: int
    delivery_slack: int
    mode: str
    stale_tokens: str
    num_steps: int

    @classmethod
    def of(cls, config: RunConfig) -> Rule:
        s, metarl = config.metarl.staleness, config.metarl
        return cls(metarl.rollout.groups_per_step, s.admission_slack, s.delivery_slack, s.mode, s.stale_tokens, config.neox.train_iters)

    @property
    def bound(self) -> int:
        return bound(self.admission_slack, self.delivery_slack)

    def json(self) -> dict[str, Json]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Step:
    """An RL step that took its batch: ``ages`` are sampled tokens by staleness."""

    tickets: tuple[int, ...]
    ages: Mapping[int, int]
    rule: Rule


@dataclass(slots=True)
class Session:
    """A trainer from its hello on. ``since_ns`` is None where the record does not say; ``published``: version -> digest."""

    since_ns: int | None
    rl_step: int
    published: dict[int, str]


class Audit:
    """``rule`` holds until the journal says another. ``damaged``: what is missing is a gap. ``on_violation(check, what)`` hears at once.

    ``living``: the run goes on. Violations are told and not kept, gaps are not kept, and what a state in the journal closes is forgotten.
    """

    def __init__(
        self, rule: Rule, damaged: bool = False, on_violation: Callable[[str, str], None] = lambda *_: None, living: bool = False
    ) -> None:
        self.rule, self.damaged, self._on_violation, self._living = rule, damaged, on_violation, living
        self.results = {check: Result() for check in CHECKS}
        self.steps: dict[int, Step] = {}
        self.last = self.sft_step = self.num_undone = self.num_repeated = 0
        self.undecided = 0
        """Findings that would be violations, were no records lost: no one can say."""
        self.sessions = [Session(None, 0, {})]
        self.trained, self.spent = Trained(), Spent()
        self._undone: dict[int, tuple[int, ...]] = {}
        self._served: dict[str, int] = {}
        self._queue: dict[str, Any] = {}
        self._unknown = self._forgotten = self._unheard = 0  # of versions below the last no record says who published them

    @property
    def violations(self) -> list[str]:
        return [f"{check}: {what}" for check, result in self.results.items() for what in result.violations]

    # the journal

    def apply(self, record: Record) -> None:
        """Takes one record. Kinds that say nothing about a rule are passed over."""
        match record.kind:
            case "opened" if isinstance(rule := record.meta.get("rule"), dict):
                self.rule = Rule(**rule)
            case "session":
                self._begin(record.meta)
            case "issued":
                self._problems(self.spent.issue(int(record.meta["position"])), 0)
            case "refused":
                self._problems(self.spent.refuse(int(record.meta["position"]), self.last), 1)
            case "lost":
                self._lose(record.meta)
            case "taken":
                self._take(record.meta)
            case "published":
                self._publish(int(record.meta["version"]), str(record.meta["digest"]))
            case "live":
                self._live(int(record.meta["version"]), record.meta.get("digest"))
            case "state" if not record.meta.get("copy"):
                self._catch_up(record.meta)
                if self._living:
                    self._forget()

    def _begin(self, meta: Mapping[str, Any]) -> None:
        """A trainer begins at its checkpoint: later steps are undone."""
        rl_step, time_s, queue = int(meta["rl_step"]), meta.get("time"), (meta.get("state") or {}).get("queue")
        if rl_step > max(self.last, self.rule.num_steps):
            self._missing("steps", f"a trainer begins after step {rl_step} of {self.rule.num_steps}")
        if rl_step > self.last:  # its checkpoint proves that records are lost; what follows is known if it says all and no others are there
            self.damaged, self.undecided = self.damaged or queue is None or len(self.sessions) > 1, self.undecided + 1
            self._pass_over(rl_step, queue, unheard=rl_step)
            self.spent.adopt(meta.get("state"))
        for step in [step for step in self.steps if step > rl_step]:
            self._undone[step] = self.steps.pop(step).tickets
            self.num_undone += 1
            self.trained.undo(self._undone[step])
        self.spent.undo(rl_step, bool(meta.get("anew")))
        if rl_step < max(self._forgotten, self._unknown) and (queue or not rl_step):  # by its checkpoint, which others are compared with
            self.trained.reset(queue["fresh"] if queue else 0, queue["open"] if queue else ())
            self.spent.adopt(meta.get("state"), instead=True)
            self._forgotten, self._unknown, self._unheard = (min(at, rl_step) for at in (self._forgotten, self._unknown, self._unheard))
        self.sft_step, self.last = int(meta["sft_step"]), rl_step
        known = {version: digest for version, digest in self.sessions[-1].published.items() if version <= rl_step}
        self.sessions.append(Session(round(time_s * 1e9) if isinstance(time_s, int | float) else None, rl_step, known))

    def _take(self, meta: Mapping[str, Any]) -> None:
        step = int(meta["step"])
        if meta["phase"] != "rl":
            self.sft_step = step
            return
        if step != self.last + 1:
            self._missing("steps", f"step {step} took its batch after step {self.last}")
        self.results["steps"].checked += 1
        tickets, versions = tuple(meta["tickets"]), [{int(v): n for v, n in row.items()} for row in meta["versions"]]
        ages: dict[int, int] = {}
        for ticket, row in zip(tickets, versions, strict=True):
            self._train(ticket, step)
            for version, tokens in row.items():
                self._judge(ticket, step, version, tokens)
                ages[step - 1 - version] = ages.get(step - 1 - version, 0) + tokens
        if len(tickets) != self.rule.groups_per_step:
            self._violated("once", f"step {step} took {len(tickets)} tickets, a step takes {self.rule.groups_per_step}")
        self.num_repeated += self._undone.pop(step, ()) == tickets
        self.steps[step], self.last = Step(tickets, ages, self.rule), step
        self._judge_policies(step, meta.get("made"))
        self._problems(self.spent.train(step, tickets, meta["positions"]), len(tickets))
        self._compare(meta.get("state", {}).get("queue"), step)
        self._problems(self.spent.compare(meta.get("state")))

    def _train(self, ticket: int, step: int) -> None:
        self.results["once"].checked += 1
        if ticket in self.trained:
            by = self.trained.step_of(ticket) or f"{max(self._forgotten, self._unknown)} or one before it"
            self._missing("once", f"{name(ticket)} was trained by step {by} and again by step {step}")
        if not 0 <= ticket < self.rule.groups_per_step * self.rule.num_steps:
            self._violated("once", f"{name(ticket)} was trained by step {step}: no ticket of this run has that number")
        self.trained.add(ticket, step)

    def _problems(self, wrong: Iterable[str], checked: int = 0) -> None:
        self.results["problems"].checked += checked
        for what in wrong:
            self._missing("problems", what)

    def _lose(self, meta: Mapping[str, Any]) -> None:
        """An orchestrator that took over names the problems that the records it found say no end of."""
        if not (lost := self.spent.lose(meta["positions"], self.last)):
            return
        what = f"{named(lost)}: no record says what became of it"
        if meta["holes"] or self.damaged:
            self.gap("problems", f"{what} (records were lost)")
        else:
            self._violated("problems", what)

    def _judge(self, ticket: int, step: int, version: int, tokens: int) -> None:
        rule, age = self.rule, step - 1 - version
        self.results["admission"].checked += tokens
        floor = oldest_version(ticket, rule.groups_per_step, rule.admission_slack)
        if not floor <= version <= step - 1:
            self._violated("admission", f"{name(ticket)}, step {step}: {tokens} tokens of v{version}, not of v{floor} to v{step - 1}")
        if rule.mode == "strict":
            self.results["bound"].checked += tokens
            if age > rule.bound:
                self._violated("bound", f"{name(ticket)}, step {step}: {tokens} tokens of v{version} are {age} steps old, S = {rule.bound}")

    def _judge_policies(self, step: int, made: object) -> None:
        if not isinstance(made, dict):
            self.gap("policy", f"step {step}: its record does not say by which weights its tokens were made")
            return
        published = self.sessions[-1].published
        for version, digests in made.items():
            if not digests:
                self.gap("policy", f"step {step}: tokens of v{version} were made before its publication was heard of")
                continue
            self.results["policy"].checked += 1
            if published.get(int(version)) is None and int(version) <= max(self._forgotten - KEPT_VERSIONS, self._unheard - 1):
                self.gap("policy", f"step {step}: v{version} is too old for its digest to be known still")
            elif published.get(int(version)) is None:
                self._missing("policy", f"step {step} trained tokens of v{version}, which nobody published")
            elif set(digests) != {published[int(version)]}:
                self._missing("policy", f"step {step}: tokens of v{version} by weights {digests}, published was {published[int(version)]}")

    def _compare(self, queue: object, step: int) -> None:
        """The queue's own books: every ticket up to the newest is either open or trained."""
        if not isinstance(queue, dict) or step != self.last:
            return
        self._queue = queue
        if both := [ticket for ticket in queue["open"] if ticket in self.trained]:
            self._missing("once", f"open after step {step}, and trained already: {names(both)}")
        if len(self.trained) + len(queue["open"]) != queue["fresh"]:
            lost = self.trained.missing(queue["fresh"], queue["open"])
            self._missing("once", f"lost after step {step}, neither open nor trained: {names(lost)}")

    def _catch_up(self, meta: Mapping[str, Any]) -> None:
        """What a segment begins with. Where the records before it are gone, this is all that is known of their steps."""
        queue, step, published = meta["state"].get("queue"), int(meta["steps"]["rl"]), self.sessions[-1].published
        digests = {int(version): str(digest) for version, digest in meta["digests"]}
        if step > self.last and isinstance(queue, dict):
            self._pass_over(step, queue, unheard=min(digests, default=step))
            published.update(digests)
            self.last, self.sft_step, self.spent.known = step, int(meta["steps"]["sft"]), False
        elif self._living and step == self.last and not published:  # before the first step of RL: v0 alone
            published.update(digests)
        self._compare(queue, step)
        self._problems(self.spent.compare({"cursor": {"position": meta["cursor"]}, "problems": dict(meta["positions"])}))

    def _pass_over(self, step: int, queue: Mapping[str, Any] | None, unheard: int) -> None:
        """The steps after the last that is known, up to this one: the queue after it says which tickets they trained."""
        for check in ("bound", "once", "problems", "policy"):
            self.gap(check, f"steps {self.last + 1} to {step}: what they took is in no record that is there")
        self._unknown, self._unheard = step, unheard
        if queue and not len(self.trained):  # as of a takeover, whose time must not grow with the run
            self.trained.reset(queue["fresh"], queue["open"])
        for ticket in self.trained.missing(queue["fresh"], queue["open"]) if queue else ():
            self.trained.add(ticket, step)

    def _forget(self) -> None:
        """No trainer that the journal can serve goes back behind this."""
        self._forgotten = self.last
        self.steps.clear()
        self.trained.forget(self.last)
        self.spent.forget()
        self.sessions = [session := self.sessions[-1]]
        session.published = {version: digest for version, digest in session.published.items() if version > self.last - KEPT_VERSIONS}

    def _publish(self, version: int, digest: str) -> None:
        published = self.sessions[-1].published
        if version > self.last:
            self._missing("digests", f"v{version} was published after {self.last} steps")
        if version > self.sessions[-1].rl_step and published.get(version, digest) != digest:
            self._missing("digests", f"v{version} was published twice by one trainer: {published[version]}, then {digest}")
        published[version] = digest

    def _live(self, version: int, digest: object) -> None:
        self.results["digests"].checked += 1
        if digest not in (None, said := self.sessions[-1].published.get(version, "nothing")):
            self._missing("digests", f"live is v{version} with digest {digest}, published was {said}")

    # the servers

    def served(self, process: str, incarnation: str, version: int, digest: str, t_ns: int | None = None) -> None:
        """A server that was started as ``incarnation`` attests a version; ``t_ns``: when, where the whole journal was taken before."""
        if version == NO_VERSION or not incarnation:
            return
        self.results["versions"].checked += 1
        if version < self._served.get(incarnation, NO_VERSION):
            self._violated("versions", f"{process} ({incarnation}) went back from v{self._served[incarnation]} to v{version}")
        self._served[incarnation] = version
        self._attest(f"{process} ({incarnation}) serves", version, digest, t_ns)

    def acked(self, who: str, version: int, digest: str, t_ns: int | None = None) -> None:
        """A worker of a server told the trainer what it holds: by its own digest, where ``served`` has that of the trainer's offer."""
        self._attest(f"{who} holds", version, digest, t_ns)

    def _attest(self, who: str, version: int, digest: str, t_ns: int | None) -> None:
        at = len(self.sessions) - 1
        while t_ns is not None and at > 0 and (since := self.sessions[at].since_ns) is not None and since > t_ns:
            at -= 1
        published = self.sessions[at].published
        if version not in published:
            # What was published in the last moments before the death of all was not on the disk yet: nobody trained with it either.
            self.gap("digests", f"v{version} was served, and its publication is in no record")
            return
        self.results["digests"].checked += 1
        if digest != published[version]:
            self._missing("digests", f"{who} v{version} with digest {digest}, published was {published[version]}")

    # what the trainer says

    def reported(self, step: int, row: Mapping[str, Any]) -> None:
        """The metrics of an RL step that took its batch: what got gradient, and what was masked."""
        taken, hist = self.steps.get(step), row.get("staleness_hist")
        if taken is None:
            if step > max(self._unknown, self._forgotten):
                self._missing("metrics", f"step {step} has metrics, but took no batch")
            return
        if not isinstance(hist, dict):
            for check in ("metrics", "bound"):
                self.gap(check, f"step {step}: its row does not say how old its tokens were (staleness_hist)")
            return
        self.results["metrics"].checked += 1
        rule, total = taken.rule, sum(taken.ages.values())
        found = {int(age): tokens for age, tokens in hist.items()}
        if found != taken.ages:
            self._violated("metrics", f"step {step}: the trainer saw tokens of ages {found}, the journal handed out {dict(taken.ages)}")
        if rule.stale_tokens != "mask":
            self.gap("bound", "staleness.stale_tokens is truncate: tokens beyond S are trained, with a truncated ratio")
            return
        old = sum(tokens for age, tokens in taken.ages.items() if age > rule.bound)
        self.results["bound"].checked += total
        if (masked := row.get("tokens_masked_stale")) != old or row.get("tokens_trained") != total - old:
            trained = row.get("tokens_trained")
            self._violated("bound", f"step {step}: {old} of {total} tokens are beyond S = {rule.bound}; {masked} masked, {trained} trained")
        if row.get("staleness_max", 0) > rule.bound:
            self._violated("bound", f"step {step}: a token {row['staleness_max']} steps old was trained, S = {rule.bound}")

    def saved(self, label: str, rl_step: int, queue: object) -> None:
        """A checkpoint after ``rl_step``, with the state of the queue in it."""
        if rl_step < self._unknown:
            self.gap("checkpoints", f"{label}: what the steps before it took is in no record that is there")
            return
        self.results["checkpoints"].checked += 1
        trained = self.trained.until(rl_step)
        if not isinstance(queue, dict):
            if rl_step:
                self._violated("checkpoints", f"{label} says nothing of the queue")
            return
        closed = set(range(queue["fresh"])).difference(queue["open"])
        if rl_step > self.last or closed != trained:
            odd = names(closed ^ trained) if rl_step <= self.last else f"step {rl_step} took no batch"
            self._missing("checkpoints", f"{label} and the journal disagree on what was trained: {odd}")

    # the end

    def close(self, finished: bool) -> None:
        """Once everything was taken: is anything missing?"""
        if gone := [str(step) for step in range(self._unknown + 1, self.last + 1) if step not in self.steps]:
            self._missing("steps", f"no record says what these steps took: {', '.join(gone[:MAX_NAMED])}")
        if not finished:
            return
        if self.last != self.rule.num_steps:
            self._missing("steps", f"the run is done, but {self.last} of {self.rule.num_steps} steps took a batch")
        if lost := self.trained.missing(self.rule.groups_per_step * self.rule.num_steps):
            self._missing("once", f"never trained: {names(lost)}")

    def open_tickets(self) -> list[int]:
        """Issued and not trained, by the queue's own last word."""
        return sorted(self._queue.get("open", ()))

    def expect(self, check: str, what: str, found: object, expected: object, of_journal: bool = False) -> None:
        """One figure against another. ``of_journal``: its records say what is expected."""
        self.results[check].checked += 1
        if found != expected:
            (self._missing if of_journal else self._violated)(check, f"{what} is {found}, journal and metrics say {expected}")

    def _missing(self, check: str, what: str) -> None:
        """Wrong, unless a record that was lost would say why: a step, a publication, a trainer that began anew."""
        if self.damaged:
            self.undecided += 1
            self.gap(check, f"{what} (records are lost)")
        else:
            self._violated(check, what)

    def gap(self, check: str, what: str) -> None:
        """What could not be checked, and why."""
        if not self._living and what not in self.results[check].gaps:
            self.results[check].gaps.append(what)

    def _violated(self, check: str, what: str) -> None:
        if not self._living:
            self.results[check].violations.append(what)
        self._on_violation(check, what)
