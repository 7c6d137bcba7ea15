"""A search tree for a person: ``python tools/view_tree.py FILE.jsonl [--problem ID] [--png OUT | --html OUT]``.

FILE holds trees as ``python -m neox_rl.search --trees FILE.jsonl`` writes them. Prints the first tree, or that of ``--problem``, as
indented text; ``--png`` and ``--html`` draw it instead: a box a step, filled by its value (its mean for mcts), with its visits and its
place in the order of the search; the answer's path in bold, ends framed green (right) or red (wrong). The wrong ends below one step share
a box, unless ``--every-end``. ``--list`` names the trees.
"""

from __future__ import annotations

import argparse
import html
import os
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from neox_rl.errors import NeoxRLError
from neox_rl.search.trees import read_trees
from neox_rl.types import NO_NODE, Node, Tree

_OPERATION = re.compile(r"(\S+) ([-+*/])([0-9]+(?:/[0-9]+)?) =(\S+)")
MAX_CHARS = 44
SHOWN_ENDS = 2
"""Wrong ends below one step that get a box each; more of them share one."""
BOX_CHARS = 26
COLUMN, ROW, BOX_HEIGHT = 190, 40, 32
LOW_COLOR, HIGH_COLOR = (255, 243, 224), (129, 199, 132)
GREEN, RED, GRAY, BLACK = "#2e7d32", "#c62828", "#9e9e9e", "#111111"


def printable(text: str, width: int) -> str:
    """One line of at most ``width`` characters without control characters: a tree's text may come from anywhere."""
    line = "".join(c if c.isprintable() else "·" for c in text.strip())
    return line if len(line) <= width else line[: width - 1] + "…"


def worded(text: str) -> str:
    """A step of arithmetic as a person writes it, ``11 / (5/4) = 44/5``; other steps as they are."""
    found = _OPERATION.fullmatch(text.strip())
    if found is None:
        return text
    left, right = (f"({number})" if "/" in number else number for number in (found[1], found[3]))
    return f"{left} {found[2]} {right} = {found[4]}"


def chosen(tree: Tree, most: int) -> set[int]:
    """At most ``most`` nodes to show: the answer's path, then what was visited most, the earlier first; each with its ancestors."""
    kept = {0, *(node.id for node in tree.path(tree.answer))}
    for node in sorted(tree.nodes, key=lambda n: (-n.visits, n.order)):
        wanted = {n.id for n in tree.path(node.id)} - kept
        if len(kept) + len(wanted) <= most:
            kept |= wanted
    return kept


def children_of(tree: Tree, kept: set[int]) -> dict[int, list[Node]]:
    """Children by parent, in the order in which they were made."""
    found: dict[int, list[Node]] = defaultdict(list)
    for node in sorted(tree.nodes[1:], key=lambda n: n.order):
        if node.id in kept:
            found[node.parent].append(node)
    return found


def title(tree: Tree, shown: int) -> str:
    hidden = f", {len(tree.nodes) - shown} not shown" if shown < len(tree.nodes) else ""
    counts = "".join(f", {count} {printable(name, 24)}" for name, count in tree.counts.items())
    failed = f": {printable(tree.error, 200)}" if tree.error else ""
    size = f"{len(tree.nodes) - 1} nodes{hidden}, {tree.num_tokens} tokens"
    return f"{printable(tree.problem_id, 60)}: {tree.end.value}, {size}{counts}{failed}"


def value_of(node: Node) -> str:
    return "-" if node.value is None else f"{node.value:.2f}"


def mark(node: Node) -> str:
    return "" if node.verdict is None else "right" if node.verdict.correct else "wrong"


def as_text(tree: Tree, most: int) -> str:
    """Lines ``step  value visits order``, indented by depth; ``*`` is the answer's path."""
    kept = chosen(tree, most)
    below, path = children_of(tree, kept), {node.id for node in tree.path(tree.answer)}
    lines = [title(tree, len(kept))]
    stack: list[tuple[Node, str, bool]] = [(child, "", i == 0) for i, child in enumerate(reversed(below[0]))]
    while stack:
        node, indent, last = stack.pop()
        versions = f" v{node.versions[0]}..{node.versions[1]}" if node.spans else ""
        lead = f"{indent}{'└─ ' if last else '├─ '}{printable(worded(node.text), MAX_CHARS) or '(end)'}"
        star = "*" if node.id in path else " "
        lines.append(f"{star} {lead:<64} v={value_of(node)} n={node.visits} #{node.order}{versions} {mark(node)}".rstrip())
        deeper = indent + ("   " if last else "│  ")
        stack += [(child, deeper, i == 0) for i, child in enumerate(reversed(below[node.id]))]
    return "\n".join(lines)


