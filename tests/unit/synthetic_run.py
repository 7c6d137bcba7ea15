"""A made-up run on disk, shaped like a real one. Numbers are invented; searches go through the real renderer."""

from __future__ import annotations

import math
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

from neox_rl.arithmetic import legal_moves, state_of
from neox_rl.config.schema import LoggingConfig
from neox_rl.metacot import compare_word, prompt_text, step_text
from neox_rl.search.render import render
from neox_rl.telemetry.events import EventLog
from neox_rl.telemetry.metrics import MetricsWriter
from neox_rl.telemetry.paths import RunPaths
from neox_rl.telemetry.rollouts import RolloutRecorder
from neox_rl.telemetry.stats import cluster_mean_ci
from neox_rl.telemetry.status import Status, write_status
from neox_rl.types import Problem

START_NS = 1_750_000_000_000_000_000
STEP_NS = 3_400_000_000
PROBLEMS = ((3, 5, 7, 26), (2, 8, 9, 34), (1, 4, 6, 29), (3, 3, 8, 33))


def write_run(root: Path, *, sft_steps: int = 300, rl_steps: int = 120, finished: bool = True, seed: int = 0) -> RunPaths:
    """Write a run; without ``finished`` it stops before the last evaluation, as failed."""
    paths = RunPaths.of(root).create()
    rng = random.Random(seed)
    paths.config.write_text("num_layers: 3\nmetarl:\n  name: synthetic\n  staleness: {admission_slack: 1, delivery_slack: 1}\n")
    with MetricsWriter(paths, LoggingConfig()) as writer:
        for step in range(1, sft_steps + 1):
            writer.step(sft_row(step, rng))
        for row in evaluation_rows("warmstart", 0, 0.0, rng) if rl_steps else []:
            writer.evaluation(row)
        for step in range(1, rl_steps + 1):
            writer.step(rl_row(step, rl_steps, rng))
            if step % 40 == 0 and step < rl_steps:
                for row in evaluation_rows(f"step {step}", step, step / rl_steps, rng, clusters=12):
                    writer.evaluation(row)
        for row in evaluation_rows("final", rl_steps, 1.0, rng) if finished and rl_steps else []:
            writer.evaluation(row)
    _write_rollouts(paths, finished and rl_steps > 0, random.Random(seed + 1))
    _write_events(paths, rl_steps, rng)
    message = "" if finished else "server-0 ended with status -9; see logs/server-0.log"
    write_status(paths.status, Status(phase="done" if finished else "failed", step=rl_steps, total_steps=rl_steps, message=message))
    return paths


def sft_row(step: int, rng: random.Random) -> Any:
    loss = 0.42 + 3.1 * math.exp(-step / 45) + rng.gauss(0, 0.03)
    return {
        "phase": "sft",
        "step": step,
        "version": 0,
        "time": 1.75e9 + step,
        "loss": loss,
        "grad_norm": 0.8,
        "lr": 3e-3,
        "tokens_trained": 2048,
        "wait_s": 0.01,
        "step_s": 0.4,
    }


def rl_row(step: int, steps: int, rng: random.Random) -> Any:
    progress = step / steps
    accuracy = 0.45 + 0.24 * (1 - math.exp(-3 * progress)) + rng.gauss(0, 0.03)
    return {
        "phase": "rl",
        "step": step,
        "version": step - 1,
        "time": 1.75e9 + 400 + 3.4 * step,
        "loss": rng.gauss(0, 0.02),
        "grad_norm": 0.4,
        "lr": 2e-4,
        "reward_mean": accuracy - 0.05,
        "reward_std": 0.48,
        "accuracy": accuracy,
        "entropy": 0.55 - 0.2 * progress + rng.gauss(0, 0.01),
        "length_mean": 62 - 14 * progress + rng.gauss(0, 1.5),
        "length_max": 128,
        "truncated_frac": max(0.0, 0.12 - 0.1 * progress + rng.gauss(0, 0.01)),
        "tokens_trained": 7000,
        "tokens_masked_stale": rng.randrange(300),
        "tokens_generated": 7600 * step,
        "staleness_mean": 0.9,
        "staleness_max": 2,
        "staleness_hist": {"0": 1400, "1": 4600, "2": 1100, "3": rng.randrange(200)},
        "staleness_bound": 2,
        "mismatch_kl": abs(rng.gauss(2e-7, 1e-7)),
        "ratio_mean": 1 + rng.gauss(0, 0.01),
        "ess": 0.97 - 0.05 * rng.random(),
        "clip_frac": 0.01,
        "wait_s": 0.1 + 0.2 * rng.random(),
        "step_s": 2.6,
        "publish_s": 0.15,
        "queue_ready": 18,
        "queue_inflight": 30,
        "pack_efficiency": 0.94,
        "rollouts_dropped": 0,
        "rollouts_trained_twice": 0,
    }


