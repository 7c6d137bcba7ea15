"""Did a run keep its rules? Checks what it wrote down, journal, events, metrics and checkpoints against one another.

    python tools/audit.py runs/metarl

Prints a line a check, and each violation with the tickets, steps, versions and servers that it concerns. Exit status 1: a violation. 2: the
directory cannot be read as a run. 3: no violation is certain, but something is wrong that lost records of the journal may explain, or not.
What could not be checked for another reason is said, and is no violation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from neox_rl.errors import ConfigError, WeightError
from neox_rl.run.audit_files import Audited, audit_run
from neox_rl.run.audit_results import names, table
from neox_rl.telemetry.paths import RunPaths

MAX_SHOWN = 20


def report(found: Audited) -> str:
    """For a person: the checks, then what is wrong, then what is not known."""
    audit = found.audit
    lines = [f"{'check':<12} {'checked':>9}  result", *table(audit.results), ""]
    again = f"; {audit.num_undone} steps were undone and {audit.num_repeated} done again with the same groups" if audit.num_undone else ""
    lines.append(f"{audit.sft_step} warm start and {audit.last} RL steps, {len(audit.sessions) - 1} trainers{again}")
    lines.append(f"{found.compared} versions were compared with a server's own digest, each in each life of each server")
    if not found.finished:
        lines.append(f"the run is not done: {len(found.open)} tickets are open" + (f": {names(found.open)}" if found.open else ""))
    if audit.undecided:
        lines.append(f"UNDECIDED: {audit.undecided} findings may be violations, or due to the records that were lost")
    for title, words in (
        ("journal", found.damage),
        ("VIOLATION", audit.violations),
        ("not checked", [f"{check}: {gap}" for check, result in audit.results.items() for gap in result.gaps]),
    ):
        lines += [f"{title}: {word}" for word in words[:MAX_SHOWN]]
        lines += [f"{title}: and {len(words) - MAX_SHOWN} more"] * (len(words) > MAX_SHOWN)
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/audit.py", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("run", type=Path, help="run directory")
    try:
        found = audit_run(RunPaths.of(parser.parse_args(argv).run))
    except (ConfigError, WeightError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    print(report(found))
    if found.audit.violations:
        return 1
    return 3 if found.audit.undecided else 0


if __name__ == "__main__":
    raise SystemExit(main())
