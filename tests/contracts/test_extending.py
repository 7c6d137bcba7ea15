"""The examples of docs/EXTENDING.md, taken out of the page itself: text and test cannot part."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from neox_rl.config.load import load_config
from neox_rl.config.machine import Machine
from neox_rl.config.neox import NeoXConfig
from neox_rl.config.run import RunConfig
from neox_rl.config.schema import MetaRLConfig, ObjectiveConfig, ProblemsConfig, VerifyConfig
from neox_rl.engines.port import Engine
from neox_rl.engines.registry import build_engine
from neox_rl.errors import ConfigError
from neox_rl.loss.inputs import TokenInputs
from neox_rl.loss.policy import objective
from neox_rl.problems.sources import load_problems
from neox_rl.run import search_cli
from neox_rl.types import Reason
from neox_rl.verify.verifier import make_verifier
from tests.contracts.one_rank import one_rank
from tests.e2e.runs import Run
from tests.invariance.engine_batches import VOCAB, loss_fn, sequences, split

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs/EXTENDING.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"```python\n# (my_lab/\w+\.py)\n(.*?)```", TEXT, re.DOTALL))
SETTINGS = [yaml.safe_load(block)["metarl"] for block in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)]
NEOX = NeoXConfig(
    hidden_size=32,
    num_attention_heads=2,
    num_layers=2,
    seq_length=32,
    norm="rmsnorm",
    activation="swiglu",
    intermediate_size=96,
    use_bias_in_norms=False,
    use_bias_in_attn_linear=False,
    use_bias_in_mlp=False,
)


@pytest.fixture(autouse=True)
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every example as the module that its first line names, importable here and in processes that are started."""
    for name, code in EXAMPLES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    one_rank(monkeypatch)


def built(**keys: object) -> Iterator[Engine]:
    engine = build_engine(RunConfig(NEOX, MetaRLConfig(**keys)), VOCAB)  # type: ignore[arg-type]
    yield engine
    engine.close()


