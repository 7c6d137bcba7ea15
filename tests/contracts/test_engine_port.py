"""What every trainer engine promises beyond numbers: errors that say what to do, checkpoints that are whole, bytes that arrive.

One rank, in this process. tests/invariance/test_engine_layouts.py holds the parallel layouts to the same numbers.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from neox_rl.config.neox import NeoXConfig
from neox_rl.config.run import RunConfig
from neox_rl.config.schema import MetaRLConfig
from neox_rl.engines import checkpoint_files, mcore_state
from neox_rl.engines.gpt_neox import GptNeoXEngine
from neox_rl.engines.port import Engine
from neox_rl.engines.registry import build_engine
from neox_rl.errors import GIVES_UP, ConfigError, DamagedError, DiskFullError, NeoxRLError, WeightError, exit_status
from tests.contracts.one_rank import one_rank
from tests.invariance.engine_batches import VOCAB, loss_fn, sequences, split

NEOX = NeoXConfig(hidden_size=32, num_attention_heads=2, num_layers=2, seq_length=64)
ENGINES = ("megatron-core", pytest.param("gpt-neox", marks=pytest.mark.neox))


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        one_rank(patch)
        built = build_engine(RunConfig(NEOX, MetaRLConfig(engine=request.param)), VOCAB)
        yield built
        built.close()


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine.named_tensors()}


def test_loss_tokens_and_rate_are_reported_as_given(engine: Engine) -> None:
    report = engine.step(split(sequences(), 2), loss_fn, 1e-4)
    assert report.lr == 1e-4
    assert report.tokens == sum(len(s) - 1 for s in sequences())
    assert report.metrics.keys() == {"entropy", "logprob"}


def test_metrics_add_up_over_micro_batches_but_for_a_largest(engine: Engine) -> None:
    found = iter([3.0, 2.0])

    def loss(logprobs: torch.Tensor, entropy: torch.Tensor, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return logprobs.sum(), {"gap/tokens": torch.tensor(1.0), "gap_max": torch.tensor(next(found))}

    assert engine.step(split(sequences(), 2), loss, 0.0).metrics == {"gap/tokens": 2.0, "gap_max": 3.0}


def test_a_rate_of_zero_changes_nothing(engine: Engine) -> None:
    before = weights(engine)
    engine.step(split(sequences(), 1), loss_fn, 0.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.named_tensors())


def test_reference_stays_where_it_was_set(engine: Engine) -> None:
    with pytest.raises(NeoxRLError, match=r"set_reference\(\)"):
        engine.logprobs(split(sequences(), 1), "reference")
    engine.set_reference()
    before = engine.logprobs(split(sequences(), 1))
    engine.step(split(sequences(), 1), loss_fn, 1e-2)
    np.testing.assert_array_equal(engine.logprobs(split(sequences(), 1), "reference"), before)
    assert np.abs(engine.logprobs(split(sequences(), 1))[0] - before[0]).max() > 1e-3


def test_micro_batches_must_be_there_and_alike(engine: Engine) -> None:
    with pytest.raises(ValueError, match="at least one"):
        engine.step([], loss_fn, 1e-4)
    with pytest.raises(ValueError, match=r"\[136, 144\]"):
        engine.step([*split(sequences(), 2), *split(sequences(), 1, 144)], loss_fn, 1e-4)


def test_bytes_arrive(engine: Engine) -> None:
    assert engine.broadcast_bytes(b"") == b""
    assert engine.broadcast_bytes(bytes(range(256)) * 5) == bytes(range(256)) * 5


def test_checkpoint_is_whole_or_not_there(engine: Engine, tmp_path: Path) -> None:
    path = engine.save(tmp_path, {"cursor": [1, 2]})
    trained = weights(engine)
    assert (tmp_path / "latest").read_text().strip() == path.name
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["latest", path.name])
    engine.step(split(sequences(), 1), loss_fn, 1e-2)
    (tmp_path / "step999999.tmp").mkdir()
    assert engine.load(tmp_path) == {"cursor": [1, 2]}
    assert all(torch.equal(tensor, trained[name]) for name, tensor in engine.named_tensors())
    assert engine.save(tmp_path, {"cursor": [3]}) == path, "saving the same step again replaces it"
    assert engine.load(path) == {"cursor": [3]}


def mcore_without_room(engine: Engine, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(error: Exception) -> Callable[..., None]:
        def write(*_: Any) -> None:
            raise error

        return write

    path, full = (
        checkpoint_files.find(directory),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    )
    for module, name, error in (
        (mcore_state, "write_rank", full),
        (mcore_state, "write_rank", OSError(errno.EDQUOT, "quota")),
        (checkpoint_files, "_write", OSError(errno.ENOSPC, "full")),
    ):
        with monkeypatch.context() as patch, pytest.raises(DiskFullError, match="make room there"):
            patch.setattr(module, name, fails(error))
            engine.save(directory, {"cursor": [2]})
        assert checkpoint_files.find(directory) == path
    with monkeypatch.context() as patch, pytest.raises(OSError, match="broken"):
        patch.setattr(mcore_state, "write_rank", fails(OSError(errno.EIO, "broken")))
        engine.save(directory, {"cursor": [2]})


def deepspeed_without_room(engine: GptNeoXEngine, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the files that DeepSpeed writes, one after the other."""
    path = checkpoint_files.find(directory)
    names = [file.name for file in path.iterdir() if file.suffix == ".pt"]
    assert names
    for name in names:

        def makedirs(path: str, exist_ok: bool = False, name: str = name) -> None:
            Path(path).mkdir(parents=True, exist_ok=exist_ok)
            (Path(path) / name).unlink(missing_ok=True)
            (Path(path) / name).symlink_to("/dev/full")

        with monkeypatch.context() as patch, pytest.raises(DiskFullError, match="make room there"):
            patch.setattr(engine._engine.checkpoint_engine, "makedirs", makedirs)
            engine.save(directory, {"cursor": [2]})
        assert checkpoint_files.find(directory) == path


