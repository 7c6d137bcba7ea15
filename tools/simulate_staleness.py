"""What a staleness rule does to a run, and what a cluster needs: a simulation around the real queue, in seconds instead of GPU days.

    simulate_staleness.py                         every delivery rule under one bound, as a table (--plot FILE.png: as a picture)
    simulate_staleness.py --plan ...              trainer idle, servers busy, staleness, masked share and tokens/s of one cluster
    simulate_staleness.py --plan --search servers --idle 0.05      the fewest servers that keep the trainer idle at most 5 %
    simulate_staleness.py --plan --search slack --idle 0.05        the smallest S that does
    simulate_staleness.py --from-run runs/NAME [--check]           a run predicted from its own lengths, step times and server speed,
                                                  beside what it measured; --check: exit status 1 beyond the tolerance

With --from-run, the options that are given replace what the run had: --admission-slack, --servers and so on ask what would have been.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TypeVar

from neox_rl.errors import ConfigError
from neox_rl.queue.sim.books import Outcome
from neox_rl.queue.sim.measured import Measured, Rates, measure
from neox_rl.queue.sim.plan import Rule, calibrated, demand, fewest_servers, predict, smallest_bound
from neox_rl.queue.sim.rules import compare
from neox_rl.queue.sim.scenario import Decoding, LogNormal, Publishing, Scenario, StepTimes

TOLERANCE = 0.1
FLOORS = {"idle_frac": 0.0, "busy_frac": 0.0, "staleness": 0.05, "masked_frac": 0.02, "tokens_per_s": 0.0}
"""A prediction holds within 10 % of what was measured, or within this: five hundredths of a step, two points of the tokens masked. The
trainer is compared by its utilization, 1 - idle: a tenth of an idle share near zero would be a matter of luck."""
LABELS = {
    "idle_frac": "trainer idle",
    "busy_frac": "servers busy",
    "staleness": "mean staleness, steps",
    "masked_frac": "tokens masked",
    "tokens_per_s": "tokens/s into the trainer",
}
T = TypeVar("T", Decoding, Publishing, Rule)
MOST_SERVERS, MOST_SLACK = 100_000, 16


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--from-run", type=Path, metavar="RUN", help="a run directory: its lengths, step times, speeds and rule")
    p.add_argument("--speed-of", type=Path, metavar="RUN", help="with --from-run: the speed of the servers from this other run")
    p.add_argument("--check", action="store_true", help="exit status 1 where prediction and measurement differ beyond the tolerance")
    p.add_argument("--plan", action="store_true", help="predict the cluster that the options describe")
    p.add_argument("--search", choices=("servers", "slack"), help="the smallest that keeps the trainer idle at most --idle")
    p.add_argument("--idle", type=float, default=0.05, help="share of the trainer's time (0.05)")
    p.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it")
    rule = p.add_argument_group("rule")
    rule.add_argument("--admission-slack", type=int, help="eta (3; of the run)")
    rule.add_argument("--delivery-slack", type=int, help="rho (1; of the run)")
    rule.add_argument("--mode", choices=("token", "strict"), help="(token; of the run)")
    work = p.add_argument_group("work")
    work.add_argument("--num-steps", type=int, help="optimizer steps to simulate (200; 60 with --plan; of the run)")
    work.add_argument("--groups-per-step", type=int, help="B (16)")
    work.add_argument("--group-size", type=int, help="rollouts of a problem (1)")
    work.add_argument("--mean-tokens", type=float, help="mean length of a rollout (60)")
    work.add_argument("--sigma", type=float, default=0.9, help="spread of the logarithm of the length (0.9)")
    work.add_argument("--max-tokens", type=int, default=1 << 30, help="token budget")
    work.add_argument("--refuse-frac", type=float, help="share of the groups that dynamic sampling refuses (0)")
    work.add_argument("--seed", type=int)
    servers = p.add_argument_group("servers")
    servers.add_argument("--servers", type=int, help="number (1)")
    servers.add_argument("--gpus", type=int, help="instead: all GPUs, those of --gpus-train included")
    servers.add_argument("--gpus-per-server", type=int, default=1, help="tensor parallel size of a server (1)")
    servers.add_argument("--concurrency", type=int, help="sequences that a server decodes at once (no limit)")
    servers.add_argument("--decode-base-s", type=float, help="a decode step takes this (0.025)")
    servers.add_argument("--decode-seq-s", type=float, help="and this for each running sequence (0)")
    servers.add_argument("--latency-s", type=float, help="of a request, beside its tokens (0)")
    servers.add_argument("--recompute-s", type=float, help="after a switch, for each running sequence (0)")
    trainer = p.add_argument_group("trainer")
    trainer.add_argument("--step-s", type=float, help="of a step, whatever its tokens (1)")
    trainer.add_argument("--gpus-train", type=int, default=1, help="GPUs of the trainer (1)")
    trainer.add_argument("--train-tokens-per-s", type=float, help="that one GPU trains; the step then takes --step-s and its tokens' time")
    trainer.add_argument("--publish-every", type=int, help="steps (1)")
    trainer.add_argument("--stage-s", type=float, help="from the end of a step to its snapshot on every server (0.1)")
    trainer.add_argument("--snapshot-gb", type=float, help="instead: size of a snapshot, sent to every server")
    trainer.add_argument("--publish-gb-s", type=float, default=10.0, help="that the publisher sends a second, all servers together (10)")
    trainer.add_argument("--pause-s", type=float, help="of a server that switches (0)")
    return p


def scenario_of(args: argparse.Namespace, base: Scenario) -> Scenario:
    """``base`` with what the command line says instead."""
    servers = args.servers
    if args.gpus is not None:
        servers = (args.gpus - args.gpus_train) // args.gpus_per_server
        if servers < 1:
            raise ConfigError(f"--gpus {args.gpus} leaves no server of {args.gpus_per_server} beside --gpus-train {args.gpus_train}")
    names = {f.name for f in fields(Scenario)}
    plain = {name: value for name, value in vars(args).items() if name in names and value is not None}
    scenario = replace(base, **plain, **({} if servers is None else {"num_servers": servers}))
    stage_s = args.stage_s if args.snapshot_gb is None else args.snapshot_gb * scenario.num_servers / args.publish_gb_s
    lengths = scenario.lengths if args.mean_tokens is None else LogNormal(args.mean_tokens, args.sigma, args.max_tokens)
    decoding = _given(
        scenario.decoding,
        base_s=args.decode_base_s,
        seq_s=args.decode_seq_s,
        latency_s=args.latency_s,
        recompute_s=args.recompute_s,
        max_num_seqs=args.concurrency,
    )
    publishing = _given(scenario.publishing, every=args.publish_every, stage_s=stage_s, pause_s=args.pause_s)
    step = scenario.step
    if args.train_tokens_per_s is not None:
        step = StepTimes(args.step_s or 0.0, 1 / (args.train_tokens_per_s * args.gpus_train))
    elif args.step_s is not None:
        step = StepTimes(args.step_s)
    return replace(scenario, lengths=lengths, decoding=decoding, publishing=publishing, step=step)


def _given(base: T, **values: float | str | None) -> T:
    return replace(base, **{name: value for name, value in values.items() if value is not None})  # type: ignore[arg-type]


def print_rules(outcomes: dict[str, Outcome]) -> None:
    columns = ("beyond S", "masked", "dropped", "idle", "long kept", "max staleness")
    print(f"{'rule':<16}" + "".join(f"{name:>14}" for name in columns))
    for name, o in outcomes.items():
        shares = (o.beyond_frac, o.masked_frac, o.dropped_frac, o.idle_frac, o.long_frac)
        print(f"{name:<16}" + "".join(f"{100 * share:>12.1f} %" for share in shares) + f"{o.max_staleness:>14}")
    print("\nbeyond S, masked: of the tokens trained on; dropped: of the tokens generated; idle: of the trainer's time;")
    print("long kept: of the tokens of the longest tenth of the rollouts, those that got gradient.")


def shown(name: str, value: float) -> str:
    return f"{100 * value:.1f} %" if name.endswith("_frac") else f"{value:,.0f}" if value > 100 else f"{value:.2f}"


def print_plan(scenario: Scenario, rule: Rule, outcome: Outcome, rates: Rates) -> None:
    for f in fields(Rates):
        print(f"{LABELS[f.name]:<28}{shown(f.name, getattr(rates, f.name)):>12}")
    ages = sorted(outcome.ages.items())
    print(f"{'staleness':<28}" + ", ".join(f"{age}: {100 * n / outcome.tokens_trained:.1f} %" for age, n in ages))
    print(f"{'sequences running a server':<28}{outcome.running_mean:>12.1f}")
    print(f"{'servers, always full, needed':<28}{demand(scenario):>12.1f}")


def print_check(measured: Rates, predicted: Rates) -> bool:
    """The two beside one another; whether all are within the tolerance."""
    print(f"{'':<28}{'measured':>12}{'predicted':>12}")
    good = True
    for f in fields(Rates):
        m, p = getattr(measured, f.name), getattr(predicted, f.name)
        compared = 1 - m if f.name == "idle_frac" else m
        holds = abs(p - m) <= max(TOLERANCE * compared, FLOORS[f.name])
        good &= holds
        print(f"{LABELS[f.name]:<28}{shown(f.name, m):>12}{shown(f.name, p):>12}{'' if holds else '   differs'}")
    print(f"\nwithin {TOLERANCE:.0%} (trainer: of its utilization), 0.05 steps, two points of the tokens masked: {'yes' if good else 'no'}")
    return good


def print_search(args: argparse.Namespace, scenario: Scenario, rule: Rule) -> bool:
    if args.search == "servers":
        found, unit = fewest_servers(scenario, rule, args.idle, MOST_SERVERS), "servers"
        print(f"always full, {demand(scenario):.1f} servers would do")
    else:
        found, unit = smallest_bound(scenario, rule, args.idle, MOST_SLACK), f"= S, with delivery slack {rule.delivery_slack}"
    text = (
        f"{found} {unit}"
        if found is not None
        else "out of reach" + (": raise the slack, or shorten the rollouts" if args.search == "servers" else ": more servers")
    )
    print(f"trainer idle at most {args.idle:.1%}: {text}")
    return found is not None


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    base: Measured | None = measure(args.from_run) if args.from_run else None
    start = calibrated(base) if base else Scenario(num_steps=60 if args.plan else 200)
    if base and args.speed_of:
        start = replace(start, decoding=calibrated(measure(args.speed_of)).decoding)
    scenario = scenario_of(args, start)
    rule = Rule(base.admission_slack, base.delivery_slack, base.mode) if base else Rule(3, 1)
    rule = _given(rule, admission_slack=args.admission_slack, delivery_slack=args.delivery_slack, mode=args.mode)
    print(f"S = {rule.bound} (admission {rule.admission_slack} + delivery {rule.delivery_slack}), {scenario.num_servers} servers, ", end="")
    print(f"{scenario.groups_per_step} groups of {scenario.group_size} a step\n{scenario.decoding}\n{scenario.publishing}\n")
    if args.search:
        return 0 if print_search(args, scenario, rule) else 1
    if base or args.plan:
        outcome, rates = predict(scenario, rule)
        if args.plot:
            from planning_plots import plot_plan

            plot_plan(scenario, rule, args.plot)
        if base:
            good = print_check(base.rates, rates)
            return 0 if good or not args.check else 1
        print_plan(scenario, rule, outcome, rates)
        return 0
    outcomes = compare(scenario, rule.admission_slack, rule.delivery_slack)
    print_rules(outcomes)
    if args.plot:
        from planning_plots import plot_rules

        plot_rules(outcomes, rule.bound, args.plot)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ConfigError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
