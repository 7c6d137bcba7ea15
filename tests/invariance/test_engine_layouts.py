"""Every parallel layout trains the same model as transformers does: logits, loss, gradient norm, weights after three steps.

The reference is HF transformers on each sequence alone, unpacked, with torch's AdamW: no code of the engine. What is not covered:
CUDA and NCCL, interleaved pipelines, context and expert parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.invariance.engine_batches import VOCAB, loss_fn, pack, sequences
from tests.invariance.engine_worker import LR
from tests.invariance.launching import run_ranks

LLAMA = {"norm": "rmsnorm", "activation": "swiglu", "use_bias_in_attn_linear": False, "use_bias_in_mlp": False, "intermediate_size": 288}
BASE = {"hidden_size": 64, "num_attention_heads": 4, "seq_length": 64, "weight_decay": 0.1}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**BASE, **LLAMA, "num_layers": 3, "num_kv_heads": 2},
    "pythia": {**BASE, "num_layers": 2, "rotary_pct": 0.25, "gpt_j_residual": True},
    "neox_tied": {**BASE, "num_layers": 2, "no_weight_tying": False},
    "qwen2": {**BASE, **LLAMA, "num_layers": 2, "num_kv_heads": 2, "no_weight_tying": False},
}
QKV_BIAS = ("qwen2",)
"""Which GPT-NeoX cannot have."""
ZERO1 = {"zero_optimization": {"stage": 1}}
LAYOUTS: dict[str, tuple[int, dict[str, Any], int]] = {
    "one": (1, {}, 1),
    "accumulate4": (1, {}, 4),
    "zero1_alone": (1, ZERO1, 2),
    "tp2": (2, {"model_parallel_size": 2}, 1),
    "tp2_sp_recompute": (2, {"model_parallel_size": 2, "sequence_parallel": True, "checkpoint_activations": True}, 2),
    "pp2": (2, {"pipe_parallel_size": 2}, 4),
    "pp2_one_microbatch": (2, {"pipe_parallel_size": 2, "checkpoint_activations": True}, 1),
    "dp2": (2, {}, 1),
    "dp2_zero1": (2, ZERO1, 2),
    "tp2_pp2": (4, {"model_parallel_size": 2, "pipe_parallel_size": 2, "sequence_parallel": True}, 2),
    "tp2_dp2_zero1": (4, {"model_parallel_size": 2, **ZERO1}, 1),
}
"""name: (ranks, keys, micro-batches a rank). Layouts of four ranks run for one family: they cost four processes on few cores."""
PLAIN = {"pipe_parallel_size": 0}
NEOX_LAYOUTS: dict[str, tuple[int, dict[str, Any], int]] = {
    **LAYOUTS,
    "plain": (1, PLAIN, 2),
    "plain_tp2_sp_recompute": (2, {**LAYOUTS["tp2_sp_recompute"][1], **PLAIN}, 1),
    "plain_dp2_zero1": (2, {**ZERO1, **PLAIN}, 2),
    "plain_dp2_zero2": (2, {"zero_optimization": {"stage": 2}, **PLAIN}, 2),
    "plain_dp2_zero3": (2, {"zero_optimization": {"stage": 3}, **PLAIN}, 2),
}
"""GPT-NeoX has two forms of its model: DeepSpeed's pipeline module, and without it (pipe_parallel_size 0) a plain sequence."""
ENGINES = {"megatron-core": LAYOUTS, "gpt-neox": NEOX_LAYOUTS}
RESUMES = ("one", "tp2_sp_recompute", "pp2", "dp2", "dp2_zero1")
BF16 = {
    "bf16_one": (1, {}),
    "bf16_tp2": (2, {"model_parallel_size": 2}),
    "bf16_dp2_zero1": (2, ZERO1),
    "bf16_pp2": (2, {"pipe_parallel_size": 2}),
}
FP16 = {
    "fp16_pp2": (2, {"pipe_parallel_size": 2}),
    "fp16_tp2_sp_recompute": (2, LAYOUTS["tp2_sp_recompute"][1]),
    "fp16_dp2_zero2": (2, {"zero_optimization": {"stage": 2}, **PLAIN}),
    "fp16_dp2_zero3": (2, {"zero_optimization": {"stage": 3}, **PLAIN}),
}
"""GPT-NeoX alone. Their loss scale starts so high that the first tries of the first step overflow."""
HALF = {"megatron-core": {"bfloat16": BF16}, "gpt-neox": {"bfloat16": BF16, "fp16": FP16}}
OVERFLOW = {"fp16": {"initial_scale_power": 30, "hysteresis": 1}}


