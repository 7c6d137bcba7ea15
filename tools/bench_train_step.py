"""How fast is a training step? The engine (TP 1) against plain transformers with fused AdamW, on the same batches of search traces.

Both train the same model with the same truncated importance sampling loss, on one thread of one core, in turns. Plain transformers gets
the batch twice: packed alike (one row of tokens, positions that begin anew, its own block-diagonal mask) and padded to the longest trace of
the micro-batch, as most trainers do. Tokens are real ones: padding is not counted.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from benching import CONFIG, be_one_rank, describe_machine, parser, percent, ratio, table
from torch import Tensor
from transformers import LlamaForCausalLM

from neox_rl.batch.pack import pack_rl
from neox_rl.batch.packing import Layout
from neox_rl.batch.types import PADDING, MicroBatch, StepBatch
from neox_rl.config.load import load_config
from neox_rl.config.run import RunConfig
from neox_rl.engines.port import Engine
from neox_rl.engines.registry import build_engine
from neox_rl.loss.policy import make_loss_fn
from neox_rl.problems.sources import load_problems
from neox_rl.problems.tokenizer import load_tokenizer
from neox_rl.search.demonstrations import Demonstrations, TraceStyle, searches
from neox_rl.types import Group, Segment, Trace

MODELS = {
    "1 M, as the main config": (),
    "10 M": ("num_layers=6", "hidden_size=320", "num_attention_heads=10", "intermediate_size=2784"),
}
LENGTHS = {"rollouts (40 tokens at most)": 40, "whole searches (208)": 208}
LR = 1e-4
TOLERANCE = 1e-4


def as_rollout(trace: Trace, budget: int, rng: random.Random) -> Trace:
    """A demonstration as a policy's attempt: cut at the budget, one segment of sampled tokens with log-probs."""
    prompt, *written = trace.segments
    ids = tuple(i for segment in written for i in segment.ids)[:budget]
    sampled = Segment(ids, written[0].role, tuple(rng.uniform(-3.0, 0.0) for _ in ids), version=0, mask=1.0)
    return replace(trace, segments=(prompt, sampled), reward=rng.random())


def step_batch(config: RunConfig, budget: int) -> StepBatch:
    """One step's groups of solver searches: the lengths of real search traces."""
    metarl = config.metarl
    problems = load_problems(metarl.problems, metarl.seed).train
    tokenizer = load_tokenizer(metarl.tokenizer, metarl.problems)
    traces = Demonstrations(searches(problems, "mixed", TraceStyle(), tokenizer), metarl.seed, config.neox.seq_length)
    rng = random.Random(metarl.seed)
    groups = []
    for ticket in range(metarl.rollout.groups_per_step):
        members = tuple(as_rollout(next(traces).traces[0], budget, rng) for _ in range(metarl.rollout.group_size))
        groups.append(Group(ticket, members[0].problem_id, members))
    layout = Layout(metarl.pack_tokens)
    return pack_rl(groups, 1, staleness=metarl.staleness, objective=metarl.objective, max_new_tokens=budget, layout=layout)


class Plain:
    """What a user writes without this project: the HF model, cross entropy, clipping, fused AdamW."""

    def __init__(self, model: LlamaForCausalLM, config: RunConfig) -> None:
        self.model = model.train()
        params = config.neox.optimizer["params"]
        self.optimizer = torch.optim.AdamW(
            model.parameters(), LR, tuple(params["betas"]), params["eps"], weight_decay=config.neox.weight_decay, fused=True
        )
        self.clip, self.cap = config.neox.gradient_clipping, config.metarl.objective.ratio_cap

    def step(self, microbatches: Sequence[MicroBatch], padded: bool) -> float:
        total = 0.0
        for batch in microbatches:
            loss = self._loss(batch, padded)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def _loss(self, batch: MicroBatch, padded: bool) -> Tensor:
        tokens, targets, weight, advantages, behavior = (
            torch.from_numpy(x) for x in (batch.tokens, batch.targets, batch.loss_weight, batch.advantages, batch.behavior_logprobs)
        )
        if padded:
            real = [
                (int(a), int(b)) for a, b in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False) if batch.sequence_index[a] != PADDING
            ]
            rows = torch.nn.utils.rnn.pad_sequence([tokens[a:b] for a, b in real], batch_first=True)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones(b - a, dtype=torch.long) for a, b in real], batch_first=True)
            logits = self.model(rows, attention_mask=mask, use_cache=False).logits[mask.bool()]
            used = real[-1][1]
            targets, weight, advantages, behavior = (x[:used] for x in (targets, weight, advantages, behavior))
        else:
            logits = self.model(tokens[None], position_ids=torch.from_numpy(batch.positions)[None], use_cache=False).logits[0]
        logprobs = -F.cross_entropy(logits, targets, reduction="none")
        importance = (logprobs.detach() - behavior).exp().clamp(max=self.cap)
        return -(weight * importance * advantages * logprobs).sum()


