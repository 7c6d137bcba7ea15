r"""Formulas that a new worker reads once. ANTLR builds its prediction tables while it parses: cold, a formula takes ten times as long."""

from __future__ import annotations

from neox_rl.verify import symbolic
from neox_rl.verify.guard import TooLargeError
from neox_rl.verify.latex import normalize
from neox_rl.verify.math import check_math
from neox_rl.verify.policy import MathPolicy

_PAIRS = (
    (r"\frac{x+2}{7}", r"\frac{x}{7}+\frac27"), ("x<3", "-x>-3"), (r"[0,1)\cup(2,3)", r"(2,3)\cup[0,1)"), (r"1\leq x\leq 2", "[1,2]"),
    ("2x+4y-3=0", r"y=-\frac12x+\frac34"), (r"x\neq 5", "x = 5"), (r"\sin 30^\circ", r"\frac12"), (r"e^{i\pi}", "-1"), ("f(x)+1", "x+2"),
    (r"1\leq|z|\leq 2", r"z\in[-2,-1]\cup[1,2]"), ("x+y-z=1", "2x-7y+z+4=0"), ("-3<a<4", "(-3,4)"), (r"\sin^2 x", r"1-\cos^2 x"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&0\\0&1\end{pmatrix}\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
)  # fmt: skip
_FORMULAS = tuple(
    r"""
    2\sqrt{3} ; -\frac{\sqrt{7}}{12} ; \frac{1}{2}+\frac{3}{4}i ; x^2+2x+1 ; (x+1)^2(x-3) ; x^{n+1}-2^{n-1} ; -3x^{2}y+4z ;
    \frac{n(n+1)(2n+1)}{6} ; \frac{-1+\sqrt{5}}{2} ; 3\pi+2 ; \frac{9}{4}\pi ; \pi r^2 ; \frac{\pi}{2} ; 2^{10}-1 ; 10^{-3} ;
    2.5\cdot 10^{3} ; 3*x-4/y ; 12 \cdot \pi ; \sqrt[3]{2}+1 ; 1+2+3 ; \sqrt{2+\sqrt{3}} ; \sin(x)+\cos^2 x ; \tan\frac{\pi}{8}
    ; \arctan 2 ; \log_2(8) ; \log_{10} x ; \ln 2+e^2 ; e^{-x} ; |x-1| ; \lfloor n/2\rfloor ; \lceil x\rceil ; \binom{10}{3} ;
    {8 \choose 2}^3 ; 7!+3 ; (n+1)! ; \frac{n!}{k!(n-k)!} ; x_{1}+x_2 ; a_n ; a_{n+1}-1 ; \alpha+\beta ; 2\sin b\cos a ; x=5 ;
    y=2x+1 ; f(x)=x^2+1 ; x>3 ; x\leq -2 ; x\geq 5 ; -1<x<1 ; 0\leq x\leq \frac{1}{2} ; (-\infty,3) ; [2,\infty) ;
    (0,1]\cup[2,3) ; \{1,2,3\} ; (1,2) ; 1,2,3 ; x\in[0,1] ; \mathbb{R} ; (-\infty,-1)\cup(1,\infty) ; \{1,2\}\cup(3,4) ;
    \emptyset ; \sum_{k=1}^{n} k^2 ; \prod_{k=1}^{5} k ; \int_0^1 x^2 dx ; \frac{x}{y}=\frac{2}{3} ; x^2+y^2=1 ;
    \frac{a}{b}+\frac{c}{d} ; \frac{1}{1+\frac{1}{x}} ; (a+b)(a-b) ; a(b+c) ; 2(x+1)(x+2) ; \frac{2^{9}-1}{3\cdot 2^{8}-1} ;
    -x-y ; x/2 ; (1/2)x ; 4^{1/3} ; \sqrt{x^2+1} ; 168+24\sqrt{28} ; 1-\frac{1}{e} ; \frac{3\sqrt{2}}{4}-\frac{1}{2} ; \pm 3 ;
    \angle A ; 5\% ; 3\mod 5 ; \sqrt{\frac{7}{144}} ; \frac{\sqrt{10.5}}{27} ; \sin^2 80
    """.replace("\n", " ").split(" ; ")
)


def warm_up(policy: MathPolicy) -> None:
    """Takes about two seconds of one core."""
    for gold, pred in _PAIRS:
        check_math(gold, pred, policy)
    for formula in _FORMULAS:
        try:
            symbolic.parse(normalize(formula.strip()))
        except (symbolic.UnreadableError, TooLargeError):
            continue
