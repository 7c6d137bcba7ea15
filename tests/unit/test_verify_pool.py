"""The worker pool: one verdict from every context, a hard deadline, and nothing left behind. And the command that checks files."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from neox_rl.config.schema import VerifyConfig
from neox_rl.types import Json, Problem, Reason
from neox_rl.verify.__main__ import main as check_file
from neox_rl.verify.pool import VerifierPool
from neox_rl.verify.verifier import make_verifier, readable_gold

REPO = Path(__file__).resolve().parents[2]
HASTY_S, PATIENT_S = 1.0, 60.0
"""The pool's deadline where a check is to reach it, and where it is not: a machine that stands still for a second changes no verdict."""


@pytest.fixture(scope="module")
def made() -> Iterator[VerifierPool]:
    with VerifierPool(workers=1) as pool:
        yield pool


@pytest.fixture
def pool(made: VerifierPool) -> VerifierPool:
    made.deadline_s = PATIENT_S
    return made


def problem(gold: str) -> Problem:
    return Problem("p", "math", "", gold, "c")


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until_gone(pids: list[int], deadline_s: float = 30.0) -> list[int]:
    end = time.monotonic() + deadline_s
    while (left := [p for p in pids if alive(p)]) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def test_the_same_verdict_from_the_main_thread_a_thread_and_asyncio(pool: VerifierPool) -> None:
    cases = [
        ("1/2", r"\boxed{\frac{2}{4}}", Reason.MATCH),
        (r"\sqrt{12}", r"2\sqrt{3}", Reason.MATCH),
        ("x+1", "x+2", Reason.MISMATCH),
        ("5", "", Reason.NO_ANSWER),
    ]
    for gold, text, reason in cases:
        here = pool.check_sync(problem(gold), text)
        with ThreadPoolExecutor(1) as thread:
            there = thread.submit(pool.check_sync, problem(gold), text).result()
        awaited = asyncio.run(pool.check(problem(gold), text))
        assert [v.reason for v in (here, there, awaited)] == [reason] * 3
        assert here.extracted == there.extracted == awaited.extracted


def test_many_checks_at_once(pool: VerifierPool) -> None:
    async def run() -> list[bool]:
        return [
            v.correct for v in await asyncio.gather(*(pool.check(problem(str(i)), rf"\boxed{{{2 * (i - i % 2)}/2}}") for i in range(60)))
        ]

    assert asyncio.run(run()) == [i % 2 == 0 for i in range(60)]


