"""``benchmarks.attention`` where there is no GPU: its cases, its gate, its table."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import attention
from benchmarks.attention import Case


def test_cases_have_names_of_their_own_and_one_size() -> None:
    cases = attention.grid()
    assert len({case.name for case in cases}) == len(cases) > 20
    assert {case.batch * case.T for case in cases} == {16384}
    assert all(2048 - case.D < case.heads * case.D <= 2048 for case in cases)


def test_flops_are_those_of_the_visible_pairs() -> None:
    full, causal = Case(64, 4), Case(64, 4, ("causal",))
    pairs = torch.ones(4, 4).tril().sum().item()
    assert full.flops() == 4 * 64 * 16 * full.batch * full.heads
    assert causal.flops() / full.flops() == pairs / 16


@pytest.mark.parametrize("wrong", [0.0, 0.1, math.nan])
def test_the_gate_sees_one_wrong_tensor(wrong: float) -> None:
    exact = [torch.randn(1, 2, 3, 4, dtype=torch.float64) for _ in range(4)]
    got = [torch.cat([t, torch.full_like(t, math.nan)], 1) for t in exact]  # heads beside it
    got[2][:, :2] *= 1 + wrong
    error = attention.error_of(Case(64, 4), got, exact)
    if math.isnan(wrong):
        assert math.isnan(error) and not error <= attention.MOST_ERROR
    else:
        assert error == pytest.approx(wrong)


def test_a_race_goes_on_where_it_was_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def results(case: Case) -> Iterator[dict[str, Any]]:
        measured.append(case.name)
        yield {"case": case.name, "backend": "cuda", "pass": "fwd", "us": 1.0, "tflops": 1.0}

    monkeypatch.setattr(attention, "results_of", results)
    cases, file = [Case(64, 512), Case(64, 1024), Case(64, 2048)], tmp_path / "attention.jsonl"
    head = {"gpu": "H200", "torch": "2", "commit": "abc", "date": "today"}
    late = time.monotonic() + 60.0
    assert attention.race(cases[:1], head, file, late)[1] == 0
    assert attention.race(cases, head, file, end=0.0)[1] == 2, "no time for what is new"
    lines, missed = attention.race(cases, {**head, "date": "tomorrow"}, file, late)
    assert [line["case"] for line in lines] == measured == [case.name for case in cases]
    assert missed == 0
    attention.race(cases[:1], {**head, "commit": "def"}, file, late)
    assert measured[3:] == [cases[0].name], "another commit's kernels"
    assert len(file.read_text().splitlines()) == 4


def test_the_table_has_a_cell_for_every_time_and_none_for_what_failed() -> None:
    lines = [
        {"case": "a", "backend": "cuda", "pass": "fwd", "us": 1.0, "tflops": 300.4},
        {"case": "a", "backend": "sdpa-cudnn", "pass": "fwd", "us": 1.0, "tflops": 512.0},
        {"case": "a", "backend": "triton", "problem": "error 0.3, allowed 0.02"},
    ]
    head, row = attention.table(lines).splitlines()
    cells = dict(zip(head.split()[2:], row.split()[2:], strict=True))
    assert cells == {
        "cuda": "300", "triton": "-", "sdpa-flash": "-", "sdpa-cudnn": "512", "sdpa-efficient": "-",
    }  # fmt: skip
