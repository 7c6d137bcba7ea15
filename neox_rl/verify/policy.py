"""The choices that a mathematics checker has to make: the keys of ``metarl.verify.math``, each documented there."""

from __future__ import annotations

from neox_rl.config.schema import MathPolicy

__all__ = ["DEFAULT_POLICY", "MathPolicy"]

DEFAULT_POLICY = MathPolicy()
