"""Which mathematical answers are equal, and which text of a completion is the answer. In this process: nothing here is hostile."""

from __future__ import annotations

from typing import Any

import pytest

from neox_rl.types import Reason
from neox_rl.verify.extract import MAX_TAIL_CHARS, final_answer, tail
from neox_rl.verify.guard import refuse_text
from neox_rl.verify.latex import form_of, normalize, parse_number, split_unit
from neox_rl.verify.math import check_math
from neox_rl.verify.policy import MathPolicy
from neox_rl.verify.symbolic import UnreadableError, parse

EQUAL = [
    ("7", "7.0"),
    ("1234567", "1,234,567"),
    ("1234567", "1 234 567"),
    ("1234567", r"1{,}234{,}567"),
    ("0.75", r"\frac34"),
    ("3/8", r"\dfrac{3}{8}"),
    ("2 1/4", r"\frac{9}{4}"),
    (r"3\frac{1}{5}", "3.2"),
    ("-2/3", r"\frac{-2}{3}"),
    ("12", "\uff11\uff12"),
    ("0.00002", r"2 \times 10^{-5}"),
    ("1", r"0.\overline{9}"),
    ("5/11", r"0.\overline{45}"),
    ("1/7", "0.142857"),
    (r"\pi", "3.14159265"),
    ("-1", r"e^{i\pi}"),
    ("1024", "2^10"),
    (r"\frac{1}{3^{50}}", "1/3^50"),
    (r"5\sqrt{3}", r"\sqrt{75}"),
    (r"\frac{1}{\sqrt{5}}", r"\frac{\sqrt5}{5}"),
    ("(3+i)^2", "8+6i"),
    ("(x+2)^2", "x^2 + 4x + 4"),
    (r"\cos 2x", r"1 - 2\sin^2 x"),
    ("(-1)^n", r"\cos(n \pi)"),
    ("y = 3x - 2", "3x-2"),
    ("19", "x = 19"),
    ("109", "m + n = 109"),
    ("55", r"\sum_{i=1}^{10} i"),
    ("(0,1)", r"\boxed{x \in (0,1)}"),
    ("3:00 PM", "3:00 pm"),
    ("19", r"\sqrt{361} = 19"),
    ("x < 4", "4 > x"),
    ("2x + 6y = 4", "x + 3y = 2"),
    ("[2, 5)", r"2 \le x < 5"),
    ("x > 3", r"(3, \infty)"),
    (r"(1,2) \cup (4,5)", r"(4,5)\cup(1,2)"),
    ("2, 3, 5", "5, 2, 3"),
    (r"n \equiv 3 \pmod 4", r"n \equiv 3 \pmod{4}"),
    (r"(-\infty, 1) \cup (2, \infty)", r"x < 1 \text{ or } x > 2"),
    (r"\emptyset", r"\{\}"),
    ("3,000,000", r"3 \text{ million}"),
    (r"\langle 1, 2 \rangle", "(1, 2)"),
    ("x=1, y=2", "(x, y) = (1, 2)"),
    ("6", r"\boxed{\text{6 ways}}"),
    ("B", r"\boxed{\textbf{(B) }12}"),
    (r"4 \cdot 3^{2011}", r"4 \cdot 3^{2{,}011}"),
    (r"\$5", "5 dollars"),
    ("1, -1, 7, -7", "-7, -1, 1, 7"),
    (r"\{1, 4\}", r"\{4, 1\}"),
    ("(1, 4)", r"\left(1, 4\right)"),
    ("(1, 4)", r"\begin{pmatrix} 1 \\ 4 \end{pmatrix}"),
    (r"2 \pm \sqrt{7}", r"2 - \sqrt7, 2 + \sqrt7"),
    ("(1,2), (3,4)", r"\boxed{(3,4)} and \boxed{(1,2)}"),
    ("p=3, q=4", "(3, 4)"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}"),
    ("10 m", "10"),
    ("10", r"10\text{ m}"),
    ("90^\\circ", "90 degrees"),
    ("40%", "40"),
    ("40%", "0.4"),
    ("9:12", "3:4"),
    ("Thursday", r"\text{thursday}"),
    ("C", "(C)"),
    ("C", "It is C, not A."),
    ("B", "It is not A, so it must be B."),
    ("213_4", "213_{4}"),
]
DIFFERENT = [
    ("1/2006!", "1/2004!"),
    (r"\frac{1}{2^{98}}", r"\frac{1}{2^{99}}"),
    ("0.0000003", "0.0000004"),
    ("0", r"\frac{1}{10^{60}}"),
    ("c", "C"),
    ("C - c", "c - C"),
    ("10 m", "10 cm"),
    ("4 cm", r"4 \text{ cm}^2"),
    ("0", "0/0"),
    ("7", "the answer is 5 because 2+3=7"),
    ("5", "2(3)"),
    ("1/3", "0.33"),
    ("100", "99.9999999"),
    (r"\sqrt{2}", "1.41422"),
    ("(1, 4)", "(4, 1)"),
    ("[0, 1]", "(0, 1)"),
    ("x > 3", r"x \ge 3"),
    ("x + y = 1", "1"),
    ("x = 5", "y = 5"),
    ("2, 3, 5", "2, 3"),
    ("2, 4, 3", "2, 3, 4"),
    (r"\$5", "5 cents"),
    ("C", r"The answer is \boxed{not C}."),
    ("24", r"\boxed{24 or maybe 23}"),
    ("24", r"\boxed{less than 24}"),
    ("24", "The answer is between 24 and 25."),
    ("24", r"\boxed{24 \text{ (or 25)}}"),
    ("24", r"\boxed{\not= 24}"),
    ("9", "Answer $\n9\n$"),
    ("2, 3", "2, 3, 5"),
    ("32349", "32, 349"),
    ("12", r"\boxed{11} or 12"),
    ("10", "10 or 11"),
    ("40%", "4"),
    ("213_4", "213_5"),
    ("yes", "no"),
    (r"\infty", r"-\infty"),
    (r"2^{2009}-1", r"2^{2009}-3"),
    (r"\frac{2^{2009}-1}{2^{2008}-1}", r"\frac{2^{2009}-3}{2^{2008}-1}"),
    ("x^2+1", "x^2+2"),
    ("12:30", "12:31"),
    ("A", "A, B, C, D"),
    ("A", "A B C D"),
    ("12", "1 2"),
    ("3:00 PM", "4:00 PM"),
    ("3:00 PM", "3:00 AM"),
    ("A", "Not A but B"),
    ("E", "E'"),
    ("odd", r"\text{oddly}"),
    ("ab", "a+b"),
    ("3", "3!"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}"),
]


