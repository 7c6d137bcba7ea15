"""The staleness rule, as arithmetic. No state, no clock: versions and steps are passed in.

Notation: B groups a step, admission slack eta, delivery slack rho, S = eta + rho. Step s (1-indexed) trains v(s-1) and
makes v(s). Ticket k (0-indexed) is the k-th group admitted and is meant for step floor(k/B) + 1.

Rules 1 (admission), 2 (delivery) and 3 (waiting), why none is older than S and why nothing waits for ever: ARCHITECTURE.md, Staleness.
"""

from __future__ import annotations


def bound(admission_slack: int, delivery_slack: int) -> int:
    """S = eta + rho, in optimizer steps: the most that a trained token may lag behind the version being trained."""
    return admission_slack + delivery_slack


def oldest_version(ticket: int, groups_per_step: int, admission_slack: int) -> int:
    """The version that must be live before a ticket is admitted: none of its tokens is older. At least 0: v0 must be live."""
    return max(0, ticket // groups_per_step - admission_slack)


def admissible(ticket: int, live_version: int, groups_per_step: int, admission_slack: int) -> bool:
    """Rule 1. ``live_version`` is the newest version that every server serves, -1 before v0 is live anywhere."""
    return live_version >= oldest_version(ticket, groups_per_step, admission_slack)


def num_due(step: int, groups_per_step: int, delivery_slack: int) -> int:
    """Rule 3: in strict mode every ticket below this number must have been trained once ``step`` is taken."""
    return max(0, groups_per_step * (step - delivery_slack))
