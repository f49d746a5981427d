"""Tiles by measurement: what is tried, what is chosen, and that the tables have it."""

from __future__ import annotations

import json
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_lm
from benchmarks import cuda_tiles, harness, tiles, tune
from benchmarks.cuda_tiles import Tile
from benchmarks.record import Record, records
from benchmarks.tiles import Machine, Spot
from fused_lm.triton_kernels import attention as attention_launch
from fused_lm.triton_kernels.launch import shared_memory_limit

GPU = "NVIDIA Imaginary 1"
SMS = 132
SPOTS = tiles.spots(False)
in_the_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def test_the_tables_have_what_the_recorded_sweeps_choose() -> None:
    assert not tune.disagreements(tune.recorded()), "python -m benchmarks.tune choose"


@pytest.mark.parametrize("spot", SPOTS, ids=lambda spot: spot.name)
@pytest.mark.parametrize("arch", [80, 90])
def test_candidates_fit_and_begin_near_the_row(spot: Spot, arch: int) -> None:
    limit = shared_memory_limit(arch)
    row = tiles.row_of(spot, limit, SMS)
    found = tiles.candidates(spot, row, limit)
    assert len(found) > 3 and row not in found
    assert len({tuple(config.items()) for config in found}) == len(found)
    changes = [sum(config[name] != row[name] for name in row) for config in found]
    assert changes == sorted(changes) and all(config.keys() == row.keys() for config in found)
    assert not [c for c in found if not tiles._fits(spot, c, limit)]
    assert not tiles._fits(spot, {**row, "num_stages": 64}, limit)
    if arch == 90:
        assert tiles._fits(spot, row, limit), "the table's own row is a candidate's equal"


def test_spots_have_names_of_their_own() -> None:
    names = [spot.name for spot in SPOTS]
    assert len({*names}) == len(names)


def _tile(stages: int, ratio: float, **more: Any) -> dict[str, Any]:
    config = {"block_m": 128, "num_stages": stages}
    line = {"gpu": GPU, "commit": "a", "spot": "one", "config": config, "row": stages == 3}
    return {**line, "ratio": ratio, **more}


def test_the_fastest_is_chosen_and_the_row_within_the_noise() -> None:
    near = [_tile(3, 1.0), _tile(4, 1.0 - tune.NOISE + 0.001), _tile(5, 1.2)]
    assert tune.choose(near)[GPU, "one"]["config"]["num_stages"] == 3
    far = [*near, _tile(2, 0.8), _tile(1, 0.8), {**_tile(6, 0.1), "spot": "two"}]
    del (wrong := _tile(7, 0.1))["ratio"]
    far.append({**wrong, "problem": "error 0.5, allowed 0.02"})
    dry = {**_tile(8, 0.1), "gpu": None}
    for seed in range(8):
        lines = random.Random(seed).sample([*far, dry], len(far) + 1)
        chosen = tune.choose(lines)
        assert chosen[GPU, "one"]["config"]["num_stages"] == 1, "of equal ones the first"
        assert chosen.keys() == {(GPU, "one"), (GPU, "two")}


def test_a_later_sweep_counts_if_it_tried_what_was_chosen() -> None:
    first = [_tile(3, 1.0), _tile(4, 0.8)]
    cut = [_tile(3, 1.0, commit="b"), _tile(2, 0.9, commit="b")]
    assert tune.choose([*first, *cut])[GPU, "one"]["config"]["num_stages"] == 4
    whole = [*cut, _tile(4, 0.95, commit="b")]
    assert tune.choose([*first, *whole])[GPU, "one"]["config"]["num_stages"] == 2


