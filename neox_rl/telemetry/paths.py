"""Where everything of a run lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RunPaths:
    """The files of one run directory, ``<runs_dir>/<name>``. Only ``create`` touches the disk."""

    root: Path

    @classmethod
    def of(cls, run_dir: str | Path) -> RunPaths:
        return cls(Path(run_dir))

    def create(self) -> RunPaths:
        """Make the directories. An existing run keeps its files."""
        for directory in (self.root, self.logs, self.events, self.beats, self.restart, self.checkpoints):
            directory.mkdir(parents=True, exist_ok=True)
        return self

    @property
    def name(self) -> str:
        return self.root.resolve().name

    @property
    def config(self) -> Path:
        """The resolved configuration, YAML."""
        return self.root / "config.yml"

    @property
    def endpoints(self) -> Path:
        """Addresses chosen for this run."""
        return self.root / "endpoints.json"

    @property
    def status(self) -> Path:
        """Where the run stands now (``status.Status``)."""
        return self.root / "status.json"

    @property
    def metrics(self) -> Path:
        """One ``rows.MetricsRow`` an optimizer step."""
        return self.root / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        """One ``rows.EvaluationRow`` an evaluation and sampling mode."""
        return self.root / "evaluations.jsonl"

    @property
    def rollouts(self) -> Path:
        """A readable selection of ``rows.RolloutRow``."""
        return self.root / "rollouts.jsonl"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def timeline(self) -> Path:
        """Chrome trace of the events, made by ``tools/timeline.py``."""
        return self.root / "timeline.json"

    @property
    def keys(self) -> Path:
        """Directory of the sockets' keys (``neox_rl.keys``), where the run has any."""
        return self.root / "keys"

    @property
    def lock(self) -> Path:
        """Held by the launcher of the run."""
        return self.root / "lock"

    @property
    def stop(self) -> Path:
        """Asks training ranks without an orchestrator to stop."""
        return self.root / "stop"

    @property
    def attempt(self) -> Path:
        """How often ranks were started in this run, all launches together."""
        return self.root / "attempt"

    @property
    def processes(self) -> Path:
        """What the launcher knows of each process (``status.ProcessState``)."""
        return self.root / "processes.json"

    @property
    def beats(self) -> Path:
        """Signs of life, one file a process (``heartbeat``)."""
        return self.root / "beats"

    @property
    def restart(self) -> Path:
        """Requests to the launcher: a file with a server's name, and the reason in it, has that server ended and started again."""
        return self.root / "restart"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def events(self) -> Path:
        return self.root / "events"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def unreadable(self) -> Path:
        """Ids of the problems whose answers the verifier cannot read."""
        return self.root / "unreadable.json"

    @property
    def journal(self) -> Path:
        """Directory of the queue's journal (``queue/journal.py``)."""
        return self.root / "journal"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    def log(self, process: str) -> Path:
        """Standard output and error of one process."""
        return self.logs / f"{process}.log"

    def event_log(self, process: str) -> Path:
        return self.events / f"{process}.jsonl"
