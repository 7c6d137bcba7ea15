"""Hosts of a host file are tried by ssh before a run starts: here an ``ssh`` that runs the words it is given on this machine, or fails."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from neox_rl.config.run import RunConfig
from neox_rl.errors import ConfigError
from neox_rl.run import hosts as hosts_module
from neox_rl.run.endpoints import Endpoints, choose_endpoints
from neox_rl.run.hosts import check_hosts, parse_hostfile, read_hosts
from tests.unit.small_run import small_config

SSH = """#!/bin/sh
# ssh -o A -o B HOST COMMAND
echo "Welcome to $5" >&2
case "$5" in
    *gone) echo "ssh: connect to host $5 port 22: No route to host" >&2; exit 255 ;;
    *broken) echo "ModuleNotFoundError: No module named 'numpy'" >&2; exit 1 ;;
    *silent) exit 1 ;;
    *hangs) exec sleep 60 ;;
    *other) cd / && exec sh -c "$(echo "$6" | sed 's/\\.neox-rl-/.elsewhere-/')" ;;
esac
exec sh -c "$6"
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    for name, text in (("ssh", SSH), ("pdsh", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    small = small_config(tmp_path)
    return RunConfig(replace(small.neox, launcher="pdsh", hostfile=str(tmp_path / "hosts")), small.metarl)


def tried(config: RunConfig, *hosts: str, endpoints: Endpoints | None = None) -> str:
    Path(config.neox.hostfile).write_text("".join(f"{host} slots=1\n" for host in hosts))
    try:
        check_hosts(config, endpoints or choose_endpoints(config, 99))
    except ConfigError as error:
        return str(error)
    return ""


def test_hosts_that_ssh_leads_to_and_that_see_the_same_files_are_taken(config: RunConfig) -> None:
    assert tried(config, "localhost", "127.0.0.2") == ""
    assert not list(Path(config.metarl.runs_dir).glob(".neox-rl-*")), "what was written to be seen is gone"


def test_each_host_that_cannot_be_used_is_named(config: RunConfig) -> None:
    gone, other = tried(config, "localhost", "n2.gone", "n3.other").splitlines()
    assert gone.startswith("n2.gone: ssh n2.gone failed: ssh: connect to host n2.gone port 22: No route to host; it must lead there")
    assert other.startswith(f"n3.other: does not see what this machine writes in {config.metarl.runs_dir}; repository, Python and")


def test_a_host_whose_python_breaks_is_named(config: RunConfig) -> None:
    """Its exit status is that of connections that fail."""
    broken, silent = tried(config, "localhost", "n2.broken", "n3.silent").splitlines()
    assert broken == f"n2.broken: cannot run {sys.executable} there (exit status 1): ModuleNotFoundError: No module named 'numpy'"
    assert silent.startswith(f"n3.silent: cannot run {sys.executable} there (exit status 1): ")


def test_an_ssh_that_does_not_end_is_named(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it logs in for ever or leads to a Python that is slow cannot be told from here."""
    monkeypatch.setattr(hosts_module, "HOST_S", 1.0)
    said = tried(config, "localhost", "n2.hangs").splitlines()[-1]
    assert said == "n2.hangs: ssh n2.hangs brought no answer within 1 s; does it log in there, and is the file system of Python fast?"


def test_the_port_that_another_host_cannot_use_is_named(config: RunConfig) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        endpoints = replace(choose_endpoints(config, 99), weights_port=port)
        assert f"localhost cannot listen at 127.0.0.1 port {port} (weights): " in tried(config, "localhost", endpoints=endpoints)


def test_the_head_comes_first(config: RunConfig) -> None:
    assert "its first host 192.0.2.1 is not this machine" in tried(config, "192.0.2.1", "localhost")


def test_what_the_launcher_needs_is_here(config: RunConfig, tmp_path: Path) -> None:
    os.environ["PATH"] = str(tmp_path)
    (tmp_path / "pdsh").unlink()
    assert "launcher = pdsh: there is no pdsh on this machine" in tried(config, "localhost")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("n1", ":1: 'n1' is no host"),
        ("-oProxyCommand=x slots=1", ":1: '-oProxyCommand=x slots=1' is no host"),
        ("n1 slots=1\nn1 slots=1", ":2: n1 is there twice"),
        ("#", ": names no host"),
    ],
)
def test_a_host_file_that_is_none_is_named(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"hosts{said}"):
        parse_hostfile(text, "hosts")


def test_ranks_that_do_not_fit_the_layout_are_named(config: RunConfig) -> None:
    hosts = Path(config.neox.hostfile)
    hosts.write_text("n1 slots=1\nn2 slots=2\n")
    with pytest.raises(ConfigError, match="n2 slots=2: every host has num_gpus = 1 ranks"):
        read_hosts(config)
    hosts.write_text("# training\nn1 slots=1\nn2 slots=1\nn3 slots=1\n")
    assert read_hosts(config) == {"n1": 1, "n2": 1, "n3": 1}
    with pytest.raises(ConfigError, match="3 hosts of 1 ranks are 3: must be a multiple of model_parallel_size 2 x pipe_parallel_size 1"):
        read_hosts(RunConfig(replace(config.neox, model_parallel_size=2), config.metarl))