@dataclass(frozen=True)
class Box:
    """Where a node is drawn, in pixels: depth goes right, leaves go down. ``alike``: the wrong ends that share the box with it."""

    node: Node
    x: float
    y: float
    on_path: bool
    root_text: str
    alike: tuple[Node, ...] = ()

    @property
    def text(self) -> str:
        if self.alike:
            return f"{len(self.alike)} wrong ends"
        return printable(self.root_text if self.node.id == 0 else worded(self.node.text), BOX_CHARS) or "(end)"

    @property
    def hover(self) -> str:
        return "\n".join(printable(worded(node.text), 500) for node in self.alike or (self.node,))

    @property
    def numbers(self) -> str:
        if self.alike:
            return f"best v {value_of(max(self.alike, key=lambda n: n.value or 0.0))}  #{self.alike[0].order} to #{self.alike[-1].order}"
        return f"v {value_of(self.node)}  n {self.node.visits}  #{self.node.order} {mark(self.node)}"

    @property
    def fill(self) -> str:
        share = self.node.value or 0.0
        return "#" + "".join(f"{round(low + (high - low) * share):02x}" for low, high in zip(LOW_COLOR, HIGH_COLOR, strict=True))

    @property
    def frame(self) -> str:
        return {"right": GREEN, "wrong": RED, "": BLACK if self.on_path else GRAY}[mark(self.node)]

    @property
    def line_width(self) -> float:
        return 2.6 if self.on_path else 1.4 if self.node.verdict is not None else 0.8


def gathered(below: dict[int, list[Node]]) -> dict[int, tuple[Node, ...]]:
    """Takes the wrong ends that share a box out of ``below``, but for the first of each step; by that one's id, all of them."""
    alike: dict[int, tuple[Node, ...]] = {}
    for parent, children in list(below.items()):
        ends = [n for n in children if mark(n) == "wrong" and not below.get(n.id)]
        if len(ends) > SHOWN_ENDS:
            alike[ends[0].id] = tuple(ends)
            below[parent] = [n for n in children if n not in ends[1:]]
    return alike


def layout(tree: Tree, most: int, every_end: bool = False) -> list[Box]:
    """A row a leaf; a parent stands at the middle of its children."""
    kept = chosen(tree, most)
    below, path = children_of(tree, kept), {0, *(node.id for node in tree.path(tree.answer))} if tree.answer != NO_NODE else set()
    alike = {} if every_end else gathered(below)
    depth, rows, y = {0: 0}, 0, dict[int, float]()
    order: list[int] = []
    stack = [0]
    while stack:
        id = stack.pop()
        order.append(id)
        for child in reversed(below[id]):
            depth[child.id] = depth[id] + 1
            stack.append(child.id)
        if not below[id]:
            y[id] = rows
            rows += 1
    for id in reversed(order):
        if below[id]:
            y[id] = (y[below[id][0].id] + y[below[id][-1].id]) / 2
    places = ((id, 10 + depth[id] * (COLUMN + 40), 40 + y[id] * ROW) for id in order)
    return [Box(tree.nodes[id], x, y, id in path, tree.problem_id, alike.get(id, ())) for id, x, y in places]


def size_of(boxes: list[Box]) -> tuple[float, float]:
    return max(b.x for b in boxes) + COLUMN + 10, max(b.y for b in boxes) + BOX_HEIGHT + 12


def as_svg(tree: Tree, boxes: list[Box]) -> str:
    place = {box.node.id: box for box in boxes}
    width, height = size_of(boxes)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" font-family="monospace">']
    for box in boxes[1:]:
        above = place[box.node.parent]
        x1, y1, x2, y2 = above.x + COLUMN, above.y + BOX_HEIGHT / 2, box.x, box.y + BOX_HEIGHT / 2
        color, wide = (BLACK, 2.6) if box.on_path else (GRAY, 0.8)
        curve = f"M{x1:.0f} {y1:.0f} C{x1 + 20:.0f} {y1:.0f} {x2 - 20:.0f} {y2:.0f} {x2:.0f} {y2:.0f}"
        parts.append(f'<path d="{curve}" fill="none" stroke="{color}" stroke-width="{wide}"/>')
    for box in boxes:
        x, y = box.x, box.y
        parts.append(f'<g><title>{html.escape(box.hover)}</title><rect x="{x:.0f}" y="{y:.0f}" width="{COLUMN}" ')
        parts.append(f'height="{BOX_HEIGHT}" rx="5" fill="{box.fill}" stroke="{box.frame}" stroke-width="{box.line_width}"/>')
        weight = "bold" if box.on_path else "normal"
        parts.append(f'<text x="{x + 7:.0f}" y="{y + 14:.0f}" font-size="11" font-weight="{weight}">{html.escape(box.text)}</text>')
        parts.append(f'<text x="{x + 7:.0f}" y="{y + 27:.0f}" font-size="10" fill="#555">{box.numbers}</text></g>')
    return "".join([*parts, "</svg>"])


