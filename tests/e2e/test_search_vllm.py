"""The search command against a real vLLM server with made-up weights: steps are typed, paid and repeatable, prefixes shared."""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from neox_rl.guard import guarded_popen, stop
from neox_rl.metacot import vocabulary
from neox_rl.problems.tokenizer import SymbolicTokenizer
from neox_rl.rollout.vllm_completions import TOP, CompletionsGenerator
from neox_rl.rollout.vllm_server import ServerSpec, core_ids, server_command, wait_ready
from neox_rl.run import search_cli
from neox_rl.run.endpoints import free_port
from neox_rl.search.strategies import STRATEGIES
from neox_rl.search.trees import read_trees
from neox_rl.types import NO_NODE, Completion, SamplingParams, Tree
from tests.unit.search_worlds import MAX_VALUE

MAX_LEN = 512


@dataclass
class Served:
    address: str
    model: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("search")
    tokenizer = SymbolicTokenizer(vocabulary(MAX_VALUE))
    tokenizer.save(home / "model")
    LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=MAX_LEN,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
        dtype="float32",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(home / "model")
    core = str(min(os.sched_getaffinity(0)))
    spec = ServerSpec(
        "server0", home / "model", "127.0.0.1", free_port("127.0.0.1"), "float32", MAX_LEN, max_num_seqs=64, cores=core, stats=True
    )
    argv, env = server_command(spec, os.environ)
    process = guarded_popen(argv, env, home / "server0.log", core_ids(core))
    try:
        asyncio.run(wait_ready(spec, process, 240.0))
        yield Served(spec.address, home / "model")
    finally:
        stop(process, 20.0)


def run(served: Served, rows: list[dict[str, Any]], home: Path, capsys: pytest.CaptureFixture[str], *args: str) -> tuple[list[Any], Any]:
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["--problems", str(home / "rows.jsonl"), "--server", served.address, "--model", str(served.model), *args]
    assert search_cli.main(command) == 0
    out, err = capsys.readouterr()
    return [json.loads(line) for line in out.splitlines()], json.loads(err.splitlines()[-1])["summary"]


ROWS = [{"numbers": numbers, "target": 17, "max_value": MAX_VALUE} for numbers in ([3, 5, 7], [2, 4, 9, 1], [1, 6, 8])]


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_what_a_policy_without_training_writes_is_refused_by_kind_within_the_budget(
    strategy: str, served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--strategy", strategy, "--budget-nodes", "20", "--budget-tokens", "300", "--width", "16", "--max-step-tokens", "8"]
    lines, _ = run(served, ROWS, tmp_path, capsys, *args, "--value", "heuristic")
    assert [line["id"] for line in lines] == ["line 1", "line 2", "line 3"]
    for line in lines:
        assert 16 <= line["tokens"] <= 300 and line["nodes"] <= 20 and line["end"] in ("exhausted", "budget", "solved")
        assert line["counts"].keys() <= {"empty", "too_long", "declined", "unparsable", "illegal", "repeated", "no_proposal"}
    assert sum(sum(line["counts"].values()) for line in lines) > 16


@pytest.mark.parametrize("value", ["monte-carlo", "judge"])
def test_values_by_the_policy_are_asked_and_paid(value: str, served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--strategy", "bfs", "--value", value, "--width", "3", "--max-step-tokens", "8", "--playouts", "2", "--playout-tokens", "16"]
    lines, summary = run(served, [{"problem": "3 5 7", "answer": "15"}], tmp_path, capsys, *args, "--cut-steps", "--budget-nodes", "6")
    assert lines[0]["nodes"] == 6 and lines[0]["tokens"] > 6 * 8 and summary["failed"] == 0


def test_a_served_language_model_is_asked_for_single_tokens_and_is_the_value_of_a_search(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its next-token log-probs are those by which it samples; nobody has trained this one, so what it says of a step is anything."""
    vocab_size = SymbolicTokenizer(vocabulary(MAX_VALUE)).vocab_size

    async def ask() -> tuple[list[tuple[float, ...]], list[Completion]]:
        async with CompletionsGenerator(served.address) as generator:
            prompts = [(5, 6, 7), (9, 8, 7, 6)]
            tops = await generator.next_token(prompts, range(vocab_size))
            return tops, [(await generator.sample(p, SamplingParams(1, temperature=0.0), 1, "one"))[0] for p in prompts]

    tops, greedy = asyncio.run(ask())
    for chances, completion in zip(tops, greedy, strict=True):
        assert sum(math.isfinite(c) for c in chances) >= TOP
        assert chances[completion.ids[0]] == pytest.approx(max(chances), abs=1e-5)  # several may share the first place
        assert all(c <= 0 for c in chances) and sum(math.exp(c) for c in chances) <= 1.0 + 1e-6
    args = ["--strategy", "best-first", "--value", "prm", "--prm-server", served.address, "--prm-model", str(served.model)]
    lines, summary = run(served, ROWS, tmp_path, capsys, *args, "--budget-nodes", "12", "--max-step-tokens", "8")
    assert summary["failed"] == 0 and all(line["end"] in ("exhausted", "budget", "solved") for line in lines)


def steps(tree: Tree) -> dict[tuple[tuple[int, ...], ...], set[tuple[int, ...]]]:
    """By what leads to a node, what was written after it."""
    paths: dict[int, tuple[tuple[int, ...], ...]] = {}
    found: dict[tuple[tuple[int, ...], ...], set[tuple[int, ...]]] = defaultdict(set)
    for node in tree.nodes:
        paths[node.id] = () if node.parent == NO_NODE else (*paths[node.parent], node.ids)
        if node.parent != NO_NODE:
            found[paths[node.parent]].add(node.ids)
    return found


def test_siblings_share_their_prefix_and_a_seed_repeats_the_search(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The prompt is of a few hundred tokens, as those of models that are not made for one task; each tree gets a prompt of its own."""
    rows = [{"problem": " ".join(str((7 * i * n + i + n) % 60) for i in range(300)), "answer": "1"} for n in range(4)]
    args = ["--strategy", "bfs", "--budget-nodes", "160", "--width", "4", "--max-step-tokens", "16", "--cut-steps"]
    lines, summary = run(served, rows, tmp_path, capsys, *args, "--trees", str(tmp_path / "a.jsonl"))
    assert summary["prefix_cache_hit_rate"] >= 0.9, summary
    again, _ = run(served, rows, tmp_path, capsys, *args, "--trees", str(tmp_path / "b.jsonl"), "--parallel", "1")
    assert [line["nodes"] for line in again] == [line["nodes"] for line in lines]
    first, second = (list(read_trees(tmp_path / name)) for name in ("a.jsonl", "b.jsonl"))
    # Batches of another size round differently: a draw at the edge of two tokens may fall otherwise, and all below it is another search.
    both = [(x[path], y[path]) for x, y in zip(map(steps, first), map(steps, second), strict=True) for path in x.keys() & y.keys()]
    assert sum(len(a & b) for a, b in both) > 0.95 * sum(len(a | b) for a, b in both) > 0
    assert all(len(node.logprobs) == len(node.ids) > 0 for tree in first for node in tree.nodes[1:])
