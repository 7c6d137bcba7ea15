"""Tools in the loop: what the end of a completion calls for, and what is answered. The answer is context: no loss is put on it.

::

    [CALC 3 * (5 + 2)]                calculator        = 21
    [PYTHON]                          python            > 14
    print(sum(range(4)) + 8)                            > ended: time limit of 2 s
    [/PYTHON]

Every line of an answer begins with ``=`` or ``>``, whatever a program prints, so none reads as a marker of the episodes.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from neox_rl.episodes.calculator import calculator
from neox_rl.episodes.sandbox import End, PythonSandbox
from neox_rl.episodes.sandbox_worker import MAX_PROGRAM_BYTES

Tool: TypeAlias = Callable[[str], Awaitable[str | None]]
"""What the text of an unfinished episode calls for: the tool's words, or None when it calls nothing."""
_PROGRAM = re.compile(r"\[PYTHON\]\n?(.*?)\[/PYTHON\]\s*\Z", re.DOTALL)


async def calculate(text: str) -> str | None:
    """``Tool``: the calculator."""
    return calculator(text)


def python_tool(sandbox: PythonSandbox) -> Tool:
    """``Tool``: programs of the last ``[PYTHON]`` block, if it ends the text, run in ``sandbox``."""

    async def run(text: str) -> str | None:
        begin = text.rfind("[PYTHON]")
        found = _PROGRAM.match(text, begin) if begin >= 0 else None
        if found is None:
            return None
        if len(program := found[1]) > MAX_PROGRAM_BYTES // 4:
            return f"\n> no program: more than {MAX_PROGRAM_BYTES // 4} characters\n"
        printed = await sandbox.run(program)
        return framed(printed.text, sandbox.limits.output_chars, _ending(printed.end, sandbox.limits.wall_s))

    return run


def _ending(end: End, wall_s: float) -> str:
    match end:
        case End.TIME:
            return f"ended: time limit of {wall_s:g} s"
        case End.DIED:
            return "ended: the process died"
        case _:
            return ""


def framed(text: str, max_chars: int, note: str = "") -> str:
    """What was printed, at most ``max_chars`` of it, every line behind a ``>``; control characters become ``?``."""
    shown = "".join(c if c.isprintable() or c == "\n" else "?" for c in text[:max_chars].replace("\r\n", "\n").replace("\t", " "))
    lines = shown.rstrip("\n").split("\n") if shown.strip() else []
    lines += [f"cut at {max_chars} characters"] if len(text) > max_chars else []
    lines += [note] if note else []
    return "\n" + "\n".join(f"> {line}".rstrip() for line in lines or ["nothing was printed"]) + "\n"
