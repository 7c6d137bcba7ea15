"""The checkers of floors and sizes: the tree passes, and each kind of violation is found in a snippet that has it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


floors, sizes = tool("check_floors"), tool("check_sizes")

BAD_IMPORTS = {
    "up": ("neox_rl/queue/state.py", "from neox_rl.step.main import main", "imports step (floor 5)"),
    "up, inside a function": ("neox_rl/types.py", "def f() -> None:\n    import neox_rl.run.launch", "imports run (floor 6)"),
    "up, through the package": ("neox_rl/types.py", "from neox_rl import telemetry", "imports telemetry (floor 2)"),
    "up, for a type only": ("neox_rl/errors.py", "if TYPE_CHECKING:\n    from neox_rl.types import Trace", "imports types (floor 1)"),
    "sideways": ("neox_rl/batch/pack.py", "from neox_rl.loss.kl import k3", "never import one another"),
    "an engine from a patch": ("megatron_patches/pipeline.py", "from neox_rl.engines.port import Engine", "imports engines (floor 4)"),
    "a program, which only a command line may start": (
        "neox_rl/queue/state.py",
        "from neox_rl.queue.__main__ import f",
        "imports run (floor 6)",
    ),
    "no floor": ("neox_rl/utils.py", "from neox_rl.types import Trace", "`utils` has no floor"),
    "megatron": ("neox_rl/step/main.py", "from megatron.core import parallel_state", "`megatron` is imported only in"),
    "deepspeed": ("neox_rl/run/launch.py", "import deepspeed", "`deepspeed` is imported only in"),
    "deepspeed by name": ("neox_rl/run/launch.py", "import_module('deepspeed.comm')", "`deepspeed` is imported only in"),
    "vllm": ("neox_rl/rollout/groups.py", "import vllm", "`vllm` is imported only in"),
    "zmq": ("neox_rl/run/pump.py", "import zmq.asyncio", "`zmq` is imported only in"),
    "torch": ("neox_rl/queue/state.py", "import torch.nn as nn", "`torch` is imported only in"),
    "star": ("tests/unit/test_x.py", "from neox_rl.types import *", "star import"),
    "relative": ("tools/x.py", "from . import y", "relative import"),
}


@pytest.mark.parametrize("case", BAD_IMPORTS)
def test_a_bad_import_is_found_with_its_line(case: str) -> None:
    path, source, message = BAD_IMPORTS[case]
    (found,) = floors.violations(path, source)
    assert found.startswith(f"{path}:{source.count(chr(10)) + 1}: ") and message in found


GOOD_IMPORTS = {
    "down": ("neox_rl/run/launch.py", "from neox_rl.step.main import main"),
    "a program imports all that it puts together": ("neox_rl/search/__main__.py", "from neox_rl.run.search_cli import main"),
    "its own stage": ("neox_rl/queue/wire.py", "from neox_rl.queue import state"),
    "beside, where no stage is": ("neox_rl/types.py", "from neox_rl.framing import pack"),
    "a name that only starts like a package": ("neox_rl/queue/state.py", "import torchlike"),
    "zmq in a wire file": ("neox_rl/queue/wire.py", "import zmq"),
    "vllm in the plugin": ("neox_rl/weights/vllm_plugin.py", "import vllm"),
    "megatron in an engine": ("neox_rl/engines/megatron_core.py", "from megatron.core import parallel_state"),
    "anything in a test": ("tests/unit/test_x.py", "import torch\nfrom neox_rl.run import launch"),
}


@pytest.mark.parametrize("case", GOOD_IMPORTS)
def test_a_good_import_is_let_through(case: str) -> None:
    assert list(floors.violations(*GOOD_IMPORTS[case])) == []


def test_a_long_file_and_a_long_function_are_found_and_the_longest_allowed_are_not() -> None:
    body = "    x = 1\n"
    allowed = "@decorated\ndef f():\n" + body * 59
    assert list(sizes.violations("a.py", allowed)) == []
    (found,) = sizes.violations("a.py", allowed + body)
    assert "a.py:2: f has 61 lines" in found
    method = "class A:\n    async def g(self):\n" + "        x = 1\n" * 60
    assert "g has 61 lines" in next(sizes.violations("a.py", method))
    assert list(sizes.violations("a.py", "x = 1\n" * 400)) == []
    assert "401 lines" in next(sizes.violations("a.py", "x = 1\n" * 401))


@pytest.mark.parametrize("name", ["check_floors", "check_sizes"])
def test_the_command_fails_on_a_bad_tree_and_names_the_file(name: str, tmp_path: Path) -> None:
    bad = tmp_path / "neox_rl" / "types.py"
    bad.parent.mkdir()
    bad.write_text("import zmq\n" + "x = 1\n" * 400)
    command = [sys.executable, ROOT / "tools" / f"{name}.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1 and "neox_rl/types.py:1: " in done.stdout


@pytest.mark.parametrize("name", ["check_floors", "check_sizes"])
def test_this_tree_passes(name: str) -> None:
    done = subprocess.run([sys.executable, ROOT / "tools" / f"{name}.py"], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout


def test_the_architecture_page_names_the_same_floors() -> None:
    page = (ROOT / "neox_rl" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    section = page.split("## Floors", 1)[1].split("Imports go down", 1)[0]
    named = [set(re.findall(r"`([a-z_]+)`", part)) for part in section.split("|")]
    assert named == [set(parts) for parts in floors.FLOORS]
