"""Prefix trees are trained as their traces are one by one: log-probs, loss, metrics and every gradient, in every parallel layout.

Log-probs are also held against transformers on each trace alone. What is not covered: CUDA, bf16, the engine gpt-neox, which refuses trees.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from neox_rl.engines.packed import pack_layout
from tests.invariance.launching import run_ranks
from tests.invariance.prefix_batches import OBJECTIVES, TEMPERATURE, Layout, batch, groups
from tests.invariance.test_engine_layouts import FAMILIES, LAYOUTS

CASES = [("one", "llama"), ("one", "pythia"), ("accumulate4", "llama"), ("tp2_sp_recompute", "llama"), ("pp2", "llama"), ("dp2", "llama")]
SPARSE = [("accumulate4-sparse", "llama"), ("pp2-sparse", "llama"), ("dp2-sparse", "llama")]
"""One group, whose tree is kept whole: all micro-batches but one are empty, with ``dp2`` all of a rank's."""
ALL_CASES = [*CASES, *SPARSE]
SIGNIFICANT = 0.05


def chosen(layout: str) -> list[int]:
    return [1] if layout.endswith("-sparse") else [group.ticket for group in groups()]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prefixes")
    run_ranks(1, [{"name": f"export-{f}", "kind": "export", "neox": FAMILIES[f]} for f in ("llama", "pythia")], out)
    for world in (1, 2):
        cases = [
            {
                "name": f"{layout}-{family}",
                "neox": {**FAMILIES[family], **keys},
                "accumulate": accumulate,
                "groups": chosen(layout),
                "load_hf": str(out / f"export-{family}" / "hf"),
            }
            for layout, family in ALL_CASES
            for ranks, keys, accumulate in [LAYOUTS[layout.removesuffix("-sparse")]]
            if ranks == world
        ]
        run_ranks(world, cases, out, worker="tests.invariance.prefix_worker")
    return out


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("layout", "family"), ALL_CASES)
def test_trees_and_traces_give_one_loss_and_one_gradient(found: Path, layout: str, family: str, objective: str) -> None:
    ranks = sorted((found / f"{layout}-{family}").glob("rank*.npz"))
    assert len(ranks) == LAYOUTS[layout.removesuffix("-sparse")][0]
    for path in ranks:
        data = np.load(path)
        flat, trees = ({what: data[f"{objective}.{name}.{what}"] for what in ("report", "gradient", "rows")} for name in ("flat", "trees"))
        np.testing.assert_allclose(trees["report"], flat["report"], rtol=1e-5, atol=1e-6)
        norm = np.linalg.norm(flat["gradient"])
        assert norm > SIGNIFICANT and np.linalg.norm(trees["gradient"] - flat["gradient"]) <= 1e-5 * norm
        assert layout.endswith("-sparse") or trees["rows"] < 0.7 * flat["rows"]


@pytest.mark.parametrize(("layout", "family"), ALL_CASES)
def test_log_probs_in_a_tree_are_those_of_each_trace_alone(found: Path, layout: str, family: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(found / f"export-{family}" / "hf", dtype=torch.float32)
    expected: list[tuple[int, float]] = []
    for number, trace in enumerate(t for group in groups() if group.ticket in chosen(layout) for t in group.traces):
        ids = torch.tensor([i for s in trace.segments for i in s.ids])
        with torch.no_grad():
            logp = (model(ids[None]).logits[0] / TEMPERATURE).log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0].tolist()
        versions = [s.version for s in trace.segments for _ in s.ids][1:]
        # Step 5 trains version 4, S = 2: older tokens have no weight.
        expected += [(number, value) for value, version in zip(logp, versions, strict=True) if version >= 2]
    by_rank = [np.load(path)["ppo.trees.logprobs"] for path in sorted((found / f"{layout}-{family}").glob("rank*.npz"))]
    seen = np.concatenate(by_rank) if layout.startswith("dp2") else by_rank[0]
    for other in by_rank[1:] if not layout.startswith("dp2") else []:
        np.testing.assert_array_equal(other, seen)
    seen = seen[np.argsort(seen[:, 0], kind="stable")]
    np.testing.assert_allclose(seen, np.array(expected), atol=1e-5, rtol=1e-5)


def test_the_trees_have_every_kind_of_attention_block() -> None:
    (micro,) = batch("ppo", True, Layout(1024)).microbatches[0]
    layout = pack_layout(micro.positions)
    assert {seen is None for seen in layout.seen} == {True, False} and layout.shared


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("layout", [layout.removesuffix("-sparse") for layout, _ in SPARSE])
def test_all_micro_batches_but_one_are_empty_where_the_name_says_so(layout: str, objective: str) -> None:
    world, keys, accumulate = LAYOUTS[layout]
    ranks = world // keys.get("pipe_parallel_size", 1)
    made = batch(objective, True, Layout(1024, ranks, 1, accumulate), chosen("-sparse"))
    assert [[bool(micro.loss_weight.any()) for micro in rank].count(True) for rank in made.microbatches] == [1, 0][:ranks]
    assert all(len(rank) == accumulate for rank in made.microbatches)
