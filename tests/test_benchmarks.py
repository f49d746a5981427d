"""Races where there is no GPU: the gate, the table, cases and what they count, going on."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import (
    attention,
    block,
    command,
    contest,
    ffn,
    harness,
    layernorm,
    loss,
    passes,
    train,
)
from benchmarks.contest import Case, Contestant, Given, Run, Work
from benchmarks.diary import Event

CPU = torch.device("cpu")
RACES = [attention, layernorm, loss, ffn, block, train]


@dataclass(frozen=True)
class Square:
    """A case whose operator squares x; ``measured`` hears of every one that is given."""

    name: str
    measured: list[str]

    def given(self, device: torch.device) -> Given:
        self.measured.append(self.name)
        x = torch.randn(8, device=device).requires_grad_()
        dout = torch.randn(8, device=device)
        wide = x.detach().double()
        exact = [wide**2, 2 * wide * dout]
        return Given({"x": x}, [x], dout, lambda got: contest.relative_error(got, exact))

    def work(self) -> dict[str, Work]:
        return {"fwd": Work(8e6, 64e6), "bwd": Work(16e6, 96e6), "step": Work(24e6, 96e6)}


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        return 2.1 * ctx.saved_tensors[0] * dout


def _squares(square: Callable[[Tensor], Tensor]) -> Callable[[Any, dict[str, Any]], Run]:
    return lambda case, values: lambda: square(values["x"])


def _refuses(case: Any, values: dict[str, Any]) -> Run:
    raise ValueError("it takes\n  no such case")


def _missing(case: Any, values: dict[str, Any]) -> Run:
    importlib.import_module("no_such_package")
    raise AssertionError


def _out_of_memory(case: Any, values: dict[str, Any]) -> Run:
    def run() -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    return run


CONTESTANTS = [
    Contestant("right", _squares(lambda x: x**2)),
    Contestant("wrong", _squares(lambda x: 1.1 * x**2)),
    Contestant("wrong gradient", _squares(_WrongGradient.apply)),
    Contestant("nan", _squares(lambda x: x**2 + math.nan)),
    Contestant("refuses", _refuses),
    Contestant("missing", _missing),
    Contestant("large", _out_of_memory),
    Contestant("right too", _squares(lambda x: x * x)),
]


def test_who_is_wrong_has_no_number() -> None:
    lines = list(harness.results_of(Square("one", []), CONTESTANTS, CPU))
    problems = {line["contestant"]: line["problem"] for line in lines if "problem" in line}
    assert problems.keys() == {c.name for c in CONTESTANTS} - {"right", "right too"}
    assert problems["wrong"] == "error 0.1, allowed 0.02"
    assert problems["wrong gradient"] == "error 0.05, allowed 0.02"
    assert problems["nan"] == "error nan, allowed 0.02"
    assert problems["refuses"] == "it takes no such case"
    assert problems["missing"] == "no_such_package is not installed"
    begun = [line["contestant"] for line in lines if line.get("event") == Event.BEGUN]
    assert begun == [contestant.name for contestant in CONTESTANTS]
    assert problems["large"] == "CUDA out of memory"
    timed = [line for line in lines if "us" in line]
    assert [(line["contestant"], line["pass"]) for line in timed] == [
        (name, way) for way in ("fwd", "bwd", "step") for name in ("right", "right too")
    ]
    for line in timed:
        assert line["us"] > 0 and line["host_us"] > 0 and line["error"] < 1e-6
        intensity = {"fwd": 8, "bwd": 6, "step": 4}[line["pass"]]
        assert line["tbps"] / line["tflops"] == pytest.approx(intensity, 0.01)


def test_all_of_a_contestants_work_is_within_its_context() -> None:
    """First steps, passes and times, backwards too."""
    inside: list[bool] = [False]
    seen: list[bool] = []

    @contextlib.contextmanager
    def within() -> Iterator[None]:
        inside[0] = True
        yield
        inside[0] = False

    def watched(x: Tensor) -> Tensor:
        seen.append(inside[0])
        y = x**2
        if y.requires_grad:
            y.register_hook(lambda gradient: seen.append(inside[0]))
        return y

    one = Contestant("one", _squares(watched), within=within)
    lines = list(harness.results_of(Square("one", []), [one, CONTESTANTS[0]], CPU))
    assert len([line for line in lines if "us" in line]) == 6
    assert len(seen) > 8 and all(seen) and not inside[0]
    ((_, _, problem),) = harness.first_steps(Square("one", []), [one], CPU)
    assert problem is None and all(seen)


def test_a_race_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    measured: list[str] = []
    cases, file = [Square(name, measured) for name in "abc"], tmp_path / "race.jsonl"
    head = {"gpu": "H200", "torch": "2", "commit": "abc", "date": "today"}

    def race(cases: list[Any], end: float, **changes: str) -> tuple[list[dict[str, Any]], int]:
        return harness.race(cases, CONTESTANTS[:1], CPU, {**head, **changes}, file, end)

    late = time.monotonic() + 60.0
    assert race(cases[:1], late)[1] == 0
    assert race(cases, end=0.0)[1] == 2, "no time for what is new"
    lines, missed = race(cases, late, date="tomorrow")
    assert [line["case"] for line in lines] == list("aaabbbccc") and measured == list("abc")
    assert missed == 0
    assert [line["date"] for line in lines] == ["today"] * 3 + ["tomorrow"] * 6
    race(cases[:1], late, commit="def")
    assert measured[3:] == ["a"], "another commit's kernels"
    written = [*map(json.loads, file.read_text().splitlines())]
    assert sum("us" in line for line in written) == 12


def _ends_the_process(case: Any, values: dict[str, Any]) -> Run:
    raise KeyboardInterrupt


def test_a_race_goes_on_without_whom_it_ended_with(tmp_path: Path) -> None:
    """The case is measured again, in another process; after two of them nobody asks again."""
    cases, file = [Square(name, []) for name in "abc"], tmp_path / "race.jsonl"
    head = {"gpu": "H200", "torch": "2", "commit": "abc"}
    three = [CONTESTANTS[0], Contestant("crashes", _ends_the_process), CONTESTANTS[-1]]
    late = time.monotonic() + 60.0
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            harness.race(cases, three, CPU, head, file, late)
    lines, missed = harness.race(cases, three, CPU, head, file, late)
    assert missed == 0
    problems = [(line["case"], line["problem"]) for line in lines if "problem" in line]
    assert problems == [
        ("a", "hung or crashed"),
        ("b", "hung or crashed"),
        ("c", "hung or crashed in 2 cases"),
    ]
    for case in "abc":
        timed = [line["contestant"] for line in lines if line["case"] == case and "us" in line]
        assert timed == ["right", "right too"] * 3


def test_a_lost_context_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But only the one who lost it has no number."""
    case, file = Square("a", []), tmp_path / "race.jsonl"
    head = {"gpu": "H200", "torch": "2", "commit": "abc"}
    three = [CONTESTANTS[0], CONTESTANTS[4], CONTESTANTS[-1]]
    late = time.monotonic() + 60.0
    monkeypatch.setattr(harness, "_context_lives", lambda device: False)
    with pytest.raises(harness.ContextLost, match="refuses"):
        harness.race([case], three, CPU, head, file, late)
    file.write_text(file.read_text() + '{"case": "a", "con')  # torn, by a kill or a full disk
    lines, _ = harness.race([case], three, CPU, head, file, late)
    assert [line["problem"] for line in lines if "problem" in line] == ["it takes no such case"]
    assert {line["contestant"] for line in lines if "us" in line} == {"right", "right too"}
    again, _ = harness.race([case], three, CPU, head, file, late)
    assert again == lines, "whole lines behind the torn one"