def test_a_table_that_disagrees_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all spots that share a row together: none can be had for one of them alone."""
    one, two = (spot for spot in SPOTS if (spot.table, spot.kernel) == ("linear", "forward"))
    row = tiles.row_of(one, shared_memory_limit(90), SMS)
    assert row == tiles.row_of(two, shared_memory_limit(90), SMS), "one row for both"
    gpus = [{"capability": "9.0", "multiprocessors": SMS}]
    about = {"gpu": GPU, "pieces": ["now"]}
    told, untold = Record(Path(), {**about, "gpus": gpus}), Record(Path(), about)
    monkeypatch.setattr(tune, "records", lambda: [told, untold])

    def line(spot: Spot, stages: int, ratio: float) -> dict[str, Any]:
        config = {**row, "num_stages": stages}
        own = {"gpu": GPU, "commit": "a", "spot": spot.name, "row": config == row}
        return {**own, "config": config, "ratio": ratio}

    stages = row["num_stages"]
    of_row = [line(one, stages, 1.0), line(two, stages, 1.0)]
    assert tune.disagreements(of_row) == []
    opposed = [line(one, stages + 1, 0.9), line(two, stages + 1, 1.2)]
    assert tune.disagreements([*of_row, *opposed]) == [], "not faster for both"
    agreed = [line(one, stages + 1, 0.9), line(two, stages + 1, 0.92)]
    (said,) = tune.disagreements([*of_row, *agreed])
    assert "linear forward" in said and f"'num_stages': {stages + 1}" in said and "0.91" in said
    (said,) = tune.disagreements([line(one, stages, 1.0), line(one, stages + 1, 0.8)])
    assert "0.80" in said, "one that was swept alone"


@in_the_interpreter
def test_a_candidate_takes_the_rows_place_in_its_call_alone() -> None:
    q = torch.randn(1, 1, 16, 16)
    spot = tiles.spots(True)[0]
    seen = []
    own = attention_launch.tune

    def watched(kernel: str, *arguments: Any) -> Any:
        row = own(kernel, *arguments)
        seen.append((kernel, row.BLOCK_T))
        return row

    with pytest.MonkeyPatch.context() as patch, fused_lm.use_backend("triton"):
        patch.setattr(attention_launch, "tune", watched)
        with tiles.using(spot, {"BLOCK_T": 32, "BLOCK_S": 16, "num_warps": 4, "num_stages": 1}):
            assert attention_launch.tune("forward", 16, 16, 2, None).BLOCK_T == 32
            assert attention_launch.tune("dq", 16, 16, 2, None).BLOCK_T == 64
            fused_lm.attention(q, q, q)
        assert attention_launch.tune("forward", 16, 16, 2, None).BLOCK_T == 64
    assert ("forward", 64) in seen


@in_the_interpreter
def test_a_sweep_goes_on_behind_what_it_has(tmp_path: Path) -> None:
    machine = Machine.here(torch.device("cpu"))
    chosen = [replace(spot) for spot in tiles.spots(True)]
    file = tmp_path / tune.FILE

    def sweep(end: float) -> list[dict[str, Any]]:
        head = {"gpu": None, "commit": "a"}
        return list(tune.sweep(chosen, machine, head, file, time.monotonic() + end))

    assert sweep(-1.0) == [] and not file.exists()
    first = sweep(60.0)
    assert [line["row"] for line in first] == [True, False] * 2
    assert all(line["us"] > 0 and line["error"] < 0.02 for line in first)
    assert [line for line in _read(file) if "event" not in line] == first
    assert sweep(60.0) == [], "nothing twice"
    file.write_text("".join(json.dumps(line) + "\n" for line in first[:2]) + '{"torn')
    again = sweep(60.0)
    assert {line["spot"] for line in again} == {chosen[1].name}


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in file.read_text().splitlines()]


EVENTS = {
    "in a first call": ([("a", "begun"), ("a", "us"), ("b", "begun")], ["b"]),
    "in its times": ([("row", "begun"), ("a", "begun"), ("b", "begun"), ("", "times")], ["a", "b"]),
    "cut": ([("a", "begun"), ("", "cut")], []),
    "at its end": ([("a", "begun"), ("", "times"), ("a", "us")], []),
    "after a cut": ([("a", "begun"), ("", "cut"), ("b", "begun")], ["b"]),
}


@pytest.mark.parametrize("how", EVENTS)
def test_what_a_process_ended_in_is_written_off(how: str, tmp_path: Path) -> None:
    events, guilty = EVENTS[how]
    file = tmp_path / tune.FILE
    lines = [
        {"spot": "s", "config": {name: 1}, **({"us": 1.0} if event == "us" else {"event": event})}
        for name, event in events
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    written = tune._Journal(file, {}).write_off()
    assert [line["config"] for line in written] == [{name: 1} for name in guilty]
    assert all(line["problem"] == "hung or crashed" for line in written)
    assert tune._Journal(file, {}).write_off() == [], "once"


def _swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: Any) -> list[dict[str, Any]]:
    """A sweep of three tiles of one spot, in which ``broken`` may raise."""
    spot = tiles.spots(True)[0]
    row = {"BLOCK_T": 64}
    others = [{"BLOCK_T": 32}, {"BLOCK_T": 16}]
    monkeypatch.setattr(Machine, "choices", lambda self, spot: (row, others))

    def admitted(spot: Spot, given: Any, config: dict[str, int]) -> Any:
        broken(config["BLOCK_T"])
        return lambda: None, 0.0

    monkeypatch.setattr(tune, "_admitted", admitted)
    machine, end = Machine.here(torch.device("cpu")), time.monotonic() + 60.0
    return list(tune.sweep([spot], machine, {"gpu": None}, tmp_path / tune.FILE, end))


def test_tiles_are_timed_where_the_row_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(block: int) -> None:
        if block == 64:
            raise ValueError("out of registers")

    failed, first, second = _swept(tmp_path, monkeypatch, broken)
    assert failed["problem"] == "out of registers" and first["ratio"] == 1.0
    assert not first["row"] and not second["row"]
    assert _swept(tmp_path, monkeypatch, broken) == [], "nothing is left to try"


def test_a_tile_that_breaks_the_context_ends_the_process_and_no_other_tile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(block: int) -> None:
        if block == 32:
            raise RuntimeError("illegal address")

    monkeypatch.setattr(harness, "context_lives", lambda device: False)
    with pytest.raises(harness.ContextLost):
        _swept(tmp_path, monkeypatch, broken)
    monkeypatch.setattr(harness, "context_lives", lambda device: True)
    found = _swept(tmp_path, monkeypatch, broken)
    assert [line["config"]["BLOCK_T"] for line in found if "us" in line] == [64, 16]


MOST_GIVEN_AWAY = 1.05
"""By a row of the CUDA kernels, for no spill on another architecture, say."""
IN_TEAMS = {("dkdv", 192), ("dkdv", 256), ("dq", 192), ("dq", 256)}
"""Where the sweep's GPU runs other kernels, and the row is for others' shared memory."""


def test_rows_of_the_cuda_kernels_are_near_the_fastest_recorded() -> None:
    tried = 0
    for gpu, kernel, head_dim, row, ratio, fastest in cuda_tiles.chosen(records()):
        if ratio is not None and (kernel, head_dim) not in IN_TEAMS:
            tried += 1
            assert ratio < MOST_GIVEN_AWAY, (gpu, kernel, head_dim, row, ratio, fastest)
    assert tried > 10


HEADER = """
constexpr AttentionTuning attention_forward_plain_tuning(int head_dim) {
  if (head_dim <= 64) return {32, 4, 128, 2, QueryPlace::kRegisters, "40 KB"};
  if (head_dim <= 192) return {16, 8, 64, 1, QueryPlace::kStaged, "96 KB"};
  return {16, 8, 32, 1, QueryPlace::kStaged, "64 KB"};
}
constexpr AttentionBackwardTuning attention_dkdv_tuning(int head_dim, bool general) {
  if (head_dim <= 32) {
    if (general) return {1, 1, 1, 1, "features"};
    return {32, 4, 64, 2, "33 KB"};
  }
  if (head_dim <= 192) return {16, 4, 32, 1, "97 KB"};
  return {16, 4, 16, 1, "97 KB"};
}
"""


def test_rows_are_read_from_the_header() -> None:
    header = HEADER + HEADER.split("\n}\n")[1].replace("dkdv", "dq") + "\n}\n"
    found = cuda_tiles.rows(header)
    assert found["fwd", 32] == found["fwd", 64] == Tile(32, 4, 128, 2)
    assert found["fwd", 128] == Tile(16, 8, 64, 1) and found["fwd", 256] == Tile(16, 8, 32, 1)
    assert found["dkdv", 32] == found["dq", 32] == Tile(32, 4, 64, 2), "not that with features"
    assert found["dkdv", 64] == Tile(16, 4, 32, 1) and found["dkdv", 256] == Tile(16, 4, 16, 1)
    with pytest.raises(ValueError, match="no attention_dq_tuning"):
        cuda_tiles.rows(HEADER)


def test_a_ratio_is_over_the_calls_that_all_tiles_ran() -> None:
    def line(block: int, causal: int, us: float) -> dict[str, Any]:
        tile = {"rows_per_warp": 32, "warps": 4, "block": block, "blocks_per_sm": 2}
        return {"kernel": "fwd", "D": 64, "T": 4096, "causal": causal, "us": us, **tile}

    lines = [line(64, 0, 10.0), line(64, 1, 5.0), line(32, 0, 20.0), line(32, 1, 40.0)]
    lines += [line(64, 0, 11.0), {"kernel": "fwd", "D": 64, "peer": "flash", "us": 1.0}]
    found = cuda_tiles.ratios(lines)
    assert found == {("fwd", 64): {Tile(32, 4, 64, 2): 1.0, Tile(32, 4, 32, 2): pytest.approx(4.0)}}
    alone = cuda_tiles.ratios([*lines, line(16, 1, 5.0)])
    assert list(alone["fwd", 64]) == [Tile(32, 4, 16, 2), Tile(32, 4, 64, 2), Tile(32, 4, 32, 2)]
