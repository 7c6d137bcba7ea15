"""DeepSpeed's runner, told what the ranks on other nodes need: ``python -m neox_rl.engines.deepspeed_runner ...``.

Its pdsh and openmpi launchers start ranks with the variables of a list (``EXPORT_ENVS``: beginnings of names) and of ``.deepspeed_env``
alone. GPT-NeoX's deepy.py lengthens the list in the same way. All of it is on command lines, which every user of a host may read, and
DeepSpeed's double quotes leave ``$(...)`` alive for the shell of the host: here values are quoted whole, and tokens and keys stay behind.

pdsh that is killed leaves the ranks on every host, and ends them otherwise by the name of their command line, those of another run on the
same hosts with them. Here each host has a guardian, whose lifeline is the standard input that pdsh holds open as long as it lives.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from neox_rl.guard import GUARDIAN

EXPORTED = ("GPT_NEOX_PATH", "NEOX_RL_", "DS_ACCELERATOR", "OMP_NUM_THREADS", "WANDB_", "GLOO_", "HF_")
_SECRET_NAME = re.compile(r"(?<!_IMPLICIT_)(TOKEN|KEY|SECRET|PASSWORD)$")
"""But HF_HUB_DISABLE_IMPLICIT_TOKEN, a switch."""
_SECRET_URL = re.compile(r"://[^/\s@]+@")
GRACE_S = 2.0
"""Between the end of pdsh and SIGKILL for the ranks: another attempt may be about to take their ports."""


def shell_word(value: str) -> str:
    """For the command of pdsh: its ``%`` is doubled, and the shell of a host takes the rest as it is."""
    return shlex.quote(value).replace("%", "%%")


def exporting(written: Callable[[str], str]) -> Callable[[Any, str, str], None]:
    """``add_export`` of a runner whose command line has values as ``written`` gives them."""

    def add_export(runner: Any, name: str, value: str) -> None:
        name, value = name.strip(), value.strip()
        if _SECRET_NAME.search(name) or _SECRET_URL.search(value):
            sys.stderr.write(f"warning: {name} is not handed to other hosts: command lines are no secret; log in there, by a file\n")
        else:
            runner.exports[name] = written(value)

    return add_export


def guarded(pdsh: Sequence[str]) -> list[str]:
    """pdsh's command with a guardian before what a host runs; its shell becomes the guardian, which has sshd as parent."""
    at = pdsh.index(sys.executable)
    return [*pdsh[:at], "exec", sys.executable, "-I", "-S", str(GUARDIAN), "0", str(GRACE_S), "''", *pdsh[at:]]


def prefixed(mpirun: Sequence[str]) -> list[str]:
    """mpirun by its whole path: then it looks for its daemon under the same prefix on the other hosts, whatever ssh's PATH is there. Its
    binding of a rank to one core is for programs without threads."""
    return [shutil.which(mpirun[0]) or mpirun[0], "--bind-to", "none", *mpirun[1:]]


def main(argv: Sequence[str] | None = None) -> None:
    from deepspeed.launcher import runner

    pdsh, openmpi = runner.PDSHRunner.get_cmd, runner.OpenMPIRunner.get_cmd

    def get_pdsh(self: object, environment: dict[str, str], hosts: Mapping[str, Any]) -> tuple[list[str], list[str], dict[str, str]]:
        command, _, changed = pdsh(self, environment, hosts)
        return guarded(command), ["true"], changed

    def get_openmpi(self: object, environment: dict[str, str], hosts: Mapping[str, Any]) -> list[str]:
        return prefixed(openmpi(self, environment, hosts))

    runner.PDSHRunner.get_cmd, runner.OpenMPIRunner.get_cmd = get_pdsh, get_openmpi
    runner.PDSHRunner.add_export, runner.OpenMPIRunner.add_export = exporting(shell_word), exporting(str)
    runner.EXPORT_ENVS.extend(EXPORTED)
    runner.main(argv)


if __name__ == "__main__":
    main()