def test_without_room_the_error_says_so_and_earlier_files_stay(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/e2e/test_full_disk.py has a disk that is."""
    model = tmp_path / "model"
    model.mkdir()
    (model / f"config.json.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(DiskFullError, match=rf"no room on the disk of {model}, for 1 of 1 ranks"):
        engine.save_hf(model)
    engine.save_hf(model)
    path, before = engine.save(tmp_path / "ckpt", {"cursor": [1]}), weights(engine)
    engine.step(split(sequences(), 1), loss_fn, 1e-2)
    if isinstance(engine, GptNeoXEngine):
        deepspeed_without_room(engine, tmp_path / "ckpt", monkeypatch)
    else:
        mcore_without_room(engine, tmp_path / "ckpt", monkeypatch)
    assert checkpoint_files.find(tmp_path / "ckpt") == path
    later = engine.save(tmp_path / "ckpt", {"cursor": [2]})
    assert checkpoint_files.find(tmp_path / "ckpt") == later and engine.load(path) == {"cursor": [1]}
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.named_tensors())


def test_as_many_checkpoints_are_kept_as_asked_for(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_neox", dataclasses.replace(NEOX, keep_last_n_checkpoints=2))
    saved = []
    for _ in range(3):
        saved.append(engine.save(tmp_path, {}).name)
        engine.step(split(sequences(), 1), loss_fn, 0.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["latest", *saved[1:]])


def test_a_checkpoint_that_is_not_what_was_saved_is_never_loaded(engine: Engine, tmp_path: Path) -> None:
    """Every file of it: a flipped bit of a weight would train on without a sign."""
    engine.step(split(sequences(), 1), loss_fn, 1e-3)
    path = engine.save(tmp_path, {"cursor": [1]})
    engine.step(split(sequences(), 1), loss_fn, 1e-2)
    before = weights(engine)
    files = [file for file in path.rglob("*") if file.is_file() and file.name != "meta.json"]
    assert files and {file.relative_to(path).as_posix() for file in files} == json.loads((path / "meta.json").read_text())["files"].keys()
    for file in files:
        whole = file.read_bytes()
        middle = len(whole) // 2
        for spoiled, said in (
            (whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :], "is damaged: its digest is"),
            (whole[:-1], "is damaged: it has"),
        ):
            file.write_bytes(spoiled)
            with pytest.raises(DamagedError, match=rf"{file.name} {said}.*start again without --resume"):
                engine.load(tmp_path)
        file.write_bytes(whole)
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.named_tensors())
    assert engine.load(tmp_path) == {"cursor": [1]}


@pytest.mark.parametrize(
    ("number", "status"), [(errno.EIO, 1), (errno.ESTALE, 1), (errno.EMFILE, 1), (errno.ENOMEM, 1), (errno.EACCES, GIVES_UP)]
)
def test_a_checkpoint_that_cannot_be_read_ends_the_rank_and_may_be_tried_again(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    """The others wait for this rank's word on its share. A disk that is away for a moment has damaged nothing; rights stay as they are."""
    path, opened = engine.save(tmp_path, {}), Path.open

    def failing(file: Path, *args: Any, **options: Any) -> Any:
        if path in file.parents and file.name != "meta.json":
            raise OSError(number, os.strerror(number))
        return opened(file, *args, **options)

    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(WeightError, match=os.strerror(number)) as raised:
        engine.load(tmp_path)
    assert exit_status(raised.value) == status and ("try again; if it stays so" in str(raised.value)) is (status == 1)


def test_checkpoint_of_another_layout_is_refused_by_name(engine: Engine, tmp_path: Path) -> None:
    path = engine.save(tmp_path, {})
    meta = json.loads((path / "meta.json").read_text())
    meta["layout"] |= {"tp": 2, "hidden": 64}
    del meta["xxh3"]
    (path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(WeightError, match=r"tp 2 there, 1 here; hidden 64 there, 32 here"):
        engine.load(tmp_path)
    with pytest.raises(WeightError, match="latest"):
        engine.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rotary_emb_base": 500, "rope_parameters": None}, "rope_theta 500 there, 10000 here"),
        ({"use_parallel_residual": True}, "use_parallel_residual True there, False here"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps"),
        ({"model_type": "llama"}, "model_type 'llama' there"),
        ({"rope_scaling": {"factor": 2.0}}, "scaled rotary"),
    ],
)
def test_hf_checkpoint_that_would_load_and_compute_another_model(
    engine: Engine, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    engine.save_hf(tmp_path)
    engine.load_hf(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightError, match=named):
        engine.load_hf(tmp_path)


def test_hf_checkpoint_that_is_broken_incomplete_or_padded(engine: Engine, tmp_path: Path) -> None:
    engine.save_hf(tmp_path)
    file, kept = tmp_path / "model.safetensors", weights(engine)
    tensors = load_file(file)
    padded = {name: torch.cat([t, torch.ones(27, 32)]) if t.shape[0] == VOCAB else t for name, t in tensors.items()}
    save_file({name.replace("embed_out", "lm_head"): t for name, t in padded.items()}, file)
    engine.load_hf(tmp_path)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in engine.named_tensors()), "spare rows are cut, lm_head is embed_out"
    save_file({name: t for name, t in tensors.items() if "layers.1.mlp" not in name}, file)
    with pytest.raises(WeightError, match=r"layers\.1\.mlp"):
        engine.load_hf(tmp_path)
    file.write_bytes(b"not safetensors")
    with pytest.raises(WeightError, match="no whole safetensors"):
        engine.load_hf(tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(engine: Engine, tmp_path: Path) -> None:
    engine.save(tmp_path, {})
    batch = split(sequences(), 1)[0]
    spoiled = dataclasses.replace(batch, advantages=np.full_like(batch.advantages, np.inf))
    with pytest.raises(NeoxRLError, match=r"loss (-?inf|nan).*spoiled"):
        engine.step([spoiled], loss_fn, 1e-4)
    engine.load(tmp_path)
    assert np.isfinite(engine.logprobs([batch])[0]).all()


def test_step_counters_of_an_optimizer_that_keeps_them_by_group(tmp_path: Path) -> None:
    """Apex and Transformer Engine do; a resume without the counter would restart the bias correction."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["step"] = 7
    state = mcore_state.collect(model, [optimizer], None)
    optimizer.param_groups[0]["step"] = 0
    mcore_state.restore(state, model, [optimizer])
    assert optimizer.param_groups[0]["step"] == 7


def test_ranks_that_the_layout_does_not_divide_are_refused_before_they_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"3 ranks are not a multiple of model_parallel_size 2 x pipe_parallel_size 1.*multiple of 2"):
        build_engine(RunConfig(dataclasses.replace(NEOX, model_parallel_size=2)), VOCAB)


def test_an_engine_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match=r"'nemo'.*megatron-core"):
        build_engine(RunConfig(metarl=MetaRLConfig(engine="nemo")), VOCAB)
