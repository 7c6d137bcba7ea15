"""Trees as files, the picture of a tree, and the command: what it prints, what it refuses."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neox_rl.errors import WireError
from neox_rl.problems.tokenizer import DirectoryTokenizer
from neox_rl.run import search_cli, search_server
from neox_rl.run.search_server import METRICS_BYTES, cache_counters
from neox_rl.search.arithmetic_domain import ArithmeticDomain
from neox_rl.search.growth import Budget
from neox_rl.search.search import Search
from neox_rl.search.strategies import STRATEGIES
from neox_rl.search.strategy import Options
from neox_rl.search.trees import read_tree, read_trees, tree_line, write_trees
from neox_rl.search.values import HeuristicValue
from neox_rl.types import NO_NODE, End, Node, Reason, Tree, Verdict, VersionSpan
from neox_rl.verify.verifier import ArithmeticVerifier
from tests.unit.search_worlds import TOKENIZER, RandomPlayer, countdown, policy
from tests.unit.test_search_scorers import server

ROOT = Path(__file__).resolve().parents[2]


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


view_tree = tool("view_tree")


def grown(target: int = 17, strategy: str = "mcts") -> Tree:
    made = Search(strategy, ArithmeticDomain, Options(3))
    return asyncio.run(made.run(countdown([2, 4, 9, 1], target), policy(RandomPlayer()), HeuristicValue(), Budget(40)))


TREE = grown()
HOSTILE = "</svg><script>alert(1)</script>\x1b[31m\u202e$x_{$"


def test_trees_are_written_and_read_as_they_are(tmp_path: Path) -> None:
    trees = [grown(target, strategy) for target, strategy in ((17, "mcts"), (59, "dfs"), (3, "best-of-n"))]
    write_trees(tmp_path / "trees.jsonl", trees)
    assert list(read_trees(tmp_path / "trees.jsonl")) == trees
    assert trees[0].nodes[1].ids and trees[0].nodes[1].versions == (3, 3) and trees[0].counts


def row(**changes: Any) -> bytes:
    return json.dumps({**json.loads(tree_line(TREE)), **changes}).encode()


def node(index: int, **changes: Any) -> bytes:
    data = json.loads(tree_line(TREE))
    data["nodes"][index] |= changes
    return json.dumps(data).encode()


BAD_TREES = {
    "no JSON": b"{",
    "deep": b"[" * 100_000,
    "a list": b"[]",
    "no nodes": row(nodes=[]),
    "an unknown field": row(color="red"),
    "an unknown end": row(end="happy"),
    "an answer that is no node": row(answer=10_000),
    "a cost below 0": row(num_tokens=-1),
    "a count below 0": row(counts={"x": -1}),
    "a loop": node(2, parent=2),
    "a parent to come": node(1, parent=5),
    "two roots": node(1, parent=NO_NODE),
    "a root with a parent": node(0, parent=0),
    "a wrong id": node(3, id=7),
    "the same order twice": node(3, order=1),
    "a value above 1": node(1, value=1.5),
    "an exact value above 1": node(1, exact=1.5),
    "made after a node to come": node(2, seen=3),
    "visits below 0": node(1, visits=-1),
    "a log-prob missing": node(1, logprobs=[-1.0]),
    "a negative token": node(1, ids=[-1, 2, 3]),
    "a token beyond int32": node(1, ids=[2**31, 2, 3]),
    "spans with a gap": node(1, spans=[[1, 1, 3]]),
    "an empty span": node(1, spans=[[1, 0, 0], [1, 0, 3]]),
    "a version that falls": node(1, spans=[[4, 0, 1], [3, 1, 3]]),
    "no version": node(1, spans=[[-1, 0, 3]]),
    "no word of an exact value": tree_line(TREE).replace(b',"exact":null', b"", 1),
    "text that is a number": node(1, text=3),
    "a fraction of a visit": node(1, visits=1.5),
    "NaN": tree_line(TREE).replace(b'"value":', b'"value":NaN,"v":', 1),
    "not UTF-8": tree_line(TREE).replace(b"countdown", b"\xff\xfe"),
}


@pytest.mark.parametrize("case", BAD_TREES)
def test_what_is_no_tree_is_refused_with_its_line(case: str, tmp_path: Path) -> None:
    path = tmp_path / "trees.jsonl"
    path.write_bytes(tree_line(TREE) + b"\n\n" + BAD_TREES[case] + b"\n")
    read = read_trees(path)
    assert next(read) == TREE
    with pytest.raises(WireError, match=r"trees\.jsonl:3"):
        next(read)


@settings(deadline=None)
@given(st.binary(max_size=300), st.integers(0, 5000))
def test_no_bytes_make_the_reader_fail_in_another_way(noise: bytes, at: int) -> None:
    line = tree_line(TREE)
    with contextlib.suppress(WireError):
        read_tree(line[:at] + noise + line[at + len(noise) :])


@pytest.mark.parametrize("change", [{"value": math.nan}, {"spans": (VersionSpan(1, 0, 9),)}])
def test_a_tree_that_could_not_be_read_is_not_written(change: dict[str, Any]) -> None:
    nodes = (TREE.nodes[0], replace(TREE.nodes[1], **change))
    with pytest.raises(WireError, match="node 1"):
        tree_line(Tree("p", nodes))


def test_the_text_view_shows_every_node_its_statistics_and_the_path(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tree = next(t for target in range(1, 60) if (t := grown(target)).end is End.SOLVED and len(t.path(t.answer)) > 1)
    write_trees(tmp_path / "t.jsonl", [TREE, tree])
    assert view_tree.main([str(tmp_path / "t.jsonl"), "--problem", tree.problem_id]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert tree.problem_id in head and "solved" in head and len(lines) == len(tree.nodes) - 1
    starred = [line for line in lines if line.startswith("*")]
    assert all(view_tree.worded(node.text) in line for node, line in zip(tree.path(tree.answer), starred, strict=True))
    assert "right" in starred[-1]
    assert view_tree.main([str(tmp_path / "t.jsonl"), "--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_picture_gathers_the_wrong_ends_of_a_step_and_words_fractions() -> None:
    wrong, right = Verdict(False, "1", Reason.MISMATCH, 0.0), Verdict(True, "24", Reason.MATCH, 0.0)
    ends = [Node(i, 1, f"2 +{i} ={i + 2}", i, value=0.0, visits=1, verdict=wrong) for i in range(2, 7)]
    nodes = (
        Node(0, -1, "", 0),
        Node(1, 0, "11 /5/4 =44/5", 1),
        *ends,
        Node(7, 1, "12 *2 =24", 7, verdict=right),
        Node(8, 0, "a", 8, verdict=wrong),
    )
    tree = Tree("hand", nodes, End.SOLVED, answer=7)
    boxes = view_tree.layout(tree, 100)
    assert [box.text for box in boxes] == ["hand", "11 / (5/4) = 44/5", "5 wrong ends", "12 * 2 = 24", "a"]
    assert boxes[2].hover.split("\n") == [f"2 + {i} = {i + 2}" for i in range(2, 7)] and boxes[2].numbers.endswith("#2 to #6")
    assert len(view_tree.layout(tree, 100, every_end=True)) == len(nodes)


def test_pictures_of_a_hostile_tree_are_pictures(tmp_path: Path) -> None:
    nodes = (Node(0, -1, "", 0), Node(1, 0, HOSTILE, 1, value=1.0), *(Node(i, i - 1, "x" * 999, i) for i in range(2, 400)))
    write_trees(tmp_path / "t.jsonl", [Tree(HOSTILE, nodes)])
    assert view_tree.main([str(tmp_path / "t.jsonl"), "--html", str(tmp_path / "t.html")]) == 0
    page = (tmp_path / "t.html").read_text(encoding="utf-8")
    assert "<script" not in page and "\x1b" not in page and "\u202e" not in page
    svg = ElementTree.fromstring(page[page.index("<svg") : page.index("</html>")])
    assert len(svg.findall("{http://www.w3.org/2000/svg}g")) == 400
    assert view_tree.main([str(tmp_path / "t.jsonl"), "--png", str(tmp_path / "t.png"), "--max-nodes", "20"]) == 0
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "t.png").stat().st_size > 5_000
    assert "\x1b" not in view_tree.as_text(Tree(HOSTILE, nodes), 2000)


@pytest.mark.parametrize("content", [b"", b"{}\n", None])
def test_a_file_without_a_tree_is_one_line_of_error(content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        view_tree.main([str(path)])
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [[], ["--list"]])
def test_whoever_reads_a_part_of_a_tree_is_not_told_of_a_broken_pipe(arguments: list[str], tmp_path: Path) -> None:
    write_trees(tmp_path / "t.jsonl", [TREE])
    command = [sys.executable, str(ROOT / "tools" / "view_tree.py"), str(tmp_path / "t.jsonl"), *arguments]
    reads, writes = os.pipe()
    os.close(reads)  # as head does once it has what it wants
    with os.fdopen(writes, "wb") as pipe:
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, timeout=240, check=False)
    assert (done.returncode, done.stderr) == (1, b"")


ROWS = [
    {"numbers": [4, 9, 10, 13]},
    {"nums": [1, 3, 4, 6], "target": 24},
    {"numbers": [1, 1, 1, 1]},
    {"numbers": [3, 5, 7], "target": 26, "max_value": 60, "id": "own"},
    {"numbers": [24]},
    "not JSON",
    {"numbers": [1, "x"]},
    {"numbers": list(range(40))},
    {"numbers": [1, 2, 3], "target": -4},
    {"problem": "What is 1+1?", "answer": "2"},
    [],
]


def run(args: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, list[dict[str, Any]], dict[str, Any]]:
    code = search_cli.main(args)
    out, err = capsys.readouterr()
    return code, [json.loads(line) for line in out.splitlines()], json.loads(err.splitlines()[-1])["summary"]


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in ROWS) + "\n\n")
    return path


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_the_command_prints_one_line_a_problem_in_the_order_of_the_file(
    strategy: str, problems: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trees = tmp_path / "trees.jsonl"
    args = ["--strategy", strategy, "--value", "oracle", "--problems", str(problems), "--budget-nodes", "800", "--trees", str(trees)]
    width = ["--width", "250"] if strategy == "best-of-n" else []
    code, lines, summary = run(args + width, capsys)
    assert code == 0 and [line["id"] for line in lines] == [f"line {n}" if n != 4 else "own" for n in range(1, 12)]
    assert [line["solved"] for line in lines[2:5]] == [False, True, True]
    assert strategy == "best-of-n" or (lines[0]["solved"] and lines[1]["solved"]), "by chance alone 6 / (1 - 3/4) is rarely found"
    assert [line["end"] for line in lines[5:]] == ["malformed"] * 6 and all(line["error"] for line in lines[5:])
    for line, row_ in zip(lines[:2], ROWS[:2], strict=True):
        numbers = row_.get("numbers") or row_["nums"]  # type: ignore[union-attr]
        assert not line["solved"] or ArithmeticVerifier().check_sync(countdown(numbers, 24), line["answer"]).correct
    assert lines[2]["answer"] is None and lines[0]["tokens"] >= 3 * lines[0]["nodes"] > 0
    assert summary["problems"] == 11 and summary["malformed"] == 6 and summary["nodes"] == sum(line["nodes"] for line in lines)
    written = list(read_trees(trees))
    assert [tree.problem_id for tree in written] == [line["id"] for line in lines[:5]]
    assert [len(tree.nodes) - 1 for tree in written] == [line["nodes"] for line in lines[:5]]
    again = run([*args, *width, "--parallel", "1"], capsys)[1]
    assert again == lines


@pytest.mark.parametrize(
    "line", [r'{"id":"\ud800","numbers":[1,2,3]}', r'{"problem":"\ud83d","answer":"1"}', r'{"numbers":["\udfff",2],"target":3}']
)
def test_half_of_a_surrogate_pair_spoils_its_own_row_alone(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n" + r'{"id":"\ud83d\ude00","numbers":[1,2,3],"target":6}' + "\n")
    status, lines, summary = run(["--strategy", "dfs", "--problems", str(path), "--budget-nodes", "800"], capsys)
    assert (
        status == 0 and [at["end"] for at in lines] == ["malformed", "solved"] and lines[1]["solved"] and "surrogate" in lines[0]["error"]
    )
    assert lines[1]["id"] == "\U0001f600", "both halves are one character"
    assert summary["malformed"] == 1 and json.dumps(lines, ensure_ascii=False).encode()


@pytest.mark.parametrize("value", ["none", "heuristic", "monte-carlo"])
def test_every_value_that_needs_no_model_works_without_one(value: str, problems: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--strategy", "best-first", "--problems", str(problems), "--budget-nodes", "3000", "--playouts", "2", "--sees-earlier"]
    _, lines, _ = run([*args, "--value", value], capsys)
    assert [line["solved"] for line in lines[:5]] == [True, True, False, True, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--budget-nodes", "-1"], "budget of -1 nodes"),
        (["--width", "0"], "width 0"),
        (["--parallel", "0"], "--parallel 0"),
        (["--problems", "missing.jsonl"], "missing.jsonl"),
        (["--template", "missing.txt"], "missing.txt"),
        (["--value", "judge"], "--server"),
        (["--value", "prm"], "--prm-server"),
        (["--server", "http://127.0.0.1:1"], "--model"),
        (["--trees", "missing/trees.jsonl"], "--trees missing/trees.jsonl: No such file or directory; give a file"),
        (["--trees", "."], "--trees .: Is a directory; give a file"),
        (["--strategy", "TYPO"], "strategy = 'TYPO': is none of"),
        (["--strategy", "os:getcwd"], "strategy = 'os:getcwd': TypeError: "),
        (["--strategy", "builtins:repr"], "without distinct, reads_values, pick, add"),
        (["--strategy", "TYPO", "--server", "http://127.0.0.1:1", "--model", "missing"], "strategy = 'TYPO'"),
        (["--trees", ".", "--server", "http://127.0.0.1:1", "--model", "missing"], "--trees .: Is a directory"),
        (["--prune", "nan"], "prune nan"),
        (["--exploration", "nan"], "exploration nan"),
    ],
)
def test_what_cannot_be_used_is_one_message_and_status_2(
    changes: list[str], message: str, problems: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        search_cli.main(["--strategy", "dfs", "--problems", str(problems), "--budget-nodes", "5", *changes])
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["problems", "template"])
def test_trees_do_not_replace_what_is_read(name: str, problems: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read = {"problems": problems, "template": problems.with_name("template.txt")}
    read["template"].write_text("{numbers} -> {target}")
    before = read[name].read_bytes()
    trees = ["--trees", f"{read[name].parent}/./{read[name].name}", "--template", str(read["template"])]
    with pytest.raises(SystemExit) as stop:
        search_cli.main(["--strategy", "dfs", "--problems", str(problems), "--budget-nodes", "5", *trees])
    assert stop.value.code == 2 and f"is the file of --{name}" in capsys.readouterr().err and read[name].read_bytes() == before


@pytest.mark.parametrize(
    ("value", "serves", "message"),
    [("none", False, "give --server"), ("oracle", True, "--value oracle knows arithmetic"), ("heuristic", True, "--value heuristic knows")],
)
def test_a_value_that_suits_no_row_of_the_file_is_status_2(
    value: str, serves: bool, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def connected(*_: object) -> search_server.Policy:
        return search_server.Policy(RandomPlayer(), DirectoryTokenizer(tmp_path), policy(RandomPlayer()), writes_words=False)

    TOKENIZER.save(tmp_path)
    monkeypatch.setattr(search_cli, "connect", connected)
    path = tmp_path / "texts.jsonl"
    path.write_text('{"problem": "1+1?", "answer": "2"}\n[]\n')
    server = ["--server", "http://127.0.0.1:1"] if serves else []
    with pytest.raises(SystemExit) as stop:
        search_cli.main(["--strategy", "dfs", "--problems", str(path), "--budget-nodes", "5", "--value", value, *server])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_budget_of_nothing_is_an_answer_too(problems: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, lines, _ = run(["--strategy", "dfs", "--problems", str(problems), "--budget-nodes", "0"], capsys)
    assert [(line["end"], line["nodes"]) for line in lines[:5]] == [("budget", 0)] * 4 + [("solved", 0)]


def test_the_module_is_a_command(problems: Path) -> None:
    command = [sys.executable, "-m", "neox_rl.search", "--strategy", "dfs", "--problems", str(problems), "--budget-nodes", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, cwd=ROOT)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == len(ROWS)


@pytest.mark.parametrize(
    "said",
    [b"vllm:prefix_cache_hits_total 1.2.3", b"vllm:prefix_cache_hits_total 1e999", b"# " + bytes(METRICS_BYTES), None],
    ids=["no number", "no finite number", "without end", "not in time"],
)
def test_prefix_cache_counters_that_cannot_be_read_are_none(said: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from aiohttp import web

    async def answer(request: web.Request) -> web.Response:
        if said is None:
            await asked.wait()
        return web.Response(body=b"vllm:prefix_cache_queries_total 1\n" + (said or b""))

    async def story() -> None:
        async with server(metrics=answer) as address:
            assert await cache_counters(address) is None
            asked.set()

    asked = asyncio.Event()
    if said is None:
        monkeypatch.setattr(search_server, "METRICS_S", 0.1)
    asyncio.run(story())


def test_prefix_cache_counters_are_summed_over_engines() -> None:
    from aiohttp import web

    metrics = 'vllm:prefix_cache_queries_total{engine="0"} 100.0\nvllm:prefix_cache_queries_total{engine="1"} 20\n'
    metrics += 'vllm:prefix_cache_hits_total{engine="0"} 9e1\nvllm:prefix_cache_queries_created{engine="0"} 1.7e9\n'

    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=b"# \xff is no UTF-8\n" + metrics.encode(), content_type="text/plain", charset="utf-8")

    async def story() -> None:
        async with server(metrics=answer) as address:
            counters = await cache_counters(address)
            assert counters is not None and (counters.queries, counters.hits) == (120.0, 90.0)
        assert await cache_counters(address) is None

    asyncio.run(story())
