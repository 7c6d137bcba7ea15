"""Prints what each delivery rule would do to a run: stale tokens, dropped work, and an idle trainer."""

from __future__ import annotations

import argparse
from dataclasses import fields

from neox_rl.queue.simulate import Outcome, Scenario, compare

COLUMNS = ("beyond S", "masked", "dropped", "idle", "long kept", "max staleness")


def row(name: str, outcome: Outcome) -> str:
    shares = (outcome.beyond_frac, outcome.masked_frac, outcome.dropped_frac, outcome.idle_frac, outcome.long_frac)
    return f"{name:<16}" + "".join(f"{100 * share:>12.1f} %" for share in shares) + f"{outcome.max_staleness:>14}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--admission-slack", type=int, default=3)
    parser.add_argument("--delivery-slack", type=int, default=1)
    defaults = Scenario()
    for f in fields(Scenario):
        value = getattr(defaults, f.name)
        parser.add_argument("--" + f.name.replace("_", "-"), type=type(value), default=value, help=" ")
    args = parser.parse_args()
    scenario = Scenario(**{f.name: getattr(args, f.name) for f in fields(Scenario)})
    S = args.admission_slack + args.delivery_slack
    print(f"S = {S} (admission {args.admission_slack} + delivery {args.delivery_slack}); {scenario}\n")
    print(f"{'rule':<16}" + "".join(f"{name:>14}" for name in COLUMNS))
    for name, outcome in compare(scenario, args.admission_slack, args.delivery_slack).items():
        print(row(name, outcome))
    print("\nbeyond S, masked: of the tokens trained on; dropped: of the tokens generated; idle: of the trainer's time;")
    print("long kept: of the tokens of the longest tenth of the rollouts, those that got gradient.")


if __name__ == "__main__":
    main()
