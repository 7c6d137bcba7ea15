"""The staleness rule, as arithmetic. No state, no clock: versions and steps are passed in.

Notation: B groups a step, admission slack eta, delivery slack rho, S = eta + rho. Step s (1-indexed) trains v(s-1) and
makes v(s). Ticket k (0-indexed) is the k-th group admitted and is meant for step floor(k/B) + 1.

1. Admission. Ticket k is admitted once the live version, as the engine attests it, is >= floor(k/B) - eta.
2. Delivery. Each step takes the B smallest-numbered ready tickets: earliest deadline first.
3. Waiting, strict mode. Step s also waits for every ticket k with floor(k/B) <= (s-1) - rho. Token mode never waits beyond B
   ready groups; a token gets gradient at step s only if (s-1) - version <= S.

Bound in strict mode. By induction step s takes every ticket below B(s-rho) that earlier steps left: at most B of the B(s-rho)
tickets are left, since steps up to s-1 took all those below B(s-1-rho), and they are the smallest, so rule 2 takes them first.
Hence ticket k is trained at step <= floor(k/B) + rho + 1, from tokens no older than v(floor(k/B) - eta): its staleness is
<= (floor(k/B) + rho) - (floor(k/B) - eta) = S. Versions never fall inside a rollout, so the bound holds for every token.

No deadlock. While step s waits, v(p) goes live for the last published p >= (s-1) - (publish_every - 1). Every ticket below Bs is
then admissible if publish_every - 1 <= eta, which is a rule of the config. Steps before s took B(s-1) tickets, so at least B of these
are left to become ready.

Rule 1 is AReaL's (arXiv 2505.24298, section 5.1). Alone it bounds how far generation runs ahead, not how late a long rollout comes.
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
