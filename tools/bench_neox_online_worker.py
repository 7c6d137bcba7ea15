"""GPT-NeoX's own online REINFORCE in one process, as its train.py starts it: ``bench_neox_online_worker.py JOB.json``.

Not a line of the checkout is edited. Without CUDA this process stands in for it from outside: names of ``torch.cuda`` that GPT-NeoX asks
for are the CPU's, and its Adam, which is compiled for CUDA, is torch's. When each optimizer step ended goes to ``times.json``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

import megatron_patches


def without_cuda() -> None:
    """What `megatron_patches` leaves to CUDA, because this project does not call it: counters, timers, data loaders, Adam."""
    import deepspeed.ops.adam
    from megatron import training

    nothing = {"synchronize": lambda *_: None, "current_device": lambda: "cpu", "set_device": lambda _: None}
    for name, stand_in in {"LongTensor": torch.LongTensor, **nothing}.items():
        setattr(torch.cuda, name, stand_in)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(torch.cuda, name, lambda *_: 0)
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    deepspeed.ops.adam.FusedAdam = torch.optim.AdamW
    training.initialize_megatron = partial(training.initialize_megatron, allow_no_cuda=True)


def timed(train_step: Any, times: Path) -> Any:
    """Writes when each step ended, and what it reported."""
    rows: list[dict[str, float]] = []

    def step(**arguments: Any) -> Any:
        rows.append({"begin": time.time()})
        reported, skipped = train_step(**arguments)
        rows[-1] |= {"end": time.time(), **{name: float(value) for name, value in reported.items()}}
        times.write_text(json.dumps(rows))
        return reported, skipped

    return step


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    megatron_patches.apply(megatron_patches.GPT_NEOX)
    from megatron import training
    from megatron.data import data_utils
    from megatron.neox_arguments import NeoXArgs

    data_utils.compile_helper = lambda: None  # writes into the checkout, and online data does not need it

    if not torch.cuda.is_available():
        without_cuda()
    args = NeoXArgs.from_dict(job["arguments"])
    args.configure_distributed_args()
    args.build_tokenizer()
    training.train_step = timed(training.train_step, Path(job["times"]))
    training.pretrain(neox_args=args)


if __name__ == "__main__":
    main()