@pytest.mark.parametrize("cut", [True, False])
def test_a_cut_is_no_hang(cut: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(calls: object, device: object) -> list[list[float]]:
        raise SystemExit(143) if cut else KeyboardInterrupt

    case, file = Square("a", []), tmp_path / "race.jsonl"
    head = {"gpu": "H200", "torch": "2", "commit": "abc"}
    late = time.monotonic() + 60.0
    with monkeypatch.context() as patch:
        patch.setattr(harness, "times_of", ended)
        for _ in range(2):
            with pytest.raises((SystemExit, KeyboardInterrupt)):
                harness.race([case], CONTESTANTS[:1], CPU, head, file, late)
    lines, _ = harness.race([case], CONTESTANTS[:1], CPU, head, file, late)
    problems = [line["problem"] for line in lines if "problem" in line]
    assert problems == ([] if cut else ["hung or crashed when times were taken, twice"])
    assert any("us" in line for line in lines) == cut


def test_the_table_has_a_cell_for_every_time_and_none_for_what_failed() -> None:
    lines: list[dict[str, Any]] = [
        {"case": "a", "contestant": "right", "pass": "fwd", "us": 1.0, "tflops": 300.4},
        {"case": "a", "contestant": "right too", "pass": "fwd", "us": 1.0, "tflops": 512.0},
        {"case": "a", "contestant": "wrong", "problem": "error 0.3, allowed 0.02"},
        {"case": "b", "contestant": "wrong", "problem": "error 0.3, allowed 0.02"},
        {"case": "b", "problem": "CUDA out of memory"},
    ]
    three = [CONTESTANTS[0], CONTESTANTS[1], CONTESTANTS[-1]]
    head, row = command.table(lines, three, "tflops").splitlines()
    assert head.split() == ["tflops", "pass", "right", "wrong", "right", "too"]
    assert row.split() == ["a", "fwd", "300.4", "-", "512"]
    assert command.problems(lines).splitlines() == [
        "wrong: error 0.3, allowed 0.02 (a and 1 more)", "all: CUDA out of memory (b)",
    ]  # fmt: skip


def test_a_race_may_be_of_some() -> None:
    assert command.chosen(CONTESTANTS, None) == CONTESTANTS
    some = command.chosen(CONTESTANTS, ["right too", "another race's", "right"])
    assert [one.name for one in some] == ["right", "right too"]
    with pytest.raises(SystemExit, match="right, wrong, wrong gradient"):
        command.chosen(CONTESTANTS, ["another race's"])


@pytest.mark.parametrize("module", RACES, ids=lambda module: module.__name__)
def test_cases_have_names_of_their_own(module: ModuleType) -> None:
    for dry in (True, False):
        cases: list[Case] = module.grid(dry)
        assert len({case.name for case in cases}) == len(cases) > 1
        for case in cases:
            assert case.work() and case.work().keys() <= passes.WAYS.keys()
            assert all(work.flops > 0 and work.bytes > 0 for work in case.work().values())
    assert len({contestant.name for contestant in module.CONTESTANTS}) == len(module.CONTESTANTS)


@pytest.mark.parametrize(
    "module",
    [pytest.param(m, marks=[] if m in (layernorm, train) else [pytest.mark.slow]) for m in RACES],
    ids=lambda module: module.__name__,
)
def test_every_adapter_runs_or_says_why_not(module: ModuleType) -> None:
    """In one sentence; of what comes with PyTorch, all that runs on a CPU is right."""
    case = module.grid(True)[0]
    lines = list(harness.results_of(case, module.CONTESTANTS, CPU))
    problems = {line["contestant"]: line["problem"] for line in lines if "problem" in line}
    timed = {line["contestant"] for line in lines if "us" in line}
    assert timed | problems.keys() == {contestant.name for contestant in module.CONTESTANTS}
    assert "eager" in timed
    assert not [reason for reason in problems.values() if reason.startswith("error")]


def test_attention_counts_the_visible_pairs() -> None:
    full = attention.Case(64, 4)
    causal = replace(full, features=("causal",))
    pairs = torch.ones(4, 4).tril().sum().item()
    assert full.work()["fwd"].flops == 4 * 64 * 16 * full.batch * full.heads
    assert causal.work()["fwd"].flops / full.work()["fwd"].flops == pairs / 16
    one = replace(full, queries=1)
    assert one.work()["fwd"].flops / full.work()["fwd"].flops == 1 / 4
    given = replace(full, tokens=8, model_dim=128).given(CPU).values
    size = sum(given[name].nbytes for name in ("q", "k", "v"))
    assert replace(full, tokens=8, model_dim=128).work()["fwd"].bytes == size * 4 / 3


@pytest.mark.parametrize("wrong", [0.0, 0.1, math.nan])
def test_attention_sees_one_wrong_tensor_of_one_head(wrong: float) -> None:
    exact = [torch.randn(1, 2, 3, 4, dtype=torch.float64) for _ in range(4)]
    got = [torch.cat([t, torch.full_like(t, math.nan)], 1) for t in exact]  # heads beside it
    got[2][:, :2] *= 1 + wrong
    error = attention.error_of(exact, got)
    if math.isnan(wrong):
        assert math.isnan(error)
    else:
        assert error == pytest.approx(wrong)


def test_norms_move_each_tensor_once() -> None:
    plain, fused = (layernorm.Case(64, residual=r, rows=8) for r in (False, True))
    assert (
        plain.work()["fwd"].bytes == 2 * 8 * 64 * 2 and fused.work()["fwd"].bytes == 4 * 8 * 64 * 2
    )
    assert layernorm.Case(256).N == layernorm.MOST_ROWS and layernorm.Case(16384).N == 4096


def test_gated_networks_have_a_product_more() -> None:
    plain, gated = ffn.Case(16, 32), ffn.Case(16, 32, "swiglu")
    assert plain.work()["fwd"].flops == 2 * 2 * ffn.TOKENS * 16 * 32
    assert gated.work()["step"].flops / plain.work()["step"].flops == 1.5


def test_a_step_of_the_loss_writes_what_it_reads() -> None:
    alone, layer = loss.Case(40, rows=16), loss.Case(40, width=8, rows=16)
    assert (
        alone.work()["fwd"].bytes == 16 * 40 * 2 and alone.work()["step"].bytes == 2 * 16 * 40 * 2
    )
    assert layer.work()["step"].flops == 3 * 2 * 16 * 40 * 8
