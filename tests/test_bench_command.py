"""``fused-lm bench`` without a GPU: a dry run, and races that crash or hang."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from fused_lm import cli
from fused_lm.commands import bench


@pytest.mark.slow  # tests/test_benchmarks.py runs what it calls
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


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["bench", *arguments]) == 2
    return capsys.readouterr().err


def test_what_can_not_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before a race, where it can be known then."""
    dry = ("--device", "cpu", "--op", "loss")
    if not torch.cuda.is_available():
        assert "--device cpu is a dry run" in _refused(capsys)
    for minutes in ("0", "nan", "inf"):
        assert "--minutes must be" in _refused(capsys, *dry, "--minutes", minutes)
    (tmp_path / "file").write_text("")
    for option, path in (("--out", "file/out"), ("--csv", "."), ("--plot", "file")):
        said = _refused(capsys, *dry, option, str(tmp_path / path))
        assert "can't write" in said, (option, said)
    (tmp_path / "out").mkdir()
    about = {"gpu": "NVIDIA Imaginary 1", "torch": torch.__version__, "commit": "x"}
    (tmp_path / "out/environment.json").write_text(json.dumps(about))
    said = _refused(capsys, *dry, "--out", str(tmp_path / "out"))
    assert "numbers of gpu 'NVIDIA Imaginary 1', this is 'a CPU': give another --out" in said


def test_no_case_of_that_name(capsys: pytest.CaptureFixture[str]) -> None:
    said = _refused(capsys, "--device", "cpu", "--op", "loss", "loss", "--only=-x")
    assert "no case has '-x' in its name" in said


DECOY = "raise SystemExit('the folder that it is called from is none of its business')"


def test_races_are_not_looked_for_in_the_folder_it_is_called_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("benchmarks", "fused_lm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(DECOY)
    monkeypatch.chdir(tmp_path)
    place = bench.benchmarks_place()
    assert bench._race("loss", place, tmp_path, "cpu", ["--only", "linear"], 30.0)
    assert bench.results_of(place, tmp_path, ["loss"])


RACE = """
import pathlib, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
starts = out / "starts"
starts.open("a").write("x")
if len(starts.read_text()) <= {times}:
    {what}
(out / "loss.jsonl").open("a").write('{{"case": "a", "us": 1.0}}\\n{{"case": "torn')
"""


def _race(tmp_path: Path, times: int, what: str) -> tuple[bool, int]:
    """Whether a race that does so at its first starts came to an end, and how often it started."""
    package, out = tmp_path / "of_a_test", tmp_path / "out"
    package.mkdir()
    out.mkdir()
    (package / "loss.py").write_text(RACE.format(times=times, what=what))
    place = bench.Place("of_a_test", tmp_path)
    ended = bench._race("loss", place, out, "cpu", [], 4.0)
    return ended, len((out / "starts").read_text())


def test_a_race_that_crashed_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert _race(tmp_path, 1, "import os; os.abort()") == (True, 2)
    assert "exit status -6" in capfd.readouterr().out
    found = bench.results_of(bench.benchmarks_place(), tmp_path / "out", ["loss"])
    assert found == [{"case": "a", "us": 1.0, "race": "loss"}], "a torn line is none"


def test_a_race_that_hung_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what is left of its time, so not at the end of that."""
    monkeypatch.setattr(bench, "SILENCE_SECONDS", 1.0)
    assert _race(tmp_path, 1, "time.sleep(60)") == (True, 2)


def test_a_race_without_time_has_not_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "GRACE_SECONDS", 0.1)
    ended, starts = _race(tmp_path, 99, "time.sleep(60)")
    assert not ended and starts == 1


def test_a_race_that_always_fails_ends(tmp_path: Path) -> None:
    ended, starts = _race(tmp_path, 99, "sys.exit(3)")
    assert not ended and starts > 2


def test_a_race_that_is_called_wrongly_is_called_once(tmp_path: Path) -> None:
    assert _race(tmp_path, 99, "sys.exit(2)") == (False, 1)
