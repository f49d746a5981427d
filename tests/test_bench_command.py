"""``fused-lm bench`` without a GPU: a dry run, and races that crash or hang."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest
import torch

from fused_lm import cli
from fused_lm.commands import bench


def test_a_dry_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    table, out, drawn = tmp_path / "all.csv", tmp_path / "out", tmp_path / "drawn"
    drawn.mkdir()
    (drawn / "mine.png").write_bytes(b"of the user")
    arguments = ["--device", "cpu", "--op", "layernorm", "loss", "--only", "c48", "--out", str(out)]
    assert cli.main(["bench", *arguments, "--csv", str(table), "--plot", str(drawn)]) == 0
    said = capfd.readouterr().out
    assert "== layernorm" in said and "== loss" in said and "no number here says" in said
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["race"] for row in rows} == {"layernorm"}, "no case of the other has the word"
    timed = [row for row in rows if row["us"]]
    assert timed and all(float(row["us"]) > 0 and row["gpu"] == "" for row in timed)
    assert {"eager", "triton"} <= {row["contestant"] for row in timed}
    assert all(row["problem"] for row in rows if not row["us"])
    assert (drawn / "mine.png").read_bytes() == b"of the user"


def test_what_can_not_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        assert cli.main(["bench"]) == 2
        assert "--device cpu is a dry run" in capsys.readouterr().err
    assert cli.main(["bench", "--device", "cpu", "--minutes", "0"]) == 2
    assert "--minutes must be above 0" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert cli.main(["bench", "--device", "cpu", "--out", str(tmp_path / "file/out")]) == 2
    assert "can't write" in capsys.readouterr().err


RACE = """
import pathlib, sys, time
starts = pathlib.Path(sys.argv[sys.argv.index("--out") + 1]) / "starts"
starts.open("a").write("x")
if len(starts.read_text()) <= {times}:
    {what}
"""


def _race(tmp_path: Path, times: int, what: str) -> tuple[bool, int]:
    """Whether a race that does so at its first starts came to an end, and how often it started."""
    package, out = tmp_path / "of_a_test", tmp_path / "out"
    package.mkdir()
    out.mkdir()
    (package / "loss.py").write_text(RACE.format(times=times, what=what))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ended = bench._race("loss", "of_a_test", out, "cpu", "", 1.0, environment)
    return ended, len((out / "starts").read_text())


def test_a_race_that_crashed_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert _race(tmp_path, 1, "import os; os.abort()") == (True, 2)
    assert "exit status -6" in capfd.readouterr().out


def test_a_race_that_hung_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "GRACE_SECONDS", 0.5)
    assert _race(tmp_path, 1, "time.sleep(60)") == (True, 2)


def test_a_race_that_always_fails_ends(tmp_path: Path) -> None:
    assert _race(tmp_path, 99, "sys.exit(3)") == (False, bench.MOST_STARTS)
