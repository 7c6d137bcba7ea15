"""One training rank of the prefix tests: the same step trace by trace and as prefix trees, from the same weights.

python prefix_worker.py CASES.json OUTPUT_DIR     with RANK, WORLD_SIZE, MASTER_ADDR set
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neox_rl.batch.packing import Layout
from neox_rl.batch.types import MicroBatch
from neox_rl.engines.base import RankEngine
from neox_rl.loss.metrics import finalize
from neox_rl.loss.policy import make_loss_fn
from tests.invariance.engine_worker import build
from tests.invariance.prefix_batches import OBJECTIVES, STEP, TEMPERATURE, batch

PACK_TOKENS = 256


def own_microbatches(engine: RankEngine, objective: str, share: bool, case: dict[str, Any]) -> tuple[MicroBatch, ...]:
    top = engine.topology
    made = batch(objective, share, Layout(PACK_TOKENS, top.dp, top.tp, case["accumulate"]), case["groups"])
    return made.microbatches[top.dp_rank]


def trained_logprobs(engine: RankEngine, microbatches: tuple[MicroBatch, ...]) -> np.ndarray[Any, Any]:
    """[terms, 2] of (sequence, log-prob) in the order of the sequences' tokens; the terms without a weight are left out."""
    found = engine.logprobs(microbatches, temperature=TEMPERATURE)
    pairs = [
        np.stack([m.sequence_index[m.loss_weight != 0], values[m.loss_weight != 0]], 1)
        for m, values in zip(microbatches, found, strict=True)
    ]
    joined = np.concatenate(pairs)
    return joined[np.argsort(joined[:, 0], kind="stable")]


def compare(case: dict[str, Any], out: Path) -> None:
    engine = build(case, out)
    engine.load_hf(Path(case["load_hf"]))
    engine.set_reference()
    results: dict[str, Any] = {}
    for objective, cfg in OBJECTIVES.items():
        for name, share in (("flat", False), ("trees", True)):
            microbatches = own_microbatches(engine, objective, share, case)
            results[f"{objective}.{name}.logprobs"] = trained_logprobs(engine, microbatches)
            # A reference policy that differs: the same weights at another temperature.
            reference = engine.logprobs(microbatches, "reference", temperature=1.0)
            given = [m.with_logprobs(reference=r) for m, r in zip(microbatches, reference, strict=True)]
            report = engine.step(given, make_loss_fn(cfg, STEP - 1), lr=0.0, temperature=TEMPERATURE)
            metrics = finalize(report.metrics)
            results[f"{objective}.{name}.report"] = [report.loss, report.grad_norm, report.tokens, *(metrics[k] for k in sorted(metrics))]
            gradient = [p.main_grad.flatten() for p in engine._parts.parameters]  # type: ignore[attr-defined]
            results[f"{objective}.{name}.gradient"] = torch.cat(gradient).clone().numpy()
            results[f"{objective}.{name}.rows"] = len(microbatches) * len(microbatches[0])
    np.savez(out / f"rank{engine.topology.rank}.npz", **results)
    engine.close()


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for case in cases:
        directory = out / case["name"]
        directory.mkdir(parents=True, exist_ok=True)
        compare(case, directory)


if __name__ == "__main__":
    main()
