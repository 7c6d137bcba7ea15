"""DeepSpeed's runner, told which variables the ranks on other nodes need: ``python -m neox_rl.engines.deepspeed_runner ...``.

Its pdsh and openmpi launchers start ranks with the variables of a list (``EXPORT_ENVS``: beginnings of names) and of ``.deepspeed_env``
alone. GPT-NeoX's deepy.py lengthens the list in the same way, for the key of Weights & Biases.
"""

from __future__ import annotations

from collections.abc import Sequence

EXPORTED = ("GPT_NEOX_PATH", "NEOX_RL_", "DS_ACCELERATOR", "OMP_NUM_THREADS", "WANDB_")


def main(argv: Sequence[str] | None = None) -> None:
    from deepspeed.launcher import runner

    runner.EXPORT_ENVS.extend(EXPORTED)
    runner.main(argv)


if __name__ == "__main__":
    main()
