"""DeepSpeed's files of a checkpoint, on a disk that may be full.

DeepSpeed writes between collectives: a rank that raises there leaves the others waiting for it. So a write without room is kept in mind,
the rest of this checkpoint is not written, and ``raise_if_full`` says so behind the last collective.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from neox_rl.engines.checkpoint_files import out_of_room


class PatientFiles(TorchCheckpointEngine):  # type: ignore[misc]
    """DeepSpeed's default checkpoint engine, the same files; it is also the only one that is exchanged for this."""

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._full: OSError | None = None

    @classmethod
    def put_into(cls, engine: Any) -> PatientFiles | None:
        """Has DeepSpeed's ``engine`` write by it. None where the configuration asks for a checkpoint engine of another kind."""
        if type(engine.checkpoint_engine) is not TorchCheckpointEngine:
            return None
        files = engine.checkpoint_engine = cls(engine._config)
        copy = engine._copy_recovery_script  # of ZeRO's; rank 0 alone
        engine._copy_recovery_script = lambda *args: files._unless_full(partial(copy, *args))
        return files

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self._unless_full(partial(Path(path).mkdir, parents=True, exist_ok=exist_ok))

    def save(self, state_dict: Any, path: str) -> None:
        self._unless_full(partial(self._write, state_dict, path))

    def _write(self, state: Any, path: str) -> None:
        with Path(path).open("wb", buffering=0) as file:
            sink = _Sink(file)
            torch.save(state, cast(IO[bytes], sink), _use_new_zipfile_serialization=self.zipfile_serialization)
        if sink.error is not None:
            raise sink.error

    def _unless_full(self, write: Callable[[], object]) -> None:
        if self._full is None:
            try:
                write()
            except OSError as error:
                if not out_of_room(error):
                    raise
                self._full = error

    def raise_if_full(self) -> None:
        """Raises the OSError of the first write that had no room since the last call."""
        full, self._full = self._full, None
        if full is not None:
            raise full


class _Sink:
    """Takes what torch writes to a file. After an error the rest is thrown away: torch would hide the error behind one of its own."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        left = memoryview(data).cast("B")
        try:
            while left and self.error is None:
                left = left[self._file.write(left) :]
        except OSError as error:
            self.error = error
        return len(memoryview(data).cast("B"))

    def flush(self) -> None:
        """Nothing is held back here."""
