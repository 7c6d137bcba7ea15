"""GPT-NeoX's own training before and after ours, in one process: what each finds in the other's checkpoints, as one JSON line.

python -m tests.contracts.neox_stock DIRECTORY    with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and GPT_NEOX_PATH set
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from neox_rl.config.neox import NeoXConfig
from neox_rl.config.run import RunConfig
from neox_rl.config.schema import MetaRLConfig
from neox_rl.engines.base import RankEngine
from neox_rl.engines.gpt_neox_args import neox_arguments
from neox_rl.engines.model_shape import model_shape
from neox_rl.engines.rank_env import rank_environment
from neox_rl.engines.registry import build_engine
from tests.invariance.engine_batches import VOCAB, loss_fn, sequences, split

NEOX = NeoXConfig(hidden_size=32, num_attention_heads=2, num_layers=2, seq_length=32, pipe_parallel_size=0)
RUN = RunConfig(NEOX, MetaRLConfig(engine="gpt-neox"))
TEXT = torch.from_numpy(sequences()[1])[None]


class Stock:
    """GPT-NeoX as it sets itself up, without its data loaders."""

    def __init__(self, save: Path, load: Path | None) -> None:
        import deepspeed.ops.adam

        from neox_rl.engines import gpt_neox_setup

        # Its Adam is compiled for CUDA; the one that it stands for here counts steps in the same two places.
        deepspeed.ops.adam.FusedAdam = torch.optim.AdamW
        env, shape = rank_environment(os.environ), model_shape(RUN, VOCAB)
        self.world, _ = gpt_neox_setup.join_world(NEOX, RUN.metarl, shape, env, {})
        from megatron import training
        from megatron.neox_arguments import NeoXArgs

        training.get_total_params = lambda _: 0  # counts on a CUDA device

        keys = neox_arguments(NEOX, {}, world_size=1, padded_vocab=shape.padded_vocab, backend="gloo", cuda=False)
        keys |= {"save": str(save), "checkpoint_factor": 1, "no_save_rng": True, "no_load_rng": True}
        self.args = NeoXArgs.from_dict(keys | ({"load": str(load)} if load else {}))
        self.args.rank, self.args.local_rank, self.args.world_size = 0, 0, 1
        self.model, self.optimizer, self.scheduler, _ = training.setup_model_and_optimizer(self.args)
        self.model.module.set_batch_fn(None)

    def logits(self) -> torch.Tensor:
        length = TEXT.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
        found: torch.Tensor = self.model((TEXT, torch.arange(length)[None], mask))
        return found

    def pretrain(self, steps: int) -> list[float]:
        from megatron.model.gpt2_model import cross_entropy

        losses = []
        for _ in range(steps):
            loss = cross_entropy(self.logits()[:, :-1], (TEXT[:, 1:], torch.ones(1, TEXT.shape[1] - 1)))
            self.model.backward(loss)
            self.model.step()
            losses.append(float(loss.detach()))
        return losses

    def logprobs(self) -> torch.Tensor:
        with torch.no_grad():
            return self.logits()[0, :-1, :VOCAB].log_softmax(-1).gather(1, TEXT[0, 1:, None])[:, 0]


def own_logprobs(engine: RankEngine) -> torch.Tensor:
    """Of the same text, the second sequence of the pack that holds them all."""
    start = len(sequences()[0])
    return torch.from_numpy(engine.logprobs(split(sequences(), 1))[0][start : start + TEXT.shape[1] - 1])


def main() -> None:
    root = Path(sys.argv[1])
    pretrained, trained, again = root / "pretrained", root / "trained", root / "again"
    import megatron_patches

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    megatron_patches.apply(megatron_patches.GPT_NEOX)
    from megatron.checkpointing import save_checkpoint

    from neox_rl.engines import gpt_neox_setup

    found: dict[str, Any] = {}
    stock = Stock(pretrained, None)
    found["first losses"] = stock.pretrain(3)
    save_checkpoint(stock.args, 3, stock.model, stock.optimizer, stock.scheduler)
    before = stock.logprobs()
    gpt_neox_setup.leave_world()

    engine = build_engine(RUN, VOCAB)
    assert isinstance(engine, RankEngine)
    found["client"] = engine.load(pretrained)
    found["pretrained to ours"] = float((own_logprobs(engine) - before).abs().max())
    engine.set_reference()
    for _ in range(2):
        engine.step(split(sequences(), 1), loss_fn, 1e-3)
    found["saved"] = engine.save(trained, {"cursor": 1}).name
    after = own_logprobs(engine)
    found["moved"] = float((after - before).abs().max())
    engine.close()

    stock = Stock(again, trained)
    found["iteration"] = stock.args.iteration
    found["ours to stock"] = float((stock.logprobs() - after).abs().max())
    found["adam steps"] = sorted({int(state["step"]) for state in stock.model.optimizer.state.values()})
    found["group steps"] = [group["step"] for group in stock.model.optimizer.param_groups]
    found["last losses"] = stock.pretrain(3)
    gpt_neox_setup.leave_world()
    (root / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