def families_of(engine: str, layout: str) -> tuple[str, ...]:
    if ENGINES[engine][layout][0] == 4:
        return ("neox_tied",)
    return tuple(family for family in FAMILIES if engine == "megatron-core" or family not in QKV_BIAS)


def marked(engine: str, *values: str) -> Any:
    return pytest.param((engine, *values), marks=[pytest.mark.neox] * (engine == "gpt-neox"), id="-".join((engine, *values)))


PAIRS = [marked(engine, layout, family) for engine in ENGINES for layout in ENGINES[engine] for family in families_of(engine, layout)]
RESUMED = {"megatron-core": RESUMES, "gpt-neox": (*RESUMES, "plain", "plain_dp2_zero1", "plain_dp2_zero2", "plain_dp2_zero3")}


def run_engine(engine: str, exports: Path, out: Path, first: list[dict[str, Any]]) -> Path:
    """Runs every case of an engine, one set of processes for each number of ranks; the directory of what they left."""
    cases: dict[int, list[dict[str, Any]]] = {1: first, 2: [], 4: []}
    for layout, (world, keys, accumulate) in ENGINES[engine].items():
        for family in families_of(engine, layout):
            neox = {**FAMILIES[family], **keys}
            case = {"engine": engine, "name": f"{layout}-{family}", "kind": "parity", "neox": neox, "accumulate": accumulate}
            case["qkv_bias"] = family in QKV_BIAS
            cases[world].append({**case, "load_hf": str(exports / f"export-{family}" / "hf")})
            if layout in RESUMED[engine] and family == "llama":
                cases[world].append({**case, "name": f"resume-{layout}", "kind": "resume"})
    for precision, half in HALF[engine].items():
        for name, (world, keys) in half.items():
            neox = {**FAMILIES["llama"], **keys, "precision": precision}
            extra = OVERFLOW if precision == "fp16" else {}
            cases[world].append({"engine": engine, "name": name, "kind": "resume", "neox": neox, "extra": extra})
    for world, plan in cases.items():
        run_ranks(world, plan, out)
    return out


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What megatron-core's cases left, and the HF models that every engine starts from."""
    out = tmp_path_factory.mktemp("engine")
    exports = [{"name": f"export-{f}", "kind": "export", "neox": FAMILIES[f], "qkv_bias": f in QKV_BIAS} for f in FAMILIES]
    return run_engine("megatron-core", out, out, exports)


