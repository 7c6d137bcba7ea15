"""The pages: links lead somewhere, commands name what is there, the first page stays short. And the Dockerfile names what is there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES: tuple[str, ...] = (
    "README.md",
    "CHANGELOG.md",
    "BENCHMARKS.md",
    "neox_rl/ARCHITECTURE.md",
    "megatron_patches/README.md",
    "configs/README.md",
)
PAGES += tuple(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md")))
README_LINES = 150
MADE = ("data/", "runs/", "trl-env/", "my_lab/", "gsm8k/")
"""Beginnings of paths that a reader makes."""
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
INSTRUCTIONS = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", DOCKERFILE)).splitlines()


def anchors(page: Path) -> set[str]:
    """As GitHub makes them from headings."""
    heads = re.findall(r"(?m)^#+ (.+)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def targets() -> set[str]:
    return set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8")))


def missing_commands(text: str) -> list[str]:
    """Scripts, configs, modules and make targets that a text tells the reader to run, and that are not there."""
    paths = re.findall(r"(?<![\w/.~-])((?:tools|configs|tests|neox_rl|megatron_patches)/[\w/.-]+\.(?:py|yml|sh|sbatch|md))\b", text)
    lost = [path for path in paths if not path.startswith(MADE) and not (ROOT / path).is_file()]
    modules = re.findall(r"python -m ((?:neox_rl|tests)[\w.]*)", text)
    lost += [module for module in modules if importlib.util.find_spec(module.rstrip(".")) is None]
    return lost + [target for target in re.findall(r"(?m)(?:^|`)make ([a-z-]+)", text) if target not in targets()]


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith(("http:", "https:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name}: {link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{name}: {link}: {target.name} has no such heading"


@pytest.mark.parametrize("name", [page for page in PAGES if page != "CHANGELOG.md"])
def test_commands_name_what_is_there(name: str) -> None:
    assert missing_commands((ROOT / name).read_text(encoding="utf-8")) == []


def test_a_missing_path_module_or_target_is_found() -> None:
    text = "`tools/nowhere.py` python -m neox_rl.nowhere `make nothing`, `make demo` tools/audit.py python -m neox_rl.run.serve"
    assert missing_commands(text) == ["tools/nowhere.py", "neox_rl.nowhere", "nothing"]


def test_the_first_page_is_short_and_leads_to_every_other() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= README_LINES
    assert [page for page in PAGES if page not in ("README.md", "CHANGELOG.md") and f"({page})" not in text] == []


def test_dockerfile_copies_and_runs_what_is_there() -> None:
    copied = [source for line in INSTRUCTIONS if line.startswith("COPY") for source in line.split()[1:-1] if not source.startswith("--")]
    assert copied and all((ROOT / source).exists() for source in copied)
    (command,) = re.findall(r"(?m)^CMD (\[.*\])$", "\n".join(INSTRUCTIONS))
    assert (ROOT / re.findall(r'"([\w/]+\.py)"', command)[0]).is_file()
    scripts = [
        word
        for word in re.findall(r"[\w/]+\.(?:py|yml)", DOCKERFILE)
        if not word.startswith(("neox_rl/__init__", "megatron_patches/__init__"))
    ]
    assert [word for word in scripts if not (ROOT / word).is_file()] == []


def test_dockerfile_installs_declared_extras_before_it_has_the_source() -> None:
    """The empty packages that stand in for the source are those that setup.py finds."""
    (extras,) = re.findall(r'pip install -e "\.\[([\w,]+)\]"', DOCKERFILE)
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert {"gpu", "mpi", "neox"} <= set(extras.split(",")) <= set(re.findall(r'(?m)^    "(\w+)": \[', setup))
    (made,) = re.findall(r"RUN mkdir ([\w ]+?) +&&", "\n".join(INSTRUCTIONS))
    assert set(made.split()) == {
        name for name in re.findall(r"include=\[(.*?)\]", setup)[0].replace('"', "").split(", ") if "." not in name
    }


def test_dockerfile_installs_what_deepspeeds_launchers_call() -> None:
    """pdsh, which reaches a host by ssh through a module that is packaged apart; openmpi's mpirun."""
    (installed,) = [line for line in INSTRUCTIONS if line.startswith("RUN dnf install")]
    assert {"pdsh", "pdsh-rcmd-ssh", "openmpi", "openssh-clients"} <= set(installed.split())


def test_the_image_holds_nothing_that_git_ignores() -> None:
    """Runs, problem files and environments of whoever builds it."""
    ignored, left_out = (
        {line.strip("/").removeprefix("**/") for line in (ROOT / name).read_text(encoding="utf-8").split()}
        for name in (".gitignore", ".dockerignore")
    )
    assert ignored <= left_out and ".git" in left_out


def test_the_checkout_is_mounted_not_contained() -> None:
    assert not any("gpt-neox" in line for line in INSTRUCTIONS if line.startswith(("COPY", "ADD")) or "git clone" in line)
    (mounted,) = re.findall(r"-v /path/to/gpt-neox:(/[\w-]+):ro", DOCKERFILE)
    assert f"GPT_NEOX_PATH={mounted}" in DOCKERFILE and re.search(rf"mkdir -p .*{mounted}\b", "\n".join(INSTRUCTIONS))
