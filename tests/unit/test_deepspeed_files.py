"""What DeepSpeed writes of a checkpoint on a full disk. A fake that keeps its order stands for it; the files, and /dev/full, are real.

tests/contracts/test_engine_port.py has DeepSpeed itself, with a checkout.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from neox_rl.config.neox import NeoXConfig
from neox_rl.config.run import RunConfig
from neox_rl.config.schema import MetaRLConfig
from neox_rl.engines import checkpoint_files
from neox_rl.engines.deepspeed_files import PatientFiles
from neox_rl.engines.gpt_neox import GptNeoXEngine
from neox_rl.engines.model_shape import model_shape
from neox_rl.engines.port import Topology
from neox_rl.engines.weight_parts import World
from neox_rl.errors import DiskFullError

WEIGHTS = torch.arange(1000.0)
STATE = {"module": {"w": WEIGHTS}, "step": 7}
LAST = "behind the last collective"


class DeepSpeed:
    """Writes as DeepSpeed's engine does, and notes that it came to its last collective. ``full``: the file that has no room."""

    def __init__(self, zipped: bool = True) -> None:
        self._config = SimpleNamespace(checkpoint_config={"checkpoint_serialization": zipped})
        self.checkpoint_engine: Any = TorchCheckpointEngine(self._config)
        self.optimizer = SimpleNamespace(param_groups=[{}])
        self.full = ""
        self.said: list[str] = []

    def _copy_recovery_script(self, directory: str) -> None:
        shutil.copyfile(__file__, self._room(Path(directory) / "zero_to_fp32.py"))

    def save_checkpoint(self, directory: str, tag: str, **_: Any) -> None:
        self.checkpoint_engine.makedirs(f"{directory}/{tag}", exist_ok=True)
        for name in ("model.pt", "optimizer.pt"):
            self.checkpoint_engine.save(STATE, str(self._room(Path(directory) / tag / name)))
        self._copy_recovery_script(directory)
        self.said.append(LAST)

    def _room(self, path: Path) -> Path:
        if path.name == self.full:
            path.unlink(missing_ok=True)
            path.symlink_to("/dev/full")
        return path


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    yield World(Topology(0, 1, 1, 1, 1, 0, 0, 0, "cpu"), torch.device("cpu"), group, group, group, group)
    dist.destroy_process_group()


def engine_on(deepspeed: DeepSpeed, world: World) -> GptNeoXEngine:
    engine = object.__new__(GptNeoXEngine)
    engine._world, engine._neox, engine._engine = world, NeoXConfig(), deepspeed
    engine.shape = model_shape(RunConfig(engine._neox, MetaRLConfig()), 64)
    engine._steps, engine._reference, engine._pipe, engine._sharded, engine._args = 7, None, False, False, None
    engine._setup = SimpleNamespace(client_state=lambda args, steps: {"iteration": steps})  # type: ignore[assignment]
    engine._files = PatientFiles.put_into(deepspeed)
    return engine


@pytest.mark.parametrize("full", ["model.pt", "optimizer.pt", "zero_to_fp32.py"])
@pytest.mark.parametrize("zipped", [True, False])
def test_no_rank_leaves_deepspeeds_collectives_and_the_save_may_be_tried_again(
    world: World, tmp_path: Path, full: str, zipped: bool
) -> None:
    deepspeed, directory = DeepSpeed(zipped), tmp_path / "checkpoints"
    engine = engine_on(deepspeed, world)
    earlier = engine.save(directory, {"cursor": 1})
    engine._steps, deepspeed.full = 8, full
    for _ in range(2):
        deepspeed.said.clear()
        with pytest.raises(DiskFullError, match=rf"no room on the disk of {directory}, for 1 of 1 ranks"):
            engine.save(directory, {"cursor": 2})
        assert deepspeed.said == [LAST] and checkpoint_files.find(directory) == earlier
    deepspeed.full = ""
    (directory / "zero_to_fp32.py").unlink()
    later = engine.save(directory, {"cursor": 2})
    assert checkpoint_files.find(directory) == later and later != earlier
    for name in ("model.pt", "optimizer.pt"):
        saved = torch.load(later / name, weights_only=True)
        assert saved["step"] == 7 and torch.equal(saved["module"]["w"], WEIGHTS)


def test_other_errors_end_the_rank_at_once(tmp_path: Path) -> None:
    files = PatientFiles()
    with pytest.raises(FileNotFoundError):
        files.save(STATE, str(tmp_path / "nowhere" / "model.pt"))
    files.raise_if_full()


def test_a_checkpoint_engine_that_the_user_chose_stays() -> None:
    class Chosen(TorchCheckpointEngine):  # type: ignore[misc]
        pass

    deepspeed = DeepSpeed()
    deepspeed.checkpoint_engine = chosen = Chosen()
    assert PatientFiles.put_into(deepspeed) is None and deepspeed.checkpoint_engine is chosen
