"""Tiles by measurement: what is tried, what is chosen, and that the tables have it."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_lm
from benchmarks import cuda_tiles, harness, record, tiles, tune, tune_choice
from benchmarks.cuda_tiles import Tile
from benchmarks.record import Record, records
from benchmarks.tiles import Machine, Spot
from benchmarks.tune_choice import best, standing
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


def _line(stages: int, us: float, **more: Any) -> dict[str, Any]:
    """Of one spot and batch, where 3 stages are the row."""
    config = json.dumps({"block_m": 128, "num_stages": stages})
    name = f"{tune_choice.ROW * (stages == 3)}{config}"
    line = {"gpu": GPU, "commit": "a", "case": f"one{tune_choice.BATCH}0", "contestant": name}
    return {**line, "us": us, **more}


def _chosen(lines: list[dict[str, Any]], spot: str = "one") -> int:
    return dict(best(standing(lines)[GPU, spot]).config)["num_stages"]


def test_the_fastest_is_chosen_and_the_row_within_the_noise() -> None:
    near = [_line(3, 100.0), _line(4, 101.0 - 100.0 * tune_choice.NOISE), _line(5, 120.0)]
    assert _chosen(near) == 3
    other = {"case": f"two{tune_choice.BATCH}0"}
    far = [*near, _line(2, 80.0), _line(1, 80.0), _line(6, 10.0, **other)]
    del (wrong := _line(7, 1.0))["us"]
    far += [{**wrong, "problem": "error 0.5, allowed 0.02"}, _line(8, 1.0, gpu=None)]
    for seed in range(8):
        lines = random.Random(seed).sample(far, len(far))
        assert _chosen(lines) == 1, "of equal ones the first"
        assert standing(lines).keys() == {(GPU, "one"), (GPU, "two")}


def test_batches_are_compared_by_their_rows() -> None:
    """Not by their times: clocks may differ. Where the row failed, by the fastest of those."""
    slow = {"case": f"one{tune_choice.BATCH}1"}
    lines = [_line(3, 100.0), _line(4, 90.0), _line(3, 200.0, **slow), _line(5, 170.0, **slow)]
    assert _chosen(lines) == 5
    assert _chosen([_line(4, 90.0), _line(5, 170.0, **slow), _line(6, 80.0, **slow)]) == 6


def test_a_later_sweep_counts_if_it_tried_what_was_chosen() -> None:
    first = [_line(3, 100.0), _line(4, 80.0)]
    cut = [_line(3, 100.0, commit="b"), _line(2, 90.0, commit="b")]
    assert _chosen([*first, *cut]) == 4
    assert _chosen([*first, *cut, _line(4, 95.0, commit="b")]) == 2


def test_a_table_that_disagrees_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all spots that share a row together: none can be had for one of them alone."""
    one, two = (spot for spot in SPOTS if (spot.table, spot.kernel) == ("linear", "forward"))
    row = tiles.row_of(one, shared_memory_limit(90), SMS)
    assert row == tiles.row_of(two, shared_memory_limit(90), SMS), "one row for both"
    gpus = [{"capability": "9.0", "multiprocessors": SMS}]
    about = {"gpu": GPU, "pieces": ["now"]}
    told, untold = Record(Path(), {**about, "gpus": gpus}), Record(Path(), about)
    monkeypatch.setattr(tune, "records", lambda: [told, untold])

    def line(spot: Spot, stages: int, us: float) -> dict[str, Any]:
        config = {**row, "num_stages": stages}
        name = f"{tune_choice.ROW * (config == row)}{json.dumps(config)}"
        case = f"{spot.name}{tune_choice.BATCH}0"
        return {"gpu": GPU, "commit": "a", "case": case, "contestant": name, "us": us}

    stages = row["num_stages"]
    of_row = [line(one, stages, 100.0), line(two, stages, 100.0)]
    assert tune.disagreements(of_row) == []
    opposed = [line(one, stages + 1, 90.0), line(two, stages + 1, 120.0)]
    assert tune.disagreements([*of_row, *opposed]) == [], "not faster for both"
    agreed = [line(one, stages + 1, 90.0), line(two, stages + 1, 92.0)]
    (said,) = tune.disagreements([*of_row, *agreed])
    assert "linear forward" in said and f"'num_stages': {stages + 1}" in said and "0.91" in said
    (said,) = tune.disagreements([line(one, stages, 100.0), line(one, stages + 1, 80.0)])
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
def test_a_batch_is_a_race_of_tiles_with_the_row(tmp_path: Path) -> None:
    machine, device = Machine.here(torch.device("cpu")), torch.device("cpu")
    ((batch, contestants),) = tiles.batches(tiles.spots(True)[0], machine)
    end, file = time.monotonic() + 60.0, tmp_path / tune.FILE
    lines, missed = harness.race([batch], contestants, device, {"gpu": None}, file, end)
    row, other = lines
    assert missed == 0 and row["contestant"].startswith(tune_choice.ROW)
    assert not other["contestant"].startswith(tune_choice.ROW)
    assert all(line["us"] > 0 and line["error"] < 0.02 for line in lines)
    assert [line for line in record.whole_lines(file) if "us" in line]


def test_all_candidates_are_in_batches_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    spot = SPOTS[0]
    machine = Machine(torch.device("cpu"), shared_memory_limit(90), SMS)
    row, others = machine.choices(spot)
    found = list(tiles.batches(spot, machine))
    names = [contestant.name for _, own in found for contestant in own[1:]]
    assert names == [json.dumps(config, sort_keys=True) for config in others]
    assert {own[0].name for _, own in found} == {f"row {json.dumps(row, sort_keys=True)}"}
    assert len({batch.name for batch, _ in found}) == len(found) > 1
    inside = []
    monkeypatch.setattr(tiles, "using", lambda *arguments: inside.append(arguments))
    ((batch, own), *_) = tiles.batches(spot, machine)
    own[1].within()
    assert inside == [(spot, others[0])] and batch.work().keys() == {spot.way}


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
