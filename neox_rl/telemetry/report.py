"""``report.html``: one self-contained page about a run, finished or not. ``python -m neox_rl.telemetry.report runs/<name>`` makes it again.

Everything a model wrote is hostile text: the template escapes all of it, and the page's policy forbids scripts and requests.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from neox_rl.telemetry.charts import charts
from neox_rl.telemetry.display import clock
from neox_rl.telemetry.events import SPANS
from neox_rl.telemetry.faults import faults
from neox_rl.telemetry.layout import choose_pairs, lay_out, most_mixed
from neox_rl.telemetry.rows import SEARCH_METRICS
from neox_rl.telemetry.rundata import MODES, RunData, load_run
from neox_rl.telemetry.shares import IDLE, PRECEDENCE, time_shares
from neox_rl.telemetry.summary import build_summary
from neox_rl.telemetry.table import search_mode, search_rows, tag_rows

MIN_SHARE = 0.002


@dataclass(frozen=True)
class Fact:
    """One number of the page's head. ``tone`` is "good", "bad" or ""."""

    label: str
    value: str
    note: str = ""
    tone: str = ""


def write_report(run_dir: str | Path) -> Path:
    """Write the report of a run directory and return its path. Raises FileNotFoundError when there is no such directory."""
    run = load_run(run_dir)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html.j2").render(page_data(run))
    run.paths.report.write_text(page, encoding="utf-8")
    return run.paths.report