def test_every_line_of_config_on_the_page_loads(lab: Path) -> None:
    tokenizer = ["metarl.tokenizer.path=somewhere", "metarl.rollout.generator=vllm"]
    assert len(SETTINGS) == 5 and len(EXAMPLES) == 6
    for number, block in enumerate(SETTINGS):
        (lab / f"{number}.yml").write_text(yaml.safe_dump({"metarl": block}))
        more = tokenizer if "problems" in block else []
        files = [ROOT / "configs/debug/fake_generator.yml", lab / f"{number}.yml"]
        if more:
            keys = yaml.safe_load(files[0].read_text())
            del keys["metarl"]["problems"], keys["metarl"]["rollout"]["generator"]
            files[0] = lab / "free_text.yml"
            files[0].write_text(yaml.safe_dump(keys))
            (lab / "somewhere").mkdir()
            (lab / "somewhere/tokenizer.json").write_text("{}")
        load_config(files, more, Machine((0, 1)))


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("metarl.objective.loss=my_lab.objectives:grpo", "has no attribute 'grpo'"),
        ("metarl.objective.loss=grpo", "or package.module:name"),
        ("metarl.engine=my_lab.nowhere:Engine", "No module named 'my_lab.nowhere'"),
        ("metarl.patches=[my_lab.seams:tell_largest]", "is no megatron_patches.Patch"),
        ("metarl.patches=[largest]", "names nothing that can be imported"),
        ("metarl.hf_layout=my_lab.phi3:config", "HfLayout"),
        ("metarl.problems.source=my_lab.letters:MARK", "is no function or a class"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_line_before_anything_starts(setting: str, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(setting.partition("=")[0])) as caught:
        load_config([ROOT / "configs/debug/fake_generator.yml"], [setting], Machine((0, 1)))
    assert says in str(caught.value)


def test_objective() -> None:
    """Two tokens of each sign, sampled more often and less often than now."""
    ratios = torch.tensor([2.0, 0.5, 2.0, 0.5])
    logprobs = torch.log(ratios * 0.25).requires_grad_()
    advantages, same = torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.full((4,), 0.25).log()
    inputs = TokenInputs(logprobs, same, same, same, same, advantages, torch.ones(4), torch.zeros(4), torch.zeros(4))
    loss, sums = objective(ObjectiveConfig(loss="my_lab.objectives:topr"))(inputs, ObjectiveConfig())
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    assert gradient.tolist() == [-1.0, -1.0, 1.0, 0.5] and {k: int(v) for k, v in sums.items()} == {"truncated_frac/tokens": 1}


@pytest.mark.usefixtures("alone")
def test_engine_and_seam(lab: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for engine in built(engine="my_lab.engines:Profiled", patches=("my_lab.seams:LARGEST",)):
        reports = [engine.step(split(sequences(), 1), loss_fn, 1e-3) for _ in range(5)]
    assert "aten::mm" in (lab / "step5.0.json").read_text()
    told = [float(norm) for norm in re.findall(r"largest gradient: norm (\S+) of a tensor \[\d+", caplog.text)]
    assert len(told) == 5 and all(0 < norm <= report.grad_norm * 1.01 for norm, report in zip(told, reports, strict=True))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("engine_name", ["megatron-core", pytest.param("gpt-neox", marks=pytest.mark.neox)])
def test_names_of_weights(lab: Path, engine_name: str) -> None:
    """transformers' Phi-3 computes what the engine computes, and the engine reads back what it wrote."""
    for engine in built(engine=engine_name, hf_layout="my_lab.phi3:LAYOUT"):
        engine.save_hf(lab / "phi3")
        model = AutoModelForCausalLM.from_pretrained(lab / "phi3", dtype=torch.float32)
        assert type(model).__name__ == "Phi3ForCausalLM"
        names = dict(engine.named_tensors())
        assert {"model.layers.1.self_attn.qkv_proj.weight", "model.layers.1.mlp.gate_up_proj.weight"} < set(names)
        ours, tokens = engine.logprobs(split(sequences(), 1))[0], torch.from_numpy(sequences()[0])
        with torch.no_grad():
            theirs = model(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        np.testing.assert_allclose(ours[: len(tokens) - 1], theirs.numpy(), atol=1e-5)
        engine.step(split(sequences(), 1), loss_fn, 1e-2)
        engine.load_hf(lab / "phi3")
        assert all(torch.equal(tensor, names[name]) for name, tensor in engine.named_tensors())


def test_problem_source_and_checker() -> None:
    cfg = ProblemsConfig(source="my_lab.letters:letters", task="my_lab.letters:LettersVerifier")
    problems, verifier = load_problems(cfg, 1), make_verifier(VerifyConfig(), cfg.task)
    assert problems.heldout and not {p.cluster for p in problems.train} & {p.cluster for p in problems.heldout}
    problem = problems.train[0]
    for text, reason in ((str(problem.meta["solution"]), Reason.MATCH), ("answer: zzz", Reason.MISMATCH), ("", Reason.NO_ANSWER)):
        assert verifier.check_sync(problem, text).reason is reason
    verifier.close()


def test_search_strategy(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (lab / "hands.jsonl").write_text('{"numbers": [1, 3, 4, 6]}\n')
    line = next(line for line in TEXT.splitlines() if line.startswith("python -m neox_rl.search"))
    assert search_cli.main(line.split()[3:]) == 0
    (row,) = [json.loads(text) for text in capsys.readouterr().out.splitlines() if '"solved"' in text][:1]
    assert row["nodes"] > 1


def test_a_whole_run_with_parts_of_its_own(lab: Path) -> None:
    run = Run(lab, "own", "train_iters=2", "metarl.objective.loss=my_lab.objectives:topr", "metarl.patches=[my_lab.seams:LARGEST]")
    assert run.wait() == 0, run.said()
    assert [row["step"] for row in run.metrics() if row["phase"] == "rl"] == [1, 2] and "truncated_frac" in run.metrics()[-1]
    assert "largest gradient" in "".join(path.read_text(errors="replace") for path in (run.paths.root / "logs").iterdir())
