"""Plain numbers are decided without a worker, and never otherwise than the checker decides them."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neox_rl.types import Reason
from neox_rl.verify.extract import tail
from neox_rl.verify.math import check_math
from neox_rl.verify.quick import quick_finding

NUMBERS = st.one_of(
    st.integers(-(10**6), 10**6).map(str),
    st.integers(-9, 9).map(str),
    st.decimals(-20, 20, allow_nan=False, places=2).map(str),
    st.sampled_from(["0", "-0", "007", "1,000", "5.", "12.0", ".5", "1e5", "3.14159265", "3.141593", "9" * 30]),
)
PIECES = st.one_of(
    NUMBERS,
    st.sampled_from(
        ["\\boxed{", "}", "#### ", "<answer>", "</answer>", "\\fbox{", "\\boxed ", "\\(", "\\)", "$", "%", "x=", "\\text{", ", "]
    ),
    st.sampled_from(["'", '"', "-", ".", "**", "</think>", "<think>", " cm", "\n", "final answer is ", "The answer is ", "Final Answer: "]),
    st.sampled_from(["and ", "not ", " or ", "maybe ", " is wrong", "at most ", "so "]),
    st.text(max_size=4),
)
PROSE = st.lists(PIECES, max_size=5).map("".join)
TEXTS = st.one_of(
    NUMBERS,
    st.tuples(PROSE, NUMBERS, PROSE).map(lambda t: rf"{t[0]}\boxed{{{t[1]}}}{t[2]}"),
    st.tuples(PROSE, NUMBERS).map(lambda t: f"{t[0]}\n#### {t[1]}"),
    st.tuples(PROSE, NUMBERS).map(lambda t: rf"{t[0]}\boxed{{{t[1]}}}$."),
    PROSE,
)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(NUMBERS, TEXTS)
def test_what_is_decided_quickly_is_decided_as_the_checker_decides_it(gold: str, text: str) -> None:
    quick = quick_finding(tail(gold), tail(text))
    if quick is not None:
        assert quick == check_math(tail(gold), tail(text))


@pytest.mark.parametrize(
    ("gold", "text", "reason"),
    [
        ("42", r"Both lead to 7 = 7. So it is $\boxed{42}$.", Reason.MATCH),
        ("42", "6 * 7 = 42\n#### 42", Reason.MATCH),
        ("-3", "-3", Reason.MATCH),
        ("42", r"\boxed{41}", Reason.MISMATCH),
        ("2.50", r"\boxed{2.5}", Reason.MATCH),
    ],
)
def test_the_plain_endings_of_solutions_need_no_worker(gold: str, text: str, reason: Reason) -> None:
    quick = quick_finding(gold, text)
    assert quick is not None and quick.reason is reason


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        ("42", r"\boxed{42} or \boxed{43}"),
        ("42", r"\boxed{42}, no, that is wrong"),
        ("42", r"\boxed{6 \cdot 7}"),
        ("3.14", r"\boxed{3.1416}"),
        ("x", r"\boxed{42}"),
        ("42", "#### 41 #### 42"),
    ],
)
def test_what_needs_judgement_is_left_to_a_worker(gold: str, text: str) -> None:
    assert quick_finding(gold, text) is None
