"""The seam between the training loop and whoever owns the model: one protocol, any number of engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from neox_rl.batch.types import MicroBatch
from neox_rl.types import Json

Policy = Literal["current", "reference"]


@dataclass(frozen=True)
class Topology:
    """This process among the training ranks. ``device`` is ``cpu`` or ``cuda:<n>``."""

    rank: int
    world_size: int
    tp: int
    pp: int
    dp: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    device: str


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, global: equal on every rank.

    ``loss`` is the sum over all micro-batches and data-parallel ranks, ``grad_norm`` the L2 norm before clipping, ``tokens`` the
    number of tokens with a loss weight other than 0, ``metrics`` the sums of what the loss function returned.
    """

    loss: float
    grad_norm: float
    lr: float
    tokens: int
    metrics: dict[str, float]


class LossFn(Protocol):
    """The objective of one micro-batch."""

    def __call__(self, logprobs: Tensor, entropy: Tensor, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """From log p(target) [N] and entropy [N] (fp32, with gradient): the scalar loss sum, and sums to report.

        The weights of the batch are normalized over the global batch already: nothing is divided afterwards.
        """
        ...


class Engine(Protocol):
    """A model, its optimizer and its parallel layout. Every method but ``topology`` is collective: all ranks call it."""

    on_retry: Callable[[int], None]
    """Called with the tries so far when one of ``step`` overflowed its precision and another begins: each may take as long as a step."""

    @property
    def topology(self) -> Topology: ...

    def step(self, microbatches: Sequence[MicroBatch], loss_fn: LossFn, lr: float, temperature: float = 1.0) -> StepReport:
        """One optimizer step over this data-parallel rank's micro-batches, all of one length. Loss and gradient are plain sums."""
        ...

    def logprobs(
        self, microbatches: Sequence[MicroBatch], which: Policy = "current", temperature: float = 1.0
    ) -> list[NDArray[np.float32]]:
        """log p(target) [N] of the terms of each micro-batch, without gradient, on every rank of the pipeline."""
        ...

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Weights under HF names in full HF shapes on the CPU, on rank 0; the other ranks take part and yield nothing.

        Every rank must exhaust the iterator.
        """
        ...

    def hf_config(self) -> dict[str, Json]:
        """The content of ``config.json``."""
        ...

    def load_hf(self, directory: Path) -> None:
        """Takes the weights of an HF checkpoint (safetensors). Optimizer state starts anew. Raises WeightError."""
        ...

    def save_hf(self, directory: Path) -> None:
        """Writes ``config.json`` and safetensors; tokenizer files are the caller's, and so are the ids of EOS and padding, which stay as
        a ``config.json`` there says them. Raises DiskFullError like ``save``."""
        ...

    def save(self, directory: Path, client_state: Mapping[str, Json]) -> Path:
        """Writes a checkpoint below ``directory`` atomically and returns its path.

        Raises DiskFullError, on every rank, where one of them has no room: earlier checkpoints are whole, and it may be called again.
        """
        ...

    def load(self, directory: Path) -> dict[str, Json]:
        """Continues bit-exactly from the newest checkpoint below ``directory`` (or from that checkpoint); the client state."""
        ...

    def set_reference(self) -> None:
        """Freezes a copy of the current weights as the reference policy of the KL term."""
        ...

    def broadcast_bytes(self, data: bytes | None) -> bytes:
        """Rank 0's bytes on every rank. ``data`` is read on rank 0 only."""
        ...

    def barrier(self) -> None: ...

    def close(self) -> None: ...