def evaluation_rows(label: str, step: int, progress: float, rng: random.Random, clusters: int = 36) -> list[Any]:
    rows = []
    for mode, lift in (("greedy", 0.04), ("sampled", 0.0)):
        attempts = []
        for cluster in range(clusters):
            ease = rng.gauss(0, 0.08)
            for k in range(12):
                correct = int(rng.random() < 0.44 + lift + 0.21 * progress + ease)
                attempts.append([f"c{cluster}-{k}", f"c{cluster}", correct, rng.randrange(20, 120)])
        search = {
            "wrong_nodes_per_output": 3.23 - 2.0 * progress,
            "wrong_nodes_frac": 0.21 - 0.11 * progress,
            "false_goals_per_output": 0.31 - 0.2 * progress,
            "reached_goal_frac": 0.46 + 0.2 * progress,
            "first_on_path_frac": 0.52 + 0.13 * progress,
            "first_on_path_chance": 0.47,
            "repeated_nodes_frac": 0.06 - 0.02 * progress,
            "search_effort": 1.02 - 0.2 * progress,
            "junk_words_per_output": 0.1,
            "mean_nodes": 15.4 - 3.1 * progress,
            "mean_tokens": 61 - 12 * progress,
            "mean_nodes_to_goal": math.nan,
        }
        rows.append(
            {
                "label": label,
                "step": step,
                "version": step,
                "mode": mode,
                "accuracy": cluster_mean_ci([a[2] for a in attempts], [a[1] for a in attempts]).row(),
                "num_problems": len(attempts),
                "num_clusters": clusters,
                "per_problem": attempts,
                "search": search,
                "time": 1.75e9 + 380 + 3.4 * step,
                "seconds": 9.0,
            }
        )
    return rows


def search_text(problem: Problem, slip: float, rng: random.Random, max_words: int = 100) -> tuple[str, bool]:
    """A depth-first search that errs with probability ``slip`` at each step, and whether its solution is right."""
    target: int = problem.meta["target"]  # type: ignore[assignment]
    words: list[str] = []

    def visit(state: tuple[int, ...], how: dict[int, str], sound: bool) -> tuple[str, bool] | None:
        moves = list(legal_moves(state, 60))
        rng.shuffle(moves)
        for move in moves[:6]:
            if len(words) > max_words:
                return None
            step, text, wrong = move.step, step_text(move.step), rng.random() < slip
            words.extend((text.rsplit("=", 1)[0] + f"={step.result + 1}" if wrong else text).split())
            here = f"( {how[step.left]} {step.operator} {how[step.right]} )"
            if len(move.after) > 1:
                found = visit(move.after, {**how, step.result: here}, sound and not wrong)
                if found:
                    return found
                continue
            words.append(compare_word(step.result + wrong, target))
            if words[-1] == "goal":
                return here[2:-2], sound and not wrong
        words.append("back")
        return None

    numbers: list[int] = problem.meta["numbers"]  # type: ignore[assignment]
    found = visit(state_of(numbers), {n: str(n) for n in numbers}, True)
    if found:
        words += ["solution", found[0]]
    return " ".join(words), bool(found and found[1])


def rollout_row(problem: Problem, text: str, *, label: str, correct: bool, versions: list[tuple[int, int, int]]) -> Any:
    lines = [asdict(line) for line in render(problem, text)]
    return {
        "id": f"{problem.id}-{label}",
        "label": label,
        "step": 0,
        "problem_id": problem.id,
        "prompt": problem.prompt,
        "text": text,
        "correct": correct,
        "reward": float(correct),
        "reason": "match" if correct else "mismatch",
        "finish": "stop",
        "num_tokens": len(text.split()),
        "versions": [{"version": v, "start": a, "end": b} for v, a, b in versions],
        "lines": lines,
    }


def _write_rollouts(paths: RunPaths, final: bool, rng: random.Random) -> None:
    recorder = RolloutRecorder(paths.rollouts, every=1)
    for i, (*numbers, target) in enumerate(PROBLEMS):
        meta: Any = {"numbers": numbers, "target": target, "max_value": 60}
        problem = Problem(f"p{i}", "countdown", prompt_text(numbers, target), "", "c", meta)
        for label, slip in (("warmstart", 0.16), ("final", 0.03 if i < 3 else 0.3))[: 1 + final]:
            text, correct = search_text(problem, slip, rng)
            recorder.record(rollout_row(problem, text, label=label, correct=correct, versions=[(0, 0, len(text.split()))]))
        text, correct = search_text(problem, 0.03, rng)
        length = len(text.split())
        mixed = [(40, 0, length // 3), (41, length // 3, 2 * length // 3), (42, 2 * length // 3, length)]
        recorder.record(rollout_row(problem, text, label="train", correct=correct, versions=mixed))
    recorder.close()


def _write_events(paths: RunPaths, rl_steps: int, rng: random.Random) -> None:
    trainer, server, orchestrator = (EventLog(paths.event_log(p), p) for p in ("trainer-0", "server-0", "orchestrator"))
    trainer.add_span("build", START_NS, 20_000_000_000)
    server.add_span("generating", START_NS + 25 * 10**9, (rl_steps + 1) * STEP_NS)
    for step in range(rl_steps):
        t = START_NS + 30 * 10**9 + step * STEP_NS
        trainer.add_span("wait_batch", t, 200_000_000, step=step)
        trainer.add_span("train_step", t + 200_000_000, 2_900_000_000, step=step)
        trainer.add_span("publish", t + 3_100_000_000, 150_000_000, version=step + 1)
        server.add_span("paused", t + 3_300_000_000, 18_000_000 + rng.randrange(9_000_000), version=step + 1)
        orchestrator.add_span("generate", t, 3_000_000_000, rollout=step)
        orchestrator.add_span("generate", t + 400_000_000, 2_000_000_000, rollout=step)
    for log in (trainer, server, orchestrator):
        log.close()
