"""Changes to megatron-core, GPT-NeoX and DeepSpeed made from outside, one file a seam. Nothing happens at import: call :func:`apply`."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_patches import (
    collectives,
    deepspeed_fp16,
    deepspeed_scale,
    deepspeed_shm,
    neox_layers,
    neox_package,
    neox_pkg_resources,
    optimizers,
    pipeline,
)
from megatron_patches.registry import Patch, PatchError, check, resolve

__all__ = ["GPT_NEOX", "MEGATRON_CORE", "PATCHES", "Patch", "PatchError", "add_own", "apply", "quiet"]

MEGATRON_CORE: tuple[Patch, ...] = (collectives.PATCH, pipeline.PATCH, optimizers.PATCH)
GPT_NEOX: tuple[Patch, ...] = (
    neox_pkg_resources.PATCH,
    neox_package.PATCH,
    neox_layers.PATCH,
    deepspeed_shm.PATCH,
    deepspeed_fp16.PATCH,
    deepspeed_scale.PATCH,
)
PATCHES: tuple[Patch, ...] = MEGATRON_CORE + GPT_NEOX

_applied: set[str] = set()
_own: list[Patch] = []
_lock = threading.Lock()


@contextmanager
def quiet() -> Iterator[None]:
    """Silences what megatron-core says on a dozen occasions while it is imported and built: that it found no Transformer Engine."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?i).*(transformer engine|apex|full scope is deprecated|CUDA_DEVICE_MAX_CONNECTIONS)")
        yield


def add_own(patches: tuple[Patch, ...]) -> None:
    """Patches that come with a run: each is applied behind the next set of its upstream's (DeepSpeed's: behind either)."""
    _own.extend(patch for patch in patches if patch not in _own)


def apply(patches: tuple[Patch, ...] = MEGATRON_CORE) -> tuple[str, ...]:
    """Applies what this machine needs of ``patches`` and of the run's own, each once a process; names those applied. Raises PatchError."""
    with _lock, quiet():
        of_engine = {patch.upstream for patch in patches} | {"deepspeed"}
        for patch in (*patches, *(patch for patch in _own if patch.upstream in of_engine)):
            if patch.name in _applied or (patch.cpu_only and torch.cuda.is_available()):
                continue
            check(patch)
            patch.apply(tuple(resolve(symbol) for symbol in patch.sources))
            _applied.add(patch.name)
        return tuple(patch.name for patch in patches if patch.name in _applied)