@dataclass
class Contender:
    name: str
    step: Callable[[], float]
    seconds: list[float]


def contest(contenders: Sequence[Contender], repeats: int) -> None:
    """In turns, so that what slows the machine slows all. The first round warms up; its losses must agree."""
    losses = [contender.step() for contender in contenders]
    if max(losses) - min(losses) > TOLERANCE * max(1.0, abs(losses[0])):
        raise SystemExit(f"losses of the first step differ: {dict(zip([c.name for c in contenders], losses, strict=True))}")
    for _ in range(repeats):
        for contender in contenders:
            begin = time.perf_counter()
            contender.step()
            contender.seconds.append(time.perf_counter() - begin)


def measure(name: str, settings: Sequence[str], repeats: int, lengths: Mapping[str, int]) -> None:
    config = load_config([CONFIG], settings)
    vocab = load_tokenizer(config.metarl.tokenizer, config.metarl.problems).vocab_size
    engine = build_engine(config, vocab)
    loss_fn = make_loss_fn(config.metarl.objective, 0)
    with TemporaryDirectory() as directory:
        engine.save_hf(Path(directory))
        rows, results = [], []
        for what, budget in lengths.items():
            engine.load_hf(Path(directory))
            batch = step_batch(config, budget)
            contenders = make_contenders(engine, loss_fn, batch, Path(directory), config)
            contest(contenders, repeats)
            tokens = batch.stats.num_tokens
            for contender in contenders:
                median = float(np.median(contender.seconds))
                rows.append([what, contender.name, f"{tokens}", f"{1e3 * median:.0f}", f"{tokens / median:,.0f}"])
            results.append((what, batch, contenders))
    print(f"### {name}\n")
    table(["traces", "who", "tokens a step", "ms a step", "tokens/s"], rows)
    for what, batch, (ours, packed, padded) in results:
        ratio(f"{what}: the engine against plain transformers packed alike", packed.seconds, ours.seconds, 0.95)
        ratio(f"{what}: the engine against plain transformers padded", padded.seconds, ours.seconds, 0.95)
        slots = sum(padded_slots(micro) for micro in batch.microbatches[0])
        packed_frac, padded_frac = batch.stats.packing_efficiency, batch.stats.num_tokens / slots
        print(f"{what}: {percent(packed_frac)} of the packed slots are real tokens, {percent(padded_frac)} of the padded\n", flush=True)
    engine.close()


def make_contenders(engine: Engine, loss_fn: object, batch: StepBatch, model: Path, config: RunConfig) -> list[Contender]:
    micro = batch.microbatches[0]
    plain = [Plain(LlamaForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa"), config) for _ in range(2)]
    return [
        Contender("this engine, packed", lambda: engine.step(micro, loss_fn, LR).loss, []),  # type: ignore[arg-type]
        Contender("transformers, packed alike", lambda: plain[0].step(micro, padded=False), []),
        Contender("transformers, padded", lambda: plain[1].step(micro, padded=True), []),
    ]


def padded_slots(batch: MicroBatch) -> int:
    """Token places of the same sequences as a padded rectangle."""
    lengths = [int(b - a) for a, b in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False) if batch.sequence_index[a] != PADDING]
    return len(lengths) * max(lengths)


def main() -> int:
    args = parser(__doc__).parse_args()
    be_one_rank()
    describe_machine("torch", "transformers", "megatron-core")
    some = 1 if args.quick else None
    for name, settings in list(MODELS.items())[:some]:
        measure(name, settings, 1 if args.quick else 15, dict(list(LENGTHS.items())[:some]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