def page_data(run: RunData) -> dict[str, Any]:
    """What the template shows, as plain values."""
    summary = build_summary(run)
    return {
        "name": run.paths.name,
        "state": _state(run),
        "lead": _lead(run, summary),
        "accuracy": _accuracy(run, summary),
        "solved_in": run.solved_in,
        "first": run.first,
        "facts": _facts(run, summary),
        "charts": charts(run),
        "shares": _shares(run),
        "span_meaning": SPANS | {IDLE: "nothing that is recorded"},
        "faults": [asdict(fault) | {"at": clock(fault.at_s)} for fault in faults(run.events)],
        "tags": tag_rows(summary),
        "search": _search(summary),
        "search_mode": search_mode(summary),
        "pairs": choose_pairs(run.rollouts),
        "mixed": most_mixed(run.rollouts),
        "lay_out": lay_out,
        "versions": _versions,
        "config": run.config,
        "machine": summary["machine"],
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _state(run: RunData) -> str:
    """What to warn of before any number; empty for a run that ended as it should."""
    if run.status.phase in ("report", "done"):
        return ""
    at = f"after {len(run.sft)} warm-start steps and {len(run.rl)} RL steps"
    if run.status.phase == "failed":
        return f"This run failed {at}. {run.status.message or 'It left no message; see its logs.'}"
    return f"This run is not finished: it is in the phase “{run.status.phase}”, {at}. Everything below is of that moment."


def _lead(run: RunData, summary: Mapping[str, Any]) -> str:
    parts = []
    if run.sft:
        parts.append(f"The model imitated demonstrations for {run.sft[-1]['step']:,} steps.")
    if run.rl and not run.trained:
        parts.append(f"The rollouts of {run.rl[-1]['step']:,} steps were made, and no weights were changed.")
    elif run.rl:
        made = "searches under its own steps" if any(row.get("searched") for row in run.rl) else "its own attempts"
        who = "It then" if run.sft else "The model"
        parts.append(f"{who} practiced on {made} for {run.rl[-1]['step']:,} steps of asynchronous RL.")
    before, after = summary["heldout_accuracy_warmstart"], summary["heldout_accuracy_final"]
    if before and after:
        where = f" in {run.solved_in}" if run.solved_in else ""
        parts.append(f"Of held-out problems it solved {_pct(before)}{where} before RL, and solves {_pct(after)} now.")
    return " ".join(parts) or "No optimizer step was recorded."


def _pct(interval: Mapping[str, Any]) -> str:
    return f"{100 * interval['mean']:.1f}\u00a0%"


def _accuracy(run: RunData, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the figure in the head: one a mode and end of the run, with positions in percent."""
    rows = []
    for mode in MODES:
        for label, title in (("warmstart", run.first), ("final", "after RL")):
            found = summary[f"heldout_accuracy_{label}_{mode}"]
            if found:
                low, mean, high = (100 * found[key] for key in ("ci95_low", "mean", "ci95_high"))
                rows.append({"mode": mode, "title": title, "label": label, "low": low, "mean": mean, "high": high, "n": found["n"]})
    return rows


def _facts(run: RunData, summary: Mapping[str, Any]) -> list[Fact]:
    facts = []
    for mode in MODES:
        gain = summary[f"heldout_accuracy_gain_{mode}"]
        if gain:
            tone = "good" if gain["ci95_low"] > 0 else "bad" if gain["ci95_high"] < 0 else ""
            interval = f"95 % interval {100 * gain['ci95_low']:+.1f} to {100 * gain['ci95_high']:+.1f}, on the same {gain['n']} problems"
            facts.append(Fact(f"Gain by RL, {mode}", f"{100 * gain['mean']:+.1f} points", interval, tone))
    seen, bound = summary["max_staleness_seen"], summary["max_staleness_bound"]
    if seen is not None:
        kept = bound is not None and seen <= bound
        facts.append(Fact("Largest staleness trained", f"{seen} of {bound}", "optimizer steps, seen and allowed", _tone(kept)))
    dropped, twice = summary["rollouts_dropped"], summary["rollouts_trained_twice"]
    if dropped is not None:
        facts.append(Fact("Rollouts dropped", f"{dropped:,}", f"{twice} trained twice", _tone(not dropped and not twice)))
    if summary["wall_s"] is not None:
        facts.append(Fact("Wall time", _duration(summary["wall_s"]), "start, warm start, RL and evaluations"))
    if summary["trainer_idle_frac"] is not None:
        facts.append(Fact("Trainer waiting", f"{100 * summary['trainer_idle_frac']:.1f} %", "of the RL time, for rollouts"))
    if summary["prefix_cache_hit_rate"] is not None:
        facts.append(Fact("Prefix cache", f"{100 * summary['prefix_cache_hit_rate']:.1f} %", "of the prompt tokens found by the servers"))
    if summary["weight_pause_s_median"] is not None:
        updates = f"median pause of a server, {summary['weight_updates']} updates"
        facts.append(Fact("Weight update", f"{1e3 * summary['weight_pause_s_median']:.0f} ms", updates))
    if summary["tokens_generated"] is not None:
        facts.append(Fact("Tokens generated", _short(summary["tokens_generated"]), _token_note(summary) if run.trained else "none trained"))
    return facts


def _tone(good: bool) -> str:
    return "good" if good else "bad"


def _token_note(summary: Mapping[str, Any]) -> str:
    trained, masked = summary["tokens_trained"], summary["tokens_masked_stale"]
    share = f", {100 * masked / (trained + masked):.1f} % too old and masked" if masked is not None and trained else ""
    given = ", given solutions among them" if (trained or 0) > summary["tokens_generated"] else ""
    return f"{_short(trained or 0)} trained by RL{given}{share}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _short(count: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"


def _shares(run: RunData) -> list[dict[str, Any]]:
    """One bar a process: parts (span, seconds, percent, index of its color) in the order of PRECEDENCE, idle last."""
    rows = []
    for process, found in time_shares(run.events).items():
        whole = sum(found.values())
        parts = [
            {"name": name, "seconds": found[name], "percent": 100 * found[name] / whole, "color": i}
            for i, name in enumerate((*PRECEDENCE, IDLE))
            if found.get(name, 0.0) > MIN_SHARE * whole
        ]
        rows.append({"process": process, "parts": parts})
    return rows


def _search(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    by_title = {metric.title: metric for metric in SEARCH_METRICS.values()}
    rows = []
    for title, before, after, change in search_rows(summary):
        metric = by_title[title]
        risen = change.startswith("+")
        changed = change.strip("+-.0 points") != "" and metric.better in ("lower", "higher")
        tone = _tone(risen == (metric.better == "higher")) if changed else ""
        rows.append({"title": title, "meaning": metric.meaning, "before": before, "after": after, "change": change, "tone": tone})
    return rows


def _versions(spans: Sequence[Mapping[str, Any]]) -> str:
    """``written by v0``, or ``tokens 1-41 by v37, 42-63 by v38``."""
    if len(spans) == 1:
        return f"written by v{spans[0]['version']}"
    parts = [f"{span['start'] + 1}-{span['end']} by v{span['version']}" for span in spans if span["version"] >= 0]
    return "tokens " + ", ".join(parts) if parts else ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make report.html of a run again.")
    parser.add_argument("run_dir", type=Path)
    try:
        print(write_report(parser.parse_args(argv).run_dir))
    except FileNotFoundError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
