"""The live progress panel: reads ``status.json`` twice a second, and draws it in a terminal or prints a plain line now and then."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from neox_rl.telemetry.status import ProcessState, Status, read_processes, read_status

POLL_S = 0.5
PLAIN_EVERY_S = 10.0
TREND = 40
STAGES = (("starting", "start"), ("warmstart", "warm start"), ("rl", "RL"), ("report", "report"))
BARS = "▁▂▃▄▅▆▇█"


class LiveDisplay:
    """``with LiveDisplay(paths.status, paths.processes, title):`` shows the run until the block ends. Draws from its own thread."""

    def __init__(self, status_path: Path, processes_path: Path, title: str, console: Console | None = None) -> None:
        self._path, self._processes_path, self._title = status_path, processes_path, title
        self._console = console or Console()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="display", daemon=True)
        self._view = View(title)
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None

    def __enter__(self) -> LiveDisplay:
        if self._live is not None:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(timeout=5.0)
        self._tick()  # the last status may have come after the last poll
        if self._live is not None:
            self._live.stop()

    def _loop(self) -> None:
        while not self._stop.wait(POLL_S):
            self._tick()

    def _tick(self) -> None:
        now = time.monotonic()
        line = self._view.update(read_status(self._path), now, read_processes(self._processes_path))
        if self._live is not None:
            self._live.update(self._view.panel(now), refresh=True)
        elif line is not None:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class View:
    """What to show, apart from where: keeps the trends and decides when a plain line is due. Times are seconds of one clock."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.status = Status()
        self.processes: Mapping[str, ProcessState] = {}
        self._started: float | None = None
        self._printed: tuple[str, float] = ("", 0.0)
        self._reached = 0
        self._reward: deque[float] = deque(maxlen=TREND)
        self._accuracy: deque[float] = deque(maxlen=TREND)
        self._seen: tuple[str, int] = ("", -1)

    def update(self, status: Status, now: float, processes: Mapping[str, ProcessState] | None = None) -> str | None:
        """Take in a status; returns the plain line where one is due: at a change of phase and every PLAIN_EVERY_S."""
        self._started = now if self._started is None else self._started
        self.status, self.processes = status, processes or {}
        stage = next((i for i, (phase, _) in enumerate(STAGES) if phase == status.phase), None)
        self._reached = len(STAGES) if status.phase == "done" else self._reached if stage is None else stage
        if status.reward is not None and (status.phase, status.step) != self._seen:
            self._reward.append(status.reward)
        if status.heldout_accuracy is not None and (not self._accuracy or self._accuracy[-1] != status.heldout_accuracy):
            self._accuracy.append(status.heldout_accuracy)
        self._seen = (status.phase, status.step)
        phase, printed = self._printed
        if phase == status.phase and now - printed < PLAIN_EVERY_S:
            return None
        self._printed = (status.phase, now)
        return self.line(now)

    def line(self, now: float) -> str:
        s = self.status
        parts = [f"[{clock(now - (self._started or now))}] {s.phase}"]
        if s.total_steps:
            parts.append(f"step {s.step}/{s.total_steps}")
        parts += [f"{name} {value}" for name, value in self._facts() if value]
        if s.message:
            parts.append(s.message)
        return " | ".join(parts)

    def panel(self, now: float) -> Panel:
        s = self.status
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="dim", no_wrap=True)
        facts.add_column(no_wrap=True)
        trends = {"reward": self._reward, "held-out accuracy": self._accuracy}
        for name, value in self._facts():
            if not value and name in ("servers", "processes"):
                continue  # lines that most runs never need
            trend = trends.get(name)
            facts.add_row(name, Text(value or "-") + Text(f"  {sparkline(list(trend))}" if trend and len(trend) > 1 else "", "cyan"))
        body: list[RenderableType] = [self._marks(), Text(""), self._progress(), Text(""), facts]
        if s.message:
            body += [Text(""), Text(s.message, style="red" if s.phase == "failed" else "dim")]
        color = {"failed": "red", "done": "green"}.get(s.phase, "cyan")
        elapsed = clock(now - (self._started or now))
        return Panel(Group(*body), title=Text(self.title), subtitle=f"{elapsed} elapsed", border_style=color, width=78, padding=(1, 2))

    def _marks(self) -> Text:
        text = Text()
        for i, (_, name) in enumerate(STAGES):
            done, here = i < self._reached, i == self._reached
            bad = here and self.status.phase == "failed"
            mark, style = ("✗", "red") if bad else ("✓", "green") if done else ("●", "bold cyan") if here else ("○", "dim")
            text.append(f"{mark} {name}", style).append("    ")
        if self.status.phase == "evaluate":
            text.append("evaluating", "yellow")
        return text

    def _progress(self) -> RenderableType:
        s = self.status
        grid = Table.grid(padding=(0, 2))
        total = max(s.total_steps, 1)
        count = f"step {s.step}/{s.total_steps}" if s.total_steps else ""
        left = f"{clock(s.eta_s)} left" if s.eta_s is not None else ""
        grid.add_row(ProgressBar(total=total, completed=min(s.step, total), width=34, complete_style="cyan"), count, left)
        return grid

    def _facts(self) -> list[tuple[str, str]]:
        s = self.status
        rate = [f"{v:,.0f} {n}" for v, n in ((s.tokens_per_s_generated, "generated"), (s.tokens_per_s_trained, "trained")) if v is not None]
        stale = "" if s.staleness_mean is None else f"{s.staleness_mean:.2f} mean, {s.staleness_max} max, bound {s.bound}"
        queue = [f"{v} {n}" for v, n in ((s.queue_ready, "ready"), (s.queue_inflight, "in flight")) if v is not None]
        return [
            ("loss", "" if s.loss is None else f"{s.loss:.4f}"),
            ("reward", "" if s.reward is None else f"{s.reward:.3f}"),
            ("held-out accuracy", "" if s.heldout_accuracy is None else f"{100 * s.heldout_accuracy:.1f} %"),
            ("tokens/s", ", ".join(rate)),
            ("staleness", stale),
            ("queue", ", ".join(queue)),
            ("version", "" if s.version is None else f"v{s.version}"),
            ("servers", servers_in_words(s.servers)),
            ("processes", processes_in_words(self.processes)),
        ]


def servers_in_words(servers: Mapping[str, str]) -> str:
    """Nothing while all of them serve; else how many do, and the others by name."""
    others = [f"{name} {state}" for name, state in sorted(servers.items()) if state != "serving"]
    return f"{Counter(servers.values())['serving']} of {len(servers)} serving; {', '.join(others)}" if others else ""


def processes_in_words(processes: Mapping[str, ProcessState]) -> str:
    """Who is not as it began: ``server-0 restarting (2 of 3), orchestrator restarted (1 of 3)``."""
    words = []
    for name, process in processes.items():
        state = process.state if process.state != "running" else "restarted" if process.restarts else ""
        if state:
            words.append(f"{name} {state}" + (f" ({process.restarts} of {process.limit})" if state != "lost" else ""))
    return ", ".join(words)


def sparkline(values: list[float]) -> str:
    """The values as bars of eight heights, lowest to highest."""
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((v - low) * scale)] for v in values)


def clock(seconds: float) -> str:
    """``3:07`` or ``1:02:09``."""
    minutes, s = divmod(max(0, round(seconds)), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
