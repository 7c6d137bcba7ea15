"""Keys that were not written and that GPT-NeoX would have filled otherwise: this project's defaults are the same for both engines."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from neox_rl.config.checkout import default_values
from neox_rl.config.run import RunConfig

COMPARED = (
    "layernorm_epsilon",
    "rms_norm_epsilon",
    "no_weight_tying",
    "make_vocab_size_divisible_by",
    "pipe_parallel_size",
    "weight_decay",
    "gradient_clipping",
    "lr_decay_style",
    "warmup",
    "min_lr",
)
"""What changes the model or the training when it is left out, and could differ; a model's sizes have no default there."""
ADAM: Mapping[str, Any] = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8}
"""What its optimizer has where ``optimizer.params`` says nothing: its own defaults, and then those of Adam."""


def other_defaults(config: RunConfig, written: Collection[str], checkout: Path) -> str:
    """One note on the keys outside ``written`` whose value here is not GPT-NeoX's, or an empty text. Raises ConfigError."""
    theirs, neox = default_values(checkout), config.neox
    unused = "rms_norm_epsilon" if neox.norm == "layernorm" else "layernorm_epsilon"
    found = {key: (getattr(neox, key), theirs[key]) for key in COMPARED if key in theirs and key not in written and key != unused}
    if "pos_emb" not in config.extra:
        found["pos_emb"] = ("rotary", theirs.get("pos_emb", "rotary"))
    params = neox.optimizer["params"]
    if isinstance(params, dict):
        found |= {
            f"optimizer.params.{key}": (params[key], value) for key, value in ADAM.items() if f"optimizer.params.{key}" not in written
        }
    told = [f"{key} {_plain(ours)} ({_plain(other)} there)" for key, (ours, other) in found.items() if ours != other]
    return f"keys that are not written have other defaults than GPT-NeoX's: {', '.join(told)}; write those that matter" if told else ""


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
