"""Policy objectives by name. One objective is one file with one function ``loss`` (``neox_rl.loss.inputs.Objective``)."""

from __future__ import annotations

from neox_rl.loss.inputs import Objective
from neox_rl.loss.objectives import cispo, decoupled_ppo, dpo, gspo, ppo, reinforce, sft, tis

OBJECTIVES: dict[str, Objective] = {
    "sft": sft.loss,
    "reinforce": reinforce.loss,
    "ppo": ppo.loss,
    "decoupled_ppo": decoupled_ppo.loss,
    "tis": tis.loss,
    "cispo": cispo.loss,
    "gspo": gspo.loss,
    "dpo": dpo.loss,
}
