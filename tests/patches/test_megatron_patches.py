"""Patches apply once, only where they are needed, and say so when upstream moves."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import warnings
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch

import megatron_patches
from megatron_patches.cpu_code import rewritten, run_on_cpu
from megatron_patches.registry import Patch, PatchError, check, digest, resolve
from megatron_patches.table import table

PATCHES = megatron_patches.MEGATRON_CORE
ROOT = Path(megatron_patches.__file__).parent


def moved(patch: Patch, **changes: Any) -> Patch:
    return dataclasses.replace(patch, sources=dict.fromkeys(patch.sources, "0" * 16), **changes)


def marked(patch: Patch) -> Any:
    return pytest.param(patch, marks=[pytest.mark.neox] * (patch in megatron_patches.GPT_NEOX), id=f"{patch.upstream}-{patch.name}")


@pytest.fixture(scope="module")
def checkout() -> None:
    megatron_patches.apply(megatron_patches.GPT_NEOX[:2])


@pytest.mark.parametrize("patch", map(marked, megatron_patches.PATCHES))
def test_upstream_is_what_the_patch_was_written_for(patch: Patch, request: pytest.FixtureRequest) -> None:
    if patch in megatron_patches.GPT_NEOX:
        request.getfixturevalue("checkout")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        check(patch)


def test_importing_the_package_touches_nothing() -> None:
    code = "import megatron_patches, sys; assert not [m for m in sys.modules if m.startswith(('megatron.', 'deepspeed'))]"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240, cwd=ROOT.parent)


def test_apply_is_idempotent_and_leaves_torch_alone() -> None:
    before = torch.Tensor.type, torch.tensor, torch.Tensor.cuda, torch.cuda.current_device
    names = megatron_patches.apply()
    code = [resolve(symbol).__code__ for patch in PATCHES for symbol in patch.sources]
    assert megatron_patches.apply() == names
    assert [resolve(symbol).__code__ for patch in PATCHES for symbol in patch.sources] == code
    assert (torch.Tensor.type, torch.tensor, torch.Tensor.cuda, torch.cuda.current_device) == before
    assert names == tuple(patch.name for patch in PATCHES if not (patch.cpu_only and torch.cuda.is_available()))


def test_a_moved_source_stops_or_warns_and_names_patch_and_symbol() -> None:
    stop = next(patch for patch in PATCHES if patch.on_change == "stop")
    with pytest.raises(PatchError, match=rf"{stop.name}.*{next(iter(stop.sources))}.*megatron-core 0\.16\.1"):
        check(moved(stop))
    warn = next(patch for patch in PATCHES if patch.on_change == "warn")
    with pytest.warns(RuntimeWarning, match=warn.name):
        check(moved(warn))


def test_a_vanished_symbol_stops_even_where_a_moved_one_warns() -> None:
    gone = dataclasses.replace(PATCHES[0], sources={"megatron.core.optimizer.clip_grads:no_such_function": "0" * 16}, on_change="warn")
    with pytest.raises(PatchError, match="no_such_function"):
        check(gone)


@pytest.mark.neox
def test_gpt_neox_and_megatron_core_live_in_one_process() -> None:
    """Whichever was imported first. The checkout is not on the path: its own modules named as ours stay out of sight."""
    code = """
import sys
if sys.argv[1] == "core first":
    import megatron.core
import megatron_patches
assert megatron_patches.apply(megatron_patches.GPT_NEOX) == megatron_patches.apply(megatron_patches.GPT_NEOX)
import megatron, megatron.core.tensor_parallel, megatron.neox_arguments, tools.check_sizes
assert megatron.core is sys.modules["megatron.core"] and megatron.NeoXArgs
"""
    for order in ("core first", "checkout first"):
        subprocess.run([sys.executable, "-c", code, order], check=True, timeout=100, cwd=ROOT.parent)


def test_a_moved_source_names_the_upstream_that_it_is_of() -> None:
    neox = next(patch for patch in megatron_patches.GPT_NEOX if patch.sources)
    gone = dataclasses.replace(neox, sources={"no.such.module:function": "0" * 16})
    with pytest.raises(PatchError, match="check out GPT-NeoX ea7aefd8"):
        check(gone)


def test_digest_follows_the_source() -> None:
    symbols = list(PATCHES[0].sources)
    assert digest(symbols[0]) == PATCHES[0].sources[symbols[0]] != digest(symbols[1])


def test_rewriting_turns_names_and_literals_inner_functions_and_tuples() -> None:
    def upstream(x: torch.Tensor, where: str = "cuda") -> Any:
        def inner() -> Any:
            return torch.zeros(1, device="cuda"), torch.cuda.current_device()

        return inner(), x.cuda(), x.type() in ("torch.cuda.FloatTensor", "torch.cuda.HalfTensor"), where

    function = FunctionType(rewritten(upstream.__code__), globals(), argdefs=("kept",))
    (zeros, device), moved_x, is_float, where = function(torch.ones(2))
    assert (zeros.device.type, device, moved_x.device.type, is_float, where) == ("cpu", "cpu", "cpu", True, "kept")


def test_rewriting_refuses_what_is_no_plain_function() -> None:
    with pytest.raises(TypeError, match="not a plain function"):
        run_on_cpu((torch.zeros,))


def test_readme_has_the_table_of_the_registry() -> None:
    text = (ROOT / "README.md").read_text()
    assert table() in text, "run: python -m megatron_patches.table"