@pytest.mark.parametrize(("gold", "pred"), EQUAL)
def test_equal_answers_match(gold: str, pred: str) -> None:
    assert check_math(gold, pred).reason is Reason.MATCH


@pytest.mark.parametrize(("gold", "pred"), DIFFERENT)
def test_different_answers_do_not(gold: str, pred: str) -> None:
    assert check_math(gold, pred).reason is Reason.MISMATCH


ANSWERS = [
    (r"so $x = 3$ and \boxed{4}.", "4"),
    (r"<think>\boxed{5}</think> \boxed{6}", "6"),
    (r"\boxed{1}, no wait, that is wrong and we must think about it again: \boxed{2}", "2"),
    (r"$\boxed{1}$, $\boxed{2}$ and $\boxed{3}$", "1, 2, 3"),
    (r"\boxed{\boxed{\frac{1}{2}}}", r"\frac{1}{2}"),
    ("She sold 48 + 24 = 72.\n#### 72", "72"),
    ("the answer is 5 because 2+3=7", "5"),
    ("The answer is 90 degrees. I checked 4 times.", "90 degrees"),
    (r"Final Answer: The final answer is $12$ and $13$. I hope it is correct.", "12, 13"),
    ("Final answer: the largest value is 19.", "19"),
    ("<answer> 3/4 </answer>", "3/4"),
    (r"Therefore the area is $\frac{3}{2}$ square units.", r"\frac{3}{2}"),
    ("How much is left? $5, I think, of the $20.", "$20"),
    ("La r\u00e9ponse est 42.", "42"),
    ("\u7b54\u6848\uff1a\u6bcf\u4efd\u662f 3/5 \u5428\u3002", "3/5"),
    ("x^2 + 1", "x^2 + 1"),
    ("no numbers were harmed in the making of this long sentence of mine", ""),
]


