"""Answer checking: exact and bounded for arithmetic, math-verify on sympy in killable workers for mathematics.

Callers use ``neox_rl.verify.verifier.make_verifier`` and ``neox_rl.verify.reward.reward``.
"""