def test_a_check_beyond_the_deadline_is_a_timeout_and_the_next_one_is_served_at_once(
    pool: VerifierPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neox_rl.verify.pool.KILL_S", PATIENT_S)
    template = pool._slots[0]._process
    [child] = children(template.pid)
    before = pool.counts[Reason.TIMEOUT]
    started = time.monotonic()
    os.kill(child, signal.SIGSTOP)
    pool.deadline_s = HASTY_S
    verdict = pool.check_sync(problem(r"\frac{1}{2}"), "0.5")
    assert verdict.reason is Reason.TIMEOUT and not verdict.correct
    assert time.monotonic() - started < PATIENT_S
    assert pool._slots[0]._process is template, "the replacement is forked: it need not import sympy"
    pool.deadline_s = PATIENT_S
    assert pool.check_sync(problem("1/2"), r"\frac{3}{6}").correct
    assert pool.counts[Reason.TIMEOUT] == before + 1
    assert not alive(child)


def test_a_child_that_dies_is_an_error_and_is_replaced(pool: VerifierPool) -> None:
    [child] = children(pool._slots[0]._process.pid)
    os.kill(child, signal.SIGKILL)
    assert pool.check_sync(problem("x"), "x").reason in (Reason.ERROR, Reason.MATCH)
    assert pool.check_sync(problem("x"), "x").correct


def test_a_template_that_dies_is_replaced(pool: VerifierPool) -> None:
    pool._slots[0]._process.kill()
    pool._slots[0]._process.wait()
    assert pool.check_sync(problem("x"), "x").reason is Reason.TIMEOUT
    assert pool.check_sync(problem("x"), "x").correct


HOSTILE = {
    "tower": "9**9**9**9",
    "latex tower": r"\boxed{9^{9^{9^9}}}",
    "factorial": r"\boxed{(10^9)!}",
    "binomial": r"\binom{10^9}{5 \cdot 10^8}",
    "sum": r"\sum_{i=1}^{10^9} \frac{1}{i^2}",
    "expansion": "(x+y+z+w+1)^{200}",
    "parentheses": "(" * 3000 + "1" + ")" * 3000,
    "boxes": r"\boxed{" * 3000 + "1" + "}" * 3000,
    "open boxes": r"\boxed{" * 50_000,
    "terms": "+".join(["x^2"] * 2000),
    "digits": "9" * 1_000_000,
    "boxed digits": r"\boxed{" + "9" * 1_000_000 + "}",
    "nul": "\0" * 1000 + "3",
    "surrogates": "\ud800\udfff \\boxed{\ud83d}",
    "digits of another script": "\u0661\u0662" * 50_000,
    "combining": "a" + "\u0301" * 200_000,
    "dollars": "$ " * 100_000,
    "answers": "the answer is " * 20_000,
    "spaces": " " * 1_000_000,
    "integral": r"\int_0^{\infty} \frac{\sin(x^{x^{x}})}{\Gamma(x)} dx",
    "matrix": r"\begin{pmatrix}" + r"\\".join(["&".join(["x"] * 40)] * 40) + r"\end{pmatrix}",
}


@pytest.mark.parametrize("gold", ["24", r"\frac{x}{2}"])
def test_hostile_answers_end_in_time_as_a_verdict(pool: VerifierPool, gold: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neox_rl.verify.pool.KILL_S", PATIENT_S)
    pool.deadline_s = HASTY_S
    for name, text in HOSTILE.items():
        started = time.monotonic()
        verdict = pool.check_sync(problem(gold), text)
        assert not verdict.correct, name
        assert time.monotonic() - started < PATIENT_S, name
        verdict.extracted.encode("utf-8")


def test_answers_are_never_executed(pool: VerifierPool, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    code = f"__import__('os').system('touch {mark}')"
    for text in (code, rf"\boxed{{{code}}}", f"${code}$", f"the answer is {code}", rf"\text{{{code}}}"):
        assert not pool.check_sync(problem("24"), text).correct
        assert not pool.check_sync(problem(text), "24").correct
    assert not mark.exists()


def test_gold_answers_are_checked_when_problems_are_loaded(pool: VerifierPool) -> None:
    assert pool.check_gold(problem(r"\frac{1}{2}")).correct
    assert pool.check_gold(problem("0/0")).reason is Reason.BAD_GOLD


def test_problems_with_a_gold_answer_that_cannot_be_read_are_told_apart(pool: VerifierPool) -> None:
    problems = [replace(problem(gold), id=gold) for gold in ("5", "0/0", r"\sqrt{2}", "")]
    kept, dropped = readable_gold(pool, problems)
    assert [p.id for p in kept] == ["5", r"\sqrt{2}"] and dropped == ("0/0", "")
    assert readable_gold(pool, []) == ((), ())


def test_a_game_with_another_answer_than_its_target_is_not_readable() -> None:
    meta: dict[str, Json] = {"numbers": [3, 5, 7], "target": 26}
    games = [Problem(f"g{i}", "countdown", "", answer, "c", meta) for i, answer in enumerate(("26", "", "27"))]
    kept, dropped = readable_gold(make_verifier(VerifyConfig(), "countdown"), games)
    assert [p.id for p in kept] == ["g0", "g1"] and dropped == ("g2",)


def test_close_leaves_no_process() -> None:
    pool = VerifierPool(workers=2)
    pids = [slot._process.pid for slot in pool._slots]
    pids += [child for pid in pids for child in children(pid)]
    assert len(pids) == 4
    pool.close()
    pool.close()
    assert not wait_until_gone(pids)
    with pytest.raises(RuntimeError, match="closed"):
        pool.check_sync(problem("1"), "1")


def test_workers_end_when_their_parent_is_killed() -> None:
    show = "print(pool._slots[0]._process.pid, flush=True); time.sleep(60)"
    program = f"import time; from neox_rl.verify.pool import VerifierPool; pool = VerifierPool(); {show}"
    with subprocess.Popen([sys.executable, "-c", program], cwd=REPO, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        template = int(parent.stdout.readline())
        pids = [template, *children(template)]
        parent.kill()
    assert len(pids) == 2 and not wait_until_gone(pids)


def run_command(task: str, rows: list[object], tmp_path: Path) -> tuple[list[dict[str, object]], dict[str, object]]:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "neox_rl.verify", "--task", task, "--deadline-s", str(PATIENT_S), str(file)],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    *lines, summary = (json.loads(line) for line in done.stdout.splitlines())
    return lines, summary["summary"]


def test_the_command_checks_a_file_of_math_answers(tmp_path: Path) -> None:
    rows: list[object] = [
        {"id": "a", "gold": "1/2", "pred": "0.5", "expected": True},
        {"id": "b", "gold": "7", "pred": "8", "expected": False},
        {"gold": 3, "pred": r"\boxed{3}", "expected": False},
        {"id": "c", "gold": "9", "pred": "\ud800", "expected": True},
        "not json",
        {"id": "d", "gold": "1"},
    ]
    lines, summary = run_command("math", rows, tmp_path)
    assert [r["correct"] for r in lines] == [True, False, True, False, False, False]
    assert [r["reason"] for r in lines] == ["match", "mismatch", "match", "no_answer", "malformed", "malformed"]
    assert [r.get("id") for r in lines] == ["a", "b", None, "c", None, "d"]
    assert "line 5 is not JSON" in str(lines[4]["error"]) and "pred" in str(lines[5]["error"])
    assert (summary["false_negatives"], summary["false_positives"], summary["accuracy"]) == (1, 1, 0.5)
    assert (summary["rows"], summary["malformed"], summary["false_negative_rate"]) == (6, 2, 0.5)


def test_the_command_checks_arithmetic(tmp_path: Path) -> None:
    lines, _ = run_command("game24", [{"numbers": [4, 6, 7, 7], "pred": "4*6*7/7"}, {"numbers": [4, 6, 7, 7], "pred": "4*6*1*1"}], tmp_path)
    assert [r["correct"] for r in lines] == [True, False]
    lines, _ = run_command(
        "countdown", [{"nums": [3, 5, 7], "target": 26, "pred": "solution 7 * 3 + 5"}, {"nums": [3], "pred": "3"}], tmp_path
    )
    assert [r["reason"] for r in lines] == ["match", "malformed"]


def test_the_command_says_what_is_wrong_with_its_arguments(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "neox_rl.verify", "--task", "math", str(tmp_path / "none.jsonl")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2 and "none.jsonl: No such file" in done.stderr


@pytest.mark.parametrize(("setting", "verdict"), [("marked_answers=false", "match"), ("marked_answers=true", "no_answer")])
def test_the_command_line_takes_the_policies_of_the_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, verdict: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"gold": "42", "pred": "I think that it is 42"}) + "\n")
    assert check_file(["--task", "math", "--deadline-s", str(PATIENT_S), "--policy", setting, str(file)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["reason"] == verdict


@pytest.mark.parametrize(("setting", "word"), [("marked_answer=true", "marked_answers"), ("rounded_digits=0", ">= 1"), ("x", "no key 'x'")])
def test_a_policy_that_is_none_is_named(capsys: pytest.CaptureFixture[str], setting: str, word: str) -> None:
    with pytest.raises(SystemExit) as error:
        check_file(["--task", "math", "--policy", setting, "none.jsonl"])
    assert error.value.code == 2 and word in capsys.readouterr().err
