"""The trainer engine on megatron-core: TP, PP, DP and sequence parallelism, on CPU with gloo and on CUDA with NCCL."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megatron_patches
from neox_rl.batch.types import MicroBatch
from neox_rl.config.run import RunConfig
from neox_rl.engines import checkpoint_files, mcore_state
from neox_rl.engines.base import OnLogits, RankEngine
from neox_rl.engines.checkpoint_digests import note
from neox_rl.engines.hf_mapping import places
from neox_rl.engines.packed import Pack, make_pack
from neox_rl.engines.rank_env import rank_environment
from neox_rl.engines.weight_parts import WeightParts
from neox_rl.types import Json


class MegatronCoreEngine(RankEngine):
    """:class:`neox_rl.engines.port.Engine` on megatron-core. Joins the world of ranks when built."""

    def __init__(self, config: RunConfig, vocab_size: int) -> None:
        super().__init__(config, vocab_size)
        neox = config.neox
        megatron_patches.apply()
        with megatron_patches.quiet():
            # Imported after the patches, and not at all by who only reads this module's names.
            from neox_rl.engines import mcore_setup

            self._setup = mcore_setup
            self._world = mcore_setup.join_world(neox, config.metarl, rank_environment(os.environ, neox.master_addr))
            self._model = mcore_setup.build_parts(neox, self.shape, self._world, self.topology.pp_rank == 0, self._last)
        self._inner: Any = self._model.module
        self._optimizer: Any = None
        self._parts = WeightParts(self._inner, self.shape, self._world, places(self.shape, self.topology.pp))
        self._set_initial_weights()

    def _weights_changed(self) -> None:
        self._optimizer = self._setup.build_optimizer(self._neox, self._model)

    def _train(self, microbatches: Sequence[MicroBatch], on_logits: OnLogits, lr: float) -> float:
        self._model.zero_grad_buffer()
        self._optimizer.zero_grad()
        self._schedule(microbatches, on_logits, forward_only=False)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        _, grad_norm, _ = self._optimizer.step()
        return float(grad_norm)

    def _forward(self, microbatches: Sequence[MicroBatch], on_logits: OnLogits) -> None:
        self._schedule(microbatches, on_logits, forward_only=True)

    def _schedule(self, microbatches: Sequence[MicroBatch], on_logits: OnLogits, forward_only: bool) -> None:
        """Runs megatron-core's schedule."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        def forward(data: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
            batch = next(data)
            tokens, targets, pack = self._to_device(batch)

            def loss(logits: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
                value = on_logits(logits, batch, targets)
                return value, value.new_zeros((), dtype=torch.int), {}

            return model(tokens, pack), loss

        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(microbatches),
            model=[self._model],
            num_microbatches=len(microbatches),
            seq_length=len(microbatches[0]),
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _to_device(self, batch: MicroBatch) -> tuple[Tensor, Tensor, Pack]:
        tokens, targets = (torch.from_numpy(x).to(self._world.device) for x in (batch.tokens, batch.targets))
        shape = self.shape
        return tokens, targets, make_pack(batch.positions, shape.rotary_dim, shape.rotary_base, self._dtype, self._world.device)

    def _layout(self) -> dict[str, Json]:
        sharded = bool(self._model.ddp_config.use_distributed_optimizer)
        return mcore_state.layout_of(self.topology, self.shape, sharded, self._neox.precision)

    def save(self, directory: Path, client_state: Mapping[str, Json]) -> Path:
        final = directory / f"step{self._steps:06d}"
        temporary = directory / f"{final.name}.tmp"
        with self._writing(directory):
            if self.topology.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        state = mcore_state.collect(self._inner, self._setup.torch_optimizers(self._optimizer), self._reference)
        with self._writing(directory):
            mcore_state.write_rank(temporary, self.topology.rank, state)
            note(temporary, self.topology.rank, [mcore_state.rank_file(temporary, self.topology.rank)])
        with self._writing(directory):
            if self.topology.rank == 0:
                meta: dict[str, Json] = {"format": checkpoint_files.FORMAT, "steps": self._steps, "layout": self._layout()}
                meta["client_state"] = dict(client_state)
                checkpoint_files.publish(temporary, final, meta)
                checkpoint_files.tidy(directory)
                checkpoint_files.prune(final, self._neox.keep_last_n_checkpoints)
        return final

    def load(self, directory: Path) -> dict[str, Json]:
        checkpoint = self._located(directory, checkpoint_files.find)
        meta = self._read_meta(checkpoint, self._layout())
        state = mcore_state.read_rank(checkpoint, self.topology.rank)
        self._reference = mcore_state.restore(state, self._inner, self._setup.torch_optimizers(self._optimizer))
        self._steps = int(meta["steps"])
        self.barrier()
        client: dict[str, Json] = meta["client_state"]
        return client

    def close(self) -> None:
        self._setup.leave_world()