@pytest.mark.parametrize(("text", "answer"), ANSWERS)
def test_where_the_answer_stands(text: str, answer: str) -> None:
    assert final_answer(text) == answer


def test_a_thought_that_never_ends_has_no_answer() -> None:
    assert check_math("5", r"<think> so it is \boxed{5}").reason is Reason.NO_ANSWER
    assert check_math("5", "").reason is Reason.NO_ANSWER


def test_prose_that_names_two_numbers_or_denies_one_has_no_answer() -> None:
    for text in ("We see that it can be 23 or 24.", "We see that 24 is not the answer.", "We see that it is less than 24."):
        assert check_math("24", text).reason is Reason.NO_ANSWER


def test_only_the_tail_of_a_long_text_is_read() -> None:
    assert len(tail("9" * 1_000_000)) == MAX_TAIL_CHARS
    assert check_math("5", "9" * 1_000_000 + r" \boxed{5}").reason is Reason.MATCH


@pytest.mark.parametrize("gold", ["", "   ", "0/0", "$$", r"\frac{1}{0}"])
def test_a_gold_answer_that_cannot_be_read_rewards_nobody(gold: str) -> None:
    assert check_math(gold, gold).reason is Reason.BAD_GOLD
    assert check_math(gold, "5").reason is Reason.BAD_GOLD


SWITCHES = [
    ({"percent_sign_optional": False}, "40%", "40"),
    ({"ordered_lists": "always"}, "1, 2", "2, 1"),
    ({"marked_answers": True}, "42", "We count all the ways, add them up, and there are 42 of them."),
    ({"reduced_fractions": True}, "1/2", "2/4"),
    ({"interval_as_inequality": False}, "[0, 1]", r"0 \le x \le 1"),
    ({"rounded_digits": 9}, "1/7", "0.142857"),
]


@pytest.mark.parametrize(("switch", "gold", "pred"), SWITCHES)
def test_each_policy_is_a_switch(switch: dict[str, Any], gold: str, pred: str) -> None:
    assert check_math(gold, pred).reason is Reason.MATCH
    assert check_math(gold, pred, MathPolicy(**switch)).reason in (Reason.MISMATCH, Reason.NO_ANSWER)


def test_the_lenient_switches() -> None:
    assert check_math("x + C", "x + c", MathPolicy(case_sensitive=False)).reason is Reason.MATCH
    assert check_math("10 m", "10 cm", MathPolicy(units_must_match=False)).reason is Reason.MATCH


REFUSED = [
    "9" * 500,
    "(" * 30 + "1" + ")" * 30,
    "+".join("x" * 200),
    r"\binom{1000000000}{5}",
    "a!!!",
    r"\input{/etc/passwd}",
    "\0",
    "\u0661",
    "x" * 700,
    "__import__('os')\u00e9",
]


@pytest.mark.parametrize("text", REFUSED)
def test_what_sympy_never_sees(text: str) -> None:
    assert refuse_text(text)
    with pytest.raises(UnreadableError):
        parse(text)


@pytest.mark.parametrize("text", [r"9^{9^{9^9}}", r"(10^9)!", r"\sum_{i=1}^{1000000000} \sin i", "(x+y+z+w+1)^{200}", "2^{1000000000}"])
def test_what_is_refused_once_its_size_is_known(text: str) -> None:
    assert check_math("x+1", text).reason is Reason.MISMATCH


def test_forms_units_and_numbers() -> None:
    assert form_of("(1, 2]") == ("(]", ("1", "2"), 0)
    assert form_of(r"\{1, (2, 3)\}").parts == ("1", "(2, 3)")
    assert form_of("1 + f(2, 3)").kind == "leaf"
    assert split_unit(normalize(r"5.2\text{ square meters}")) == ("5.2", "m^2")
    assert split_unit("5x") == ("5x", "")
    assert parse_number("1,23") is None
    assert parse_number("-.5") == (-0.5, 1)
