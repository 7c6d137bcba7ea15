r"""Plain numbers, decided where the text is: no worker, no sympy, time linear in the text. The same finding as ``math.check_math``.

Only what needs no judgement: a gold answer that is a number, and a text whose last words are a box, ``#### number``, or the number
itself. Everything else is left to a worker; a tested property says that the two never differ.
"""

from __future__ import annotations

import re
from fractions import Fraction

from neox_rl.types import Reason
from neox_rl.verify.finding import Finding

_NUMBER = r"-?(?:0|[1-9][0-9]{0,17})(?:\.[0-9]{1,12})?"
_ALONE = re.compile(rf"\s*({_NUMBER})\s*")
_BOXED = re.compile(rf"\\boxed\{{ ?({_NUMBER}) ?\}}")
_HASHES = re.compile(rf"####[ \t]*({_NUMBER})\s*")
_CLOSERS = re.compile(r"[\s.$*\])!]*")


def quick_finding(gold: str, text: str) -> Finding | None:
    """The finding where both answers are plain numbers, None where a worker must look. Takes what ``extract.tail`` gives."""
    wanted = _ALONE.fullmatch(gold)
    if wanted is None or (said := _said(text)) is None:
        return None
    if wanted[1] == said:
        return Finding(Reason.MATCH, said)
    if "." not in wanted[1] and "." not in said and "-0" not in (wanted[1], said):
        return Finding(Reason.MISMATCH, said)
    # Unequal decimals may be one number rounded: that is the policy's business.
    return Finding(Reason.MATCH, said) if Fraction(wanted[1]) == Fraction(said) else None


def _said(text: str) -> str | None:
    """The final answer where it is a plain number that nothing after it can replace, as ``extract.final_answer`` reads it."""
    if alone := _ALONE.fullmatch(text):
        return alone[1]
    start = text.rfind("\\boxed{")
    if start >= 0:
        box = _BOXED.match(text, start)
        single = text.find("boxed") == start + 1 and "\\fbox" not in text
        return box[1] if box and single and _CLOSERS.fullmatch(text, box.end()) else None
    start = text.rfind("####")
    hashes = _HASHES.fullmatch(text, start) if start >= 0 and text.find("####") == start else None
    return hashes[1] if hashes and "boxed" not in text and "\\fbox" not in text else None
