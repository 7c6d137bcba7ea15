"""Rewrites ``cuda`` to ``cpu`` in the code of one function, in place, and nowhere else.

``torch.cpu`` has the same calls as ``torch.cuda`` where they make sense (``current_device``, ``synchronize``), so replacing the
name is enough: ``torch.cuda.current_device()`` becomes ``torch.cpu.current_device()``, ``device="cuda"`` becomes ``device="cpu"``,
``tensor.cuda()`` becomes ``tensor.cpu()`` and ``"torch.cuda.FloatTensor"`` becomes ``"torch.FloatTensor"``. Nothing global changes:
other users of torch in the process see the torch they know.
"""

from __future__ import annotations

from types import CodeType, FunctionType
from typing import Any


def rewritten(code: CodeType) -> CodeType:
    """The same code with every ``cuda`` name and literal turned to the CPU's, inner functions included."""
    names = tuple("cpu" if name == "cuda" else name for name in code.co_names)
    return code.replace(co_names=names, co_consts=tuple(map(_constant, code.co_consts)))


def run_on_cpu(functions: tuple[Any, ...]) -> None:
    """Rewrites each function in place, so that every reference to it, closures and defaults included, stays valid."""
    for function in functions:
        if not isinstance(function, FunctionType):
            raise TypeError(f"{function!r} is not a plain function: its code cannot be rewritten")
        function.__code__ = rewritten(function.__code__)


def _constant(value: Any) -> Any:
    match value:
        case CodeType():
            return rewritten(value)
        case tuple():
            return tuple(map(_constant, value))
        case "cuda":
            return "cpu"
        case str() if value.startswith("torch.cuda."):
            return value.replace("torch.cuda.", "torch.")
        case _:
            return value
