"""One training rank of the engine tests. Runs a list of cases, an engine each, and leaves what it found in files.

python engine_worker.py CASES.json OUTPUT_DIR     with RANK, WORLD_SIZE, MASTER_ADDR set
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from neox_rl.config.neox import NeoXConfig
from neox_rl.config.run import RunConfig
from neox_rl.config.schema import MetaRLConfig
from neox_rl.engines.base import RankEngine
from neox_rl.engines.registry import build_engine
from neox_rl.errors import WeightError
from neox_rl.run.endpoints import free_port
from tests.invariance.engine_batches import VOCAB, loss_fn, pack, sequences, split

LR = 3e-3


def build(case: dict[str, Any], out: Path, number: int = 0) -> RankEngine:
    """Rank 0 takes a port at the moment of use and tells the others: one reserved earlier is taken by somebody else by then."""
    notice = out / f"port{number}"
    if os.environ["RANK"] == "0":
        notice.with_suffix(".tmp").write_text(str(free_port("127.0.0.1")))
        notice.with_suffix(".tmp").rename(notice)
    deadline = time.monotonic() + 60.0
    while not notice.exists():
        assert time.monotonic() < deadline, f"rank 0 did not write {notice}"
        time.sleep(0.02)
    os.environ["MASTER_PORT"] = notice.read_text()
    metarl = MetaRLConfig(engine=case.get("engine", "megatron-core"), qkv_bias=case.get("qkv_bias", False))
    config = RunConfig(NeoXConfig(**case["neox"]), metarl, case.get("extra", {}))
    engine = build_engine(config, VOCAB)
    assert isinstance(engine, RankEngine)
    return engine


def own_microbatches(engine: RankEngine, case: dict[str, Any], step: int) -> list[Any]:
    dp = engine.topology.dp
    return split(sequences(step), dp * case.get("accumulate", 1))[engine.topology.dp_rank :: dp]


def logits(engine: RankEngine) -> torch.Tensor | None:
    """Full logits [T, vocab] of all sequences in one pack, on the last stage."""
    found: list[torch.Tensor] = []

    def keep(values: torch.Tensor, *_: Any) -> torch.Tensor:
        parts = [torch.empty_like(values) for _ in range(engine.topology.tp)]
        dist.all_gather(parts, values.contiguous(), group=engine._world.tp)
        found.append(torch.cat(parts, -1)[:, :VOCAB])
        return values.sum()

    with torch.no_grad():
        engine._forward(split(sequences(), 1), keep)
    return found[0] if found else None


def train(engine: RankEngine, case: dict[str, Any], steps: range) -> list[list[float]]:
    reports = [engine.step(own_microbatches(engine, case, step), loss_fn, LR) for step in steps]
    return [[r.loss, r.grad_norm, r.metrics["entropy"], r.metrics["logprob"], r.tokens] for r in reports]


def export(case: dict[str, Any], out: Path) -> None:
    """A model with no special values: norms and biases, which start at 1 and 0, are trained away from them first, at a high rate."""
    engine = build(case, out)
    for step in range(3):
        engine.step(own_microbatches(engine, case, step), loss_fn, 0.03)
    engine.save_hf(out / "hf")
    np.savez(out / "tensors.npz", **{name: tensor.numpy() for name, tensor in engine.named_tensors()})
    engine.close()


def parity(case: dict[str, Any], out: Path) -> None:
    """Logits of given weights, three steps, and the weights they lead to."""
    engine = build(case, out)
    exact = True
    if "load_hf" in case:
        engine.load_hf(Path(case["load_hf"]))
        given, back = load_file(Path(case["load_hf"]) / "model.safetensors"), dict(engine.named_tensors())
        exact = not back or (back.keys() == given.keys() and all(torch.equal(back[name], given[name]) for name in given))
    before = logits(engine)
    engine.set_reference()
    reports = train(engine, case, range(3))
    after = engine.logprobs(split(sequences(), 2))
    reference = engine.logprobs(split(sequences(), 2), "reference", temperature=0.7)
    tensors = {f"w.{name}": tensor.float().numpy() for name, tensor in engine.named_tensors()}
    top = engine.topology
    if before is not None and top.tp_rank == top.dp_rank == 0:
        np.save(out / "logits.npy", before.float().numpy())
    np.savez(out / f"rank{top.rank}.npz", reports=reports, after=after, reference=reference, exact=exact, **tensors)
    engine.close()


def sparse(case: dict[str, Any], out: Path) -> None:
    """Three steps of which every sequence is in one micro-batch of the first data-parallel rank: all other micro-batches are empty."""
    engine = build(case, out)
    reports = []
    for step in range(3):
        given = sequences(step)
        whole, empty = pack(given, 136, given), pack([], 136, given)
        microbatches = [whole if engine.topology.dp_rank == 0 else empty, *[empty] * (case["accumulate"] - 1)]
        logprobs = engine.logprobs(microbatches)
        assert [len(found) for found in logprobs] == [136] * case["accumulate"]
        reports.append(engine.step(microbatches, loss_fn, LR))
    rows = [[r.loss, r.grad_norm, r.metrics["entropy"], r.metrics["logprob"], r.tokens] for r in reports]
    np.save(out / f"rank{engine.topology.rank}.npy", np.array(rows))
    engine.close()


def first_step(case: dict[str, Any], out: Path) -> None:
    """Log-probs under given weights, one step, and the next weights."""
    engine = build(case, out)
    engine.load_hf(Path(case["load_hf"]))
    logprobs = engine.logprobs(split(sequences(), 2))
    report = train(engine, case, range(1))[0]
    tensors = {f"w.{name}": tensor.numpy() for name, tensor in engine.named_tensors()}
    np.savez(out / f"rank{engine.topology.rank}.npz", logprobs=logprobs, report=report, **tensors)
    engine.close()


def loss_scale(engine: RankEngine) -> float:
    return float(getattr(getattr(getattr(engine, "_engine", None), "optimizer", None), "loss_scale", 1.0))


def resume(case: dict[str, Any], out: Path) -> None:
    """Four steps in one go, against two steps, save, another process state, load, two steps."""
    engine = build(case, out)
    train(engine, case, range(2))
    engine.set_reference()
    kept = engine.logprobs(split(sequences(), 2))
    engine.save(out / "ckpt", {"cursor": 17, "note": "é"})
    scales = [loss_scale(engine)]
    whole = train(engine, case, range(2, 4))
    tensors = {f"w.{name}": tensor.float().numpy() for name, tensor in engine.named_tensors()}
    engine.close()
    engine = build(case, out, 1)
    client = engine.load(out / "ckpt")
    scales.append(loss_scale(engine))
    continued = train(engine, case, range(2, 4))
    again = {f"r.{name}": tensor.float().numpy() for name, tensor in engine.named_tensors()}
    reference = engine.logprobs(split(sequences(), 2), "reference")
    ok = client == {"cursor": 17, "note": "é"}
    policies = {"kept": kept, "reference": reference}
    found = {"whole": whole, "continued": continued, "client": ok, "scales": scales, **policies}
    np.savez(out / f"rank{engine.topology.rank}.npz", **found, **tensors, **again)
    engine.close()


def round_trip(case: dict[str, Any], out: Path) -> None:
    """HF weights to a checkpoint of the engine, and from there to HF by another engine."""
    engine = build(case, out)
    engine.load_hf(Path(case["load_hf"]))
    engine.save(out / "ckpt", {})
    engine.close()
    engine = build(case, out, 1)
    engine.load(out / "ckpt")
    engine.save_hf(out / "hf")
    engine.close()


def foreign(case: dict[str, Any], out: Path) -> None:
    """A checkpoint without our meta data, as GPT-NeoX's own training leaves it, in another engine."""
    engine = build(case, out)
    train(engine, case, range(2))
    path, saved = engine.save(out / "ckpt", {}), {f"w.{name}": tensor.numpy() for name, tensor in engine.named_tensors()}
    engine.close()
    if engine.topology.rank == 0:
        (path / "meta.json").unlink()
    engine = build({**case, "neox": {**case["neox"], **case.get("then", {})}}, out, 1)
    said = ""
    try:
        engine.load(out / "ckpt")
    except WeightError as error:
        said = str(error)
    found = {f"r.{name}": tensor.numpy() for name, tensor in engine.named_tensors()}
    np.savez(out / f"rank{engine.topology.rank}.npz", said=said, **saved, **found)
    engine.close()


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for case in cases:
        directory = out / case["name"]
        directory.mkdir(parents=True, exist_ok=True)
        kinds = {
            "export": export,
            "parity": parity,
            "sparse": sparse,
            "first_step": first_step,
            "resume": resume,
            "round_trip": round_trip,
            "foreign": foreign,
        }
        kinds[case["kind"]](case, directory)


if __name__ == "__main__":
    main()