@pytest.fixture(scope="module")
def neox_found(found: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_engine("gpt-neox", found, tmp_path_factory.mktemp("neox"), [])


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    engine, name, family = (*request.param, "")[:3]
    root: Path = request.getfixturevalue("found" if engine == "megatron-core" else "neox_found")
    return Case(engine, name, family, root)


@dataclass(frozen=True)
class Case:
    """One engine with one layout, and the directory of what every case of that engine left."""

    engine: str
    layout: str
    family: str
    root: Path

    @property
    def directory(self) -> Path:
        return self.root / (f"{self.layout}-{self.family}" if self.family else self.layout)

    @property
    def world(self) -> int:
        return ENGINES[self.engine][self.layout][0]


class Reference:
    """Three steps of a transformers model, each sequence on its own."""

    def __init__(self, directory: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="sdpa", dtype=torch.float32)
        seqs = sequences()
        with torch.no_grad():
            self.logits = torch.cat([model(torch.from_numpy(s)[None]).logits[0] for s in seqs])
        decayed = [p for p in model.parameters() if p.dim() > 1]
        self.start = self._hub(model)
        groups = [{"params": decayed}, {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        self.reports = [self._step(model, optimizer, step) for step in range(3)]
        self.weights = self._hub(model)
        with torch.no_grad():
            self.after = [self._logprobs(model, s)[0] for s in seqs]

    @staticmethod
    def _hub(model: Any) -> dict[str, np.ndarray[Any, Any]]:
        """Weights under the names of checkpoints: transformers renames GPT-NeoX's output matrix in memory."""
        rename = ("lm_head", "embed_out") if model.config.model_type == "gpt_neox" else ("", "")
        return {name.replace(*rename): p.detach().numpy().copy() for name, p in model.named_parameters()}

    @staticmethod
    def _logprobs(model: Any, sequence: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logp = model(torch.from_numpy(sequence)[None]).logits[0].log_softmax(-1)
        targets = torch.from_numpy(np.append(sequence[1:], 0))
        return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    def _step(self, model: Any, optimizer: torch.optim.Optimizer, step: int) -> list[float]:
        seqs = sequences(step)
        optimizer.zero_grad()
        sums = np.zeros(3)
        for sequence in seqs:
            loss, metrics = loss_fn(*self._logprobs(model, sequence), pack([sequence], len(sequence), seqs))
            loss.backward()
            sums += [loss.item(), metrics["entropy"].item(), metrics["logprob"].item()]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return [sums[0], float(norm), sums[1], sums[2], sum(len(s) - 1 for s in seqs)]


@pytest.fixture(scope="module")
def references(found: Path) -> dict[str, Reference]:
    return {family: Reference(found / f"export-{family}" / "hf") for family in FAMILIES}


@pytest.mark.parametrize("case", PAIRS, indirect=True)
def test_logits_equal_those_of_transformers(case: Case, references: dict[str, Reference]) -> None:
    ours, theirs = np.load(case.directory / "logits.npy"), references[case.family].logits.numpy()
    assert theirs.std() > 0.1
    np.testing.assert_allclose(ours[: len(theirs)], theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", PAIRS, indirect=True)
def test_loss_gradient_norm_and_metrics_of_three_steps(case: Case, references: dict[str, Reference]) -> None:
    """The first step is compared as computed; the later ones came through Adam, which magnifies the rounding of tiny gradients."""
    for rank in range(case.world):
        reports = np.load(case.directory / f"rank{rank}.npz")["reports"]
        np.testing.assert_allclose(reports[0], references[case.family].reports[0], rtol=1e-5, atol=1e-6, err_msg=f"rank {rank}")
        np.testing.assert_allclose(reports, references[case.family].reports, rtol=1e-4, atol=1e-5, err_msg=f"rank {rank}")


@pytest.mark.parametrize("case", PAIRS, indirect=True)
def test_weights_after_three_steps_under_hf_names(case: Case, references: dict[str, Reference]) -> None:
    """Relative to how far the weights moved: one weight decay too many, or a gradient too small by a factor, is far outside.

    The bound is that of the key biases: softmax does not see them, so their gradient is rounding alone, and Adam makes steps of it.
    """
    ours = np.load(case.directory / "rank0.npz")
    names = {name[2:]: name for name in ours.files if name.startswith("w.")}
    theirs = references[case.family].weights
    assert names.keys() == theirs.keys()
    for name, weight in theirs.items():
        moved, error = np.linalg.norm(weight - references[case.family].start[name]), np.linalg.norm(ours[names[name]] - weight)
        assert error <= 1e-2 * moved, f"{name}: off by {error:.2e} of {moved:.2e}"


@pytest.mark.parametrize("case", PAIRS, indirect=True)
def test_log_probs_on_every_rank_current_and_reference(case: Case, references: dict[str, Reference]) -> None:
    seqs, reference = sequences(), references[case.family]
    starts = np.concatenate([[0], np.cumsum([len(s) for s in seqs])])
    tempered = torch.log_softmax(reference.logits / 0.7, -1).numpy()
    for rank in range(case.world):
        data = np.load(case.directory / f"rank{rank}.npz")
        for part in range(2):
            at = 0
            for number in range(part, len(seqs), 2):
                own = slice(at, at + len(seqs[number]) - 1)
                at += len(seqs[number])
                np.testing.assert_allclose(data["after"][part][own], reference.after[number][:-1], atol=1e-4, rtol=0)
                rows = np.arange(starts[number], starts[number + 1] - 1)
                np.testing.assert_allclose(data["reference"][part][own], tempered[rows, seqs[number][1:]], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", PAIRS, indirect=True)
def test_hf_weights_come_back_bit_by_bit(case: Case) -> None:
    assert np.load(case.directory / "rank0.npz")["exact"]


RESUME_CASES = [marked(engine, f"resume-{layout}") for engine, layouts in RESUMED.items() for layout in layouts]
HALF_CASES = [marked(engine, name) for engine in ENGINES for half in HALF[engine].values() for name in half]


@pytest.mark.parametrize("case", RESUME_CASES + HALF_CASES, indirect=True)
def test_resume_is_bit_exact(case: Case) -> None:
    ranks = sorted(case.directory.glob("rank*.npz"))
    assert ranks
    for path in ranks:
        data = np.load(path)
        assert data["client"]
        np.testing.assert_array_equal(data["continued"], data["whole"])
        np.testing.assert_array_equal(data["reference"], data["kept"], err_msg="the reference policy is the one that was set")
        for key in data.files:
            if key.startswith("w."):
                np.testing.assert_array_equal(data[f"r.{key[2:]}"], data[key], err_msg=key)


@pytest.mark.parametrize("case", HALF_CASES, indirect=True)
def test_half_precision_follows_fp32(case: Case) -> None:
    """bf16 keeps 8 bits, fp16 11: the loss of the same four steps stays near, and the weights move with fp32 main weights."""
    half, fp32 = (np.load(directory / "rank0.npz")["whole"] for directory in (case.directory, case.root / "resume-one"))
    bound = 2e-3 if case.layout.startswith("fp16") else 2e-2
    np.testing.assert_allclose(half[:, [0, 2, 3]], fp32[:, [0, 2, 3]], rtol=bound, atol=bound)
    if case.layout.startswith("fp16"):
        saved, resumed = np.load(case.directory / "rank0.npz")["scales"]
        assert 1 < saved == resumed < 2**30, "it was lowered, and a resume keeps it"
    np.testing.assert_array_equal(half[:, 4], fp32[:, 4], err_msg="tokens of a step are counted once, however often it is tried")


@pytest.mark.parametrize("case", [marked(engine, "resume-one") for engine in ENGINES], indirect=True)
def test_initial_weights_do_not_depend_on_the_layout(case: Case) -> None:
    """Resume cases start from the seed alone; their first reports agree although the layouts differ."""
    reports = {layout: np.load(case.root / f"resume-{layout}" / "rank0.npz")["whole"] for layout in RESUMED[case.engine]}
    for layout, report in reports.items():
        np.testing.assert_allclose(report, reports["one"], rtol=1e-4, err_msg=layout)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_export_holds_what_was_trained_and_its_config(found: Path, family: str) -> None:
    directory = found / f"export-{family}" / "hf"
    config = AutoConfig.from_pretrained(directory)
    assert config.vocab_size == VOCAB
    assert config.tie_word_embeddings != FAMILIES[family].get("no_weight_tying", True)
    tensors = load_file(directory / "model.safetensors")
    expected = np.load(found / f"export-{family}" / "tensors.npz")
    assert tensors.keys() == set(expected.files)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor.numpy(), expected[name])
