"""One rank that looks for a checkpoint: each in a directory of its own, as each machine sees a network file system in its own way."""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from neox_rl.engines.base import located
from neox_rl.engines.checkpoint_files import find, find_foreign
from neox_rl.errors import WeightError


def main() -> None:
    """``argv[1]``: a file of cases, each a root with a directory a rank; ``argv[2]``: where each rank says what it found."""
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", f"file://{out}/store", timedelta(seconds=120), world_size=int(os.environ["WORLD_SIZE"]), rank=rank)
    group, said = dist.group.WORLD, []
    assert group is not None
    for case in cases:
        directory = Path(case["root"]) / str(rank)
        try:
            found = located(directory, find_foreign if case["foreign"] else find, group)
            said.append(str(found and found.relative_to(directory)))
        except WeightError as error:
            said.append(f"{type(error).__name__}: {error}")
    (out / f"said{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