def as_html(tree: Tree, most: int, every_end: bool = False) -> str:
    heading = html.escape(title(tree, len(chosen(tree, most))))
    legend = "Fill: value, pale 0 to green 1. v: value, n: visits, #: order. Bold: the answer's path. Frame: green right, red wrong."
    style = "body{font-family:sans-serif;margin:16px;background:#fff;color:#111}p{color:#555}"
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{heading}</title><style>{style}</style>'
    return f"{head}<h3>{heading}</h3><p>{legend}</p>{as_svg(tree, layout(tree, most, every_end))}</html>\n"


def draw_png(tree: Tree, path: Path, most: int, every_end: bool = False) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import FancyBboxPatch

    boxes = layout(tree, most, every_end)
    place = {box.node.id: box for box in boxes}
    width, height = size_of(boxes)
    figure = pyplot.figure(figsize=(max(width, 700) / 100, height / 100), dpi=110)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, max(width, 700))
    axes.set_ylim(height, 0)
    axes.axis("off")
    for box in boxes[1:]:
        above = place[box.node.parent]
        color, wide = (BLACK, 2.2) if box.on_path else (GRAY, 0.7)
        axes.plot([above.x + COLUMN, box.x], [above.y + BOX_HEIGHT / 2, box.y + BOX_HEIGHT / 2], color=color, linewidth=wide, zorder=1)
    for box in boxes:
        shape = FancyBboxPatch((box.x + 3, box.y + 3), COLUMN - 6, BOX_HEIGHT - 6, boxstyle="round,pad=3", zorder=2)
        shape.set(facecolor=box.fill, edgecolor=box.frame, linewidth=box.line_width)
        axes.add_patch(shape)
        weight = "bold" if box.on_path else "normal"
        # parse_math: a dollar sign of a problem's text is a dollar sign.
        axes.text(box.x + 7, box.y + 14, box.text, fontsize=7.5, family="monospace", weight=weight, zorder=3, parse_math=False)
        axes.text(box.x + 7, box.y + 27, box.numbers, fontsize=6.5, color="#555555", zorder=3)
    axes.text(10, 16, title(tree, len(chosen(tree, most))), fontsize=9, weight="bold", parse_math=False)
    legend = "fill: value, pale 0 to green 1; v value, n visits, # order; bold: the answer's path; frame: green right, red wrong"
    axes.text(10, 31, legend, fontsize=7, color="#555555")
    figure.savefig(path)
    pyplot.close(figure)


def find(path: Path, problem: str | None) -> Tree:
    """The first tree, or the first of ``problem``. Raises WireError for a bad file, LookupError where there is none."""
    for tree in read_trees(path):
        if problem is None or tree.problem_id == problem:
            return tree
    raise LookupError(f"{path}: no tree{'' if problem is None else f' of problem {problem!r}'}; --list names those it holds")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--problem", help="id of the problem (default: the first tree)")
    parser.add_argument("--list", action="store_true", help="one line a tree")
    parser.add_argument("--max-nodes", type=int, default=0, help="most nodes shown (default: 2000 as text or HTML, 120 in a PNG)")
    parser.add_argument("--every-end", action="store_true", help="a box for each wrong end in a picture")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--png", type=Path, metavar="OUT")
    output.add_argument("--html", type=Path, metavar="OUT")
    args = parser.parse_args(argv)
    most = args.max_nodes if args.max_nodes > 0 else 120 if args.png else 2000
    try:
        if args.list:
            print("\n".join(title(tree, len(tree.nodes)) for tree in read_trees(args.file)), flush=True)
            return 0
        tree = find(args.file, args.problem)
        if args.png:
            draw_png(tree, args.png, most, args.every_end)
        elif args.html:
            args.html.write_text(as_html(tree, most, args.every_end), encoding="utf-8")
        else:
            print(as_text(tree, most), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read the lines has seen enough
        return 1
    except (NeoxRLError, LookupError, OSError) as error:
        parser.exit(2, f"view_tree: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
