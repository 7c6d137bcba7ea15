"""The table before / after RL that ends a run in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from neox_rl.telemetry.paths import RunPaths
from neox_rl.telemetry.rows import SEARCH_METRICS
from neox_rl.telemetry.rundata import MODES


def print_table(paths: RunPaths, summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the table and where the report is."""
    console = console or Console()
    table = before_after(summary)
    console.print(table if table.row_count else "No held-out evaluation was made.")
    console.print(f"report   {paths.report}\nsummary  {paths.summary}", markup=False, highlight=False, soft_wrap=True)


def before_after(summary: Mapping[str, Any]) -> Table:
    """Accuracy with 95 % intervals and search quality, before RL and after it. ``summary`` as of ``build_summary``."""
    title = "Held-out problems, 95 % intervals"
    if summary.get("heldout_solved_in"):
        title += f"; solved: right in {summary['heldout_solved_in']}"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("")
    for name in ("warm start" if summary.get("warmstart_steps") else "before RL", "after RL", "difference"):
        table.add_column(name, justify="right")
    for mode in MODES:
        before, after = (summary.get(f"heldout_accuracy_{name}_{mode}") for name in ("warmstart", "final"))
        if before or after:
            gain = summary.get(f"heldout_accuracy_gain_{mode}")
            table.add_row(f"accuracy, {mode}", percent(before), percent(after), percent(gain, sign="+", unit=""), style="bold")
    for title, before_text, after_text, change in (*tag_rows(summary), *search_rows(summary)):
        table.add_row(title, before_text, after_text, change)
    return table


def tag_rows(summary: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(title, before, after, difference in tokens) of every prompt tag and mode; none where prompts have no tags."""
    rows: list[tuple[str, str, str, str]] = []
    for mode in MODES:
        before, after = ((summary.get(f"heldout_by_tag_{name}_{mode}") or {}) for name in ("warmstart", "final"))
        for tag in {**before, **after}:
            old, new = before.get(tag), after.get(tag)
            change = f"{new['tokens']['mean'] - old['tokens']['mean']:+.1f} tokens" if old and new else ""
            rows.append((f"“{tag}”, {mode}", _of_tag(old), _of_tag(new), change))
    return rows


def _of_tag(found: Mapping[str, Any] | None) -> str:
    if not found:
        return "-"
    mean, low, high = (f"{found['tokens'][key]:.1f}" for key in ("mean", "ci95_low", "ci95_high"))
    return f"{percent(found['accuracy'])} in {mean} [{low}, {high}] tokens"


def search_rows(summary: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(title, before, after, difference) of every number of search quality that either evaluation holds; greedy where there is one."""
    mode = search_mode(summary)
    before, after = ((summary.get(f"search_{name}_{mode}") or {}) for name in ("warmstart", "final"))
    rows: list[tuple[str, str, str, str]] = []
    for key, metric in SEARCH_METRICS.items():
        old, new = before.get(key), after.get(key)
        if old is None and new is None:
            continue
        scale, unit, digits = (100.0, " %", 1) if metric.unit == "%" else (1.0, "", 1 if metric.unit else 2)
        texts = ["-" if value is None else f"{scale * value:.{digits}f}{unit}" for value in (old, new)]
        change = ""
        if old is not None and new is not None and metric.better is not None:
            change = f"{scale * (new - old):+.{digits}f}" + (" points" if unit else "")
        rows.append((metric.title, texts[0], texts[1], change))
    return rows


def search_mode(summary: Mapping[str, Any]) -> str:
    """Which attempts the search quality is shown for."""
    return "greedy" if summary.get("search_warmstart_greedy") or summary.get("search_final_greedy") else "sampled"


def percent(interval: Mapping[str, Any] | None, sign: str = "", unit: str = "%") -> str:
    """``51.3 % [46.0, 56.5]`` of an interval row."""
    if not interval:
        return "-"
    mean, low, high = (f"{100 * interval[key]:{sign}.1f}" for key in ("mean", "ci95_low", "ci95_high"))
    return " ".join(filter(None, (mean, unit, f"[{low}, {high}]")))
