"""TRL's side of ``bench_trl.py``, run by TRL's own Python: GRPO on the problems, policy and schedule that the job file gives.

From this project come only the problems' verifier and reward, as plain Python functions, the way a user of TRL would write them.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from neox_rl.config.load import load_resolved
from neox_rl.config.run import RunConfig
from neox_rl.problems.sources import load_problems
from neox_rl.problems.tokenizer import load_tokenizer
from neox_rl.search.replay import num_wrong_steps
from neox_rl.types import Problem
from neox_rl.verify.reward import reward
from neox_rl.verify.verifier import ArithmeticVerifier

Job = dict[str, Any]


class Rewards:
    """TRL's reward function: what a run of this project gives for the same tokens."""

    __name__ = "search_reward"

    def __init__(self, config: RunConfig, problems: Sequence[Problem]) -> None:
        self._config, self._problems = config.metarl, {problem.id: problem for problem in problems}
        self._tokenizer, self._verifier = load_tokenizer(config.metarl.tokenizer, config.metarl.problems), ArithmeticVerifier()

    def __call__(self, completion_ids: list[list[int]], problem_id: list[str], **_: Any) -> list[float]:
        return [self._one(self._problems[name], ids) for name, ids in zip(problem_id, completion_ids, strict=True)]

    def _one(self, problem: Problem, ids: list[int]) -> float:
        text = self._tokenizer.decode(ids)
        finished = ids[-1] == self._tokenizer.eos_id
        verdict = self._verifier.check_sync(problem, text if finished else "")
        wrong_steps = num_wrong_steps(problem, text)
        return reward(verdict, len(ids), self._config.rollout.max_new_tokens, self._config.reward, wrong_steps)


class Clock(TrainerCallback):  # type: ignore[misc]
    """When each step ended, and the policy every so many steps. The writing counts as training time, as it does in a run."""

    def __init__(self, directory: Path, every: int) -> None:
        self.directory, self.every, self.times = directory, every, [time.time()]

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.times = [time.time()]

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        self.times.append(time.time())
        if state.global_step % self.every == 0:
            model.save_pretrained(self.directory / f"step{state.global_step:06d}")


def settings(job: Job, config: RunConfig, directory: Path) -> GRPOConfig:
    rollout, neox = config.metarl.rollout, config.neox
    samples = rollout.groups_per_step * rollout.group_size
    return GRPOConfig(
        output_dir=str(directory / "trainer"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=job["micro_batch"] or samples,
        gradient_accumulation_steps=samples // (job["micro_batch"] or samples),
        generation_batch_size=samples,
        num_generations=rollout.group_size,
        max_completion_length=rollout.max_new_tokens,
        temperature=rollout.temperature,
        max_steps=job["steps"],
        max_grad_norm=neox.gradient_clipping,
        beta=0.0,
        loss_type="dapo",  # the mean over the tokens of the global batch, as aggregation token_mean
        scale_rewards="group",
        shuffle_dataset=False,
        seed=config.metarl.seed,
        save_strategy="no",
        report_to="none",
        logging_steps=job["steps"],
        disable_tqdm=True,
        use_transformers_continuous_batching=job["continuous_batching"],
    )


def main() -> int:
    job: Job = json.loads(Path(sys.argv[1]).read_text())
    directory, config = Path(job["directory"]), load_resolved(job["config"])
    torch.set_num_threads(job["threads"])
    problems = load_problems(config.metarl.problems, config.metarl.seed).train
    prompts = {problem.id: problem.prompt for problem in problems}
    dataset = Dataset.from_list([{"prompt": prompts[name], "problem_id": name} for name in job["problems"]])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    params = config.neox.optimizer["params"]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1.0, betas=tuple(params["betas"]), eps=params["eps"], weight_decay=config.neox.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, job["rates"]))
    clock = Clock(directory, job["save_every"])
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=Rewards(config, problems),
        args=settings(job, config, directory),
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        optimizers=(optimizer, schedule),
        callbacks=[clock],
    )
    trainer.train()
    lengths = [row["completions/mean_length"] for row in trainer.state.log_history if "completions/mean_length" in row]
    (directory / "times.json").write_text(json.dumps({"times": clock.times, "lengths": lengths}))
    return 0


def _rate(rates: Sequence[float], index: int) -> float:
    return rates[min(index, len(rates) - 1)]


if __name__ == "__main__":
    raise SystemExit(main())
