"""Trees as JSON lines: one tree a line, every node with its tokens, log-probs, version spans, value, visits, order, verdict,
exact value and what was seen before.

A line is ``{problem_id, end, answer, num_tokens, counts, error, nodes: [{id, parent, text, order, ids, logprobs, spans: [[version, start,
end]], value | null, visits, verdict: {correct, extracted, reason, ms} | null, exact | null, seen}]}``. The reader takes nothing else,
and no line without one of these: a file of trees may come from anywhere, and what reads it walks parents without looking twice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import msgspec

from neox_rl.errors import WireError
from neox_rl.types import NO_NODE, NO_VERSION, End, Node, Reason, Tree, Verdict, VersionSpan

MAX_LINE_BYTES = 1 << 28
MAX_TOKEN_ID = 2**31 - 1


class _Verdict(msgspec.Struct, forbid_unknown_fields=True):
    correct: bool
    extracted: str
    reason: Reason
    ms: float


class _Node(msgspec.Struct, forbid_unknown_fields=True):
    id: int
    parent: int
    text: str
    order: int
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    spans: tuple[tuple[int, int, int], ...]
    value: float | None
    visits: int
    verdict: _Verdict | None
    exact: float | None
    seen: int


class _Tree(msgspec.Struct, forbid_unknown_fields=True):
    problem_id: str
    end: End
    answer: int
    num_tokens: int
    counts: dict[str, int]
    error: str
    nodes: list[_Node]


_DECODER = msgspec.json.Decoder(_Tree)
_ENCODER = msgspec.json.Encoder()


def tree_line(tree: Tree) -> bytes:
    """One line, without its newline. Raises WireError for a tree that ``read_tree`` would refuse."""
    _check(tree, f"tree of {tree.problem_id}")
    nodes = [
        _Node(
            n.id,
            n.parent,
            n.text,
            n.order,
            n.ids,
            n.logprobs,
            tuple((s.version, s.start, s.end) for s in n.spans),
            n.value,
            n.visits,
            None if n.verdict is None else _Verdict(n.verdict.correct, n.verdict.extracted, n.verdict.reason, n.verdict.ms),
            n.exact,
            n.seen,
        )
        for n in tree.nodes
    ]
    return _ENCODER.encode(_Tree(tree.problem_id, tree.end, tree.answer, tree.num_tokens, dict(tree.counts), tree.error, nodes))


def read_tree(line: bytes, where: str = "tree") -> Tree:
    """The tree in a line. Raises WireError naming ``where`` and what is wrong, before anything of it is used."""
    if len(line) > MAX_LINE_BYTES:
        raise WireError(f"{where}: a line of {len(line)} bytes, at most {MAX_LINE_BYTES} are read")
    try:
        row = _DECODER.decode(line)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise WireError(f"{where}: not a tree: {error}") from error
    nodes = tuple(
        Node(
            n.id,
            n.parent,
            n.text,
            n.order,
            n.ids,
            n.logprobs,
            tuple(VersionSpan(*span) for span in n.spans),
            n.value,
            n.visits,
            None if n.verdict is None else Verdict(n.verdict.correct, n.verdict.extracted, n.verdict.reason, n.verdict.ms),
            n.exact,
            n.seen,
        )
        for n in row.nodes
    )
    tree = Tree(row.problem_id, nodes, row.end, row.answer, row.num_tokens, row.counts, row.error)
    _check(tree, where)
    return tree


def read_trees(path: Path) -> Iterator[Tree]:
    """The trees of a file, one line at a time; blank lines are passed over. Raises WireError naming file and line."""
    with path.open("rb") as file:
        for number in itertools.count(1):
            line = file.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            if line.strip():
                yield read_tree(line, f"{path}:{number}")


def write_trees(path: Path, trees: Iterable[Tree]) -> None:
    with path.open("wb") as file:
        file.writelines(tree_line(tree) + b"\n" for tree in trees)


def _check(tree: Tree, where: str) -> None:
    def refuse(what: str) -> NoReturn:
        raise WireError(f"{where}: {what}")

    if not tree.nodes or tree.nodes[0].parent != NO_NODE:
        refuse("node 0 must be the root, without a parent")
    if not NO_NODE <= tree.answer < len(tree.nodes):
        refuse(f"answer {tree.answer} is none of {len(tree.nodes)} nodes")
    if tree.num_tokens < 0 or any(count < 0 for count in tree.counts.values()):
        refuse("a count below 0")
    for index, node in enumerate(tree.nodes):
        what = _node_flaw(node, index)
        if what:
            refuse(f"node {index}: {what}")
    if len({node.order for node in tree.nodes}) != len(tree.nodes):
        refuse("two nodes have the same order")


def _node_flaw(node: Node, index: int) -> str:
    if node.id != index:
        return f"has id {node.id}: nodes are numbered 0, 1, 2 ..."
    if index and not 0 <= node.parent < index:
        return f"parent {node.parent} does not come before it"
    if not 0 <= node.seen <= index:
        return f"was made after {node.seen} nodes"
    if node.order < 0 or node.visits < 0 or not all(0.0 <= (value or 0.0) <= 1.0 for value in (node.value, node.exact)):
        found = f"order {node.order}, visits {node.visits}, value {node.value} and exact value {node.exact}"
        return f"{found} must be at least 0, the values at most 1"
    if len(node.logprobs) not in (0, len(node.ids)) or not all(map(math.isfinite, node.logprobs)):
        return f"{len(node.logprobs)} log-probs for {len(node.ids)} tokens; each token has a finite one, or none has one"
    if not all(0 <= i <= MAX_TOKEN_ID for i in node.ids):
        return "a token id outside 0..2^31-1"
    edges = [0, *(span.end for span in node.spans)]
    versions = [span.version for span in node.spans]
    if node.spans and ([s.start for s in node.spans] != edges[:-1] or edges[-1] != len(node.ids) or edges != sorted(set(edges))):
        return f"version spans {node.spans} do not cover {len(node.ids)} tokens"
    if versions != sorted(versions) or any(version <= NO_VERSION for version in versions):
        return f"versions {versions} must rise from 0"
    if node.verdict is not None and not (math.isfinite(node.verdict.ms) and node.verdict.ms >= 0):
        return f"a verdict that took {node.verdict.ms} ms"
    return ""
