"""The table of README.md, from the registry. ``python -m megatron_patches.table`` writes it."""

from __future__ import annotations

import re
from pathlib import Path

BEGIN, END = "<!-- patches -->", "<!-- end of patches -->"


def table() -> str:
    """Markdown, one row a patch."""
    from megatron_patches import PATCHES

    rows = ["| upstream | patch | symbols | why | remove when | if upstream moved | where |", "|---|---|---|---|---|---|---|"]
    for patch in PATCHES:
        symbols = "<br>".join(f"`{symbol.removeprefix('megatron.core.')}`" for symbol in patch.sources)
        where = "without CUDA" if patch.cpu_only else "everywhere"
        rows.append(f"| {patch.upstream} | {patch.name} | {symbols} | {patch.reason} | {patch.remove_when} | {patch.on_change} | {where} |")
    return "\n".join(rows)


def write(path: Path) -> None:
    """Replaces the table between the two markers."""
    text = re.sub(rf"(?s){BEGIN}.*{END}", lambda _: f"{BEGIN}\n{table()}\n{END}", path.read_text())
    path.write_text(text)


if __name__ == "__main__":
    write(Path(__file__).with_name("README.md"))
