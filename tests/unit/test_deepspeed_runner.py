"""How ranks on other nodes are started and ended: DeepSpeed's own runner and launcher, with a ``pdsh`` and an ``mpirun`` of our own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
RECORDER = '#!/bin/sh\nprintf "%s\\n" "$@" >> "$RECORD"\n'


# What pdsh does for each host: a shell there, by ssh, whose standard input is open as long as pdsh lives.
PDSH = f"""#!{sys.executable}
import os, subprocess, sys
words = "%".join(part.replace("%n", "0") for part in " ".join(sys.argv[6:]).split("%%"))
host = subprocess.Popen(["sh", "-c", words], stdin=subprocess.PIPE, start_new_session=True)
open(os.environ["RECORD"], "w").write(str(os.getpid()))
host.wait()
"""


def started(tmp_path: Path, launcher: str, scripts: Mapping[str, str], told: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    for name, text in scripts.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "hosts").write_text("first slots=1\nsecond slots=1\n")
    env = os.environ | (told or {}) | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(tmp_path / "record"), "UNRELATED": "x"}
    command = [sys.executable, "-m", "neox_rl.engines.deepspeed_runner", "--launcher", launcher, "--hostfile", str(tmp_path / "hosts")]
    command += ["--master_addr", "10.0.0.1", "--force_multi", str(tmp_path / "train.py"), "--run-dir", "runs/x"]
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_pdsh_is_told_the_variables_of_the_run_but_no_token_or_key(tmp_path: Path) -> None:
    """All users of a host may read its command lines, and the runner writes them to its log."""
    told = {
        "GPT_NEOX_PATH": "/share/gpt-neox",
        "NEOX_RL_ATTEMPT": "3",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "WANDB_PROJECT": "p",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "GLOO_SOCKET_IFNAME": "ib0",
    }
    secrets = {"HF_TOKEN": "hidden", "WANDB_API_KEY": "hidden", "WANDB_BASE_URL": "https://me:hidden@wandb.example"}
    out = started(tmp_path, "pdsh", {"pdsh": RECORDER, "ssh": RECORDER}, told | secrets).communicate(timeout=180)[0]
    said = (tmp_path / "record").read_text() if (tmp_path / "record").exists() else ""
    assert "first,second" in said, out
    for name, value in told.items():
        assert f"export {name}={value};" in said
    assert "UNRELATED" not in said and "hidden" not in said + out
    assert "warning: HF_TOKEN is not handed to other hosts" in out


def test_a_value_reaches_a_host_as_it_is(tmp_path: Path) -> None:
    """No shell there runs what is in it."""
    value = f"a  \"b\" 'c' $(touch {tmp_path / 'run'}) `touch {tmp_path / 'run'}` $HOME; %h %n 100% \\"
    (tmp_path / "train.py").write_text(f"import os\nprint(os.environ['WANDB_NOTES'], end='', file=open({str(tmp_path / 'said')!r}, 'w'))")
    runner = started(tmp_path, "pdsh", {"pdsh": PDSH, "ssh": "#!/bin/sh\n"}, {"WANDB_NOTES": value, "DS_ACCELERATOR": "cpu"})
    out = runner.communicate(timeout=180)[0]
    assert (tmp_path / "said").exists() and (tmp_path / "said").read_text() == value, out
    assert not (tmp_path / "run").exists()


def test_mpirun_is_called_by_its_whole_path_and_binds_no_rank(tmp_path: Path) -> None:
    scripts = {"mpirun": '#!/bin/sh\necho "$0" "$@" > "$RECORD"\n', "ompi_info": "#!/bin/sh\n", "ssh": "#!/bin/sh\n"}
    out = started(tmp_path, "openmpi", scripts, {"NEOX_RL_ATTEMPT": "3"}).communicate(timeout=180)[0]
    said = (tmp_path / "record").read_text() if (tmp_path / "record").exists() else ""
    assert said.startswith(f"{tmp_path}/mpirun --bind-to none -n 2 -hostfile "), out
    assert "-x NEOX_RL_ATTEMPT=3" in said and said.endswith(f"{tmp_path}/train.py --run-dir runs/x\n")


def test_ranks_on_a_host_end_when_pdsh_is_killed(tmp_path: Path) -> None:
    """Also one that does not hear SIGTERM, and when the runner is killed too, so that nobody can say anything to the host."""
    lines = [
        "import os, signal, time",
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
        f"print(os.getpid(), file=open({str(tmp_path / 'pid')!r}, 'w'))",
    ]
    (tmp_path / "train.py").write_text("\n".join([*lines, "time.sleep(600)"]))
    runner = started(tmp_path, "pdsh", {"pdsh": PDSH, "ssh": "#!/bin/sh\n"}, {"DS_ACCELERATOR": "cpu"})
    rank = number_in(tmp_path / "pid", runner)
    for pid in (runner.pid, number_in(tmp_path / "record", runner)):
        os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + 30
    while psutil.pid_exists(rank) and time.monotonic() < end:
        time.sleep(0.05)
    assert not psutil.pid_exists(rank)


def number_in(path: Path, runner: subprocess.Popen[str]) -> int:
    end = time.monotonic() + 180
    while not path.exists() or not path.read_text().strip():
        assert runner.poll() is None and time.monotonic() < end, runner.communicate()[0] if runner.poll() is not None else "too late"
        time.sleep(0.05)
    return int(path.read_text())
