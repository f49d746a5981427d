"""The GPU suite without a GPU: a dry run in two pieces; stages that crash, hang or are killed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import contest, gpu_stages, gpu_suite, roofs, stages, suite_archive
from benchmarks.gpu_stages import all_stages
from benchmarks.gpu_suite import ARCHIVE, STATE, Suite
from benchmarks.stages import Piece, Stage, Status
from fused_lm import records
from fused_lm.commands.verify import records_of
from tests.simt import backend as simt
from tests.simt import runtime

PYTHON = (sys.executable, "-S", "-c")
ABOUT: dict[str, Any] = {
    "format": 1, "device": "cpu", "gpu": None, "commit": "abc", "torch": "2", "pieces": ["now"],
}  # fmt: skip


def _stage(name: str, script: str, limit_s: float = 60.0, **options: Any) -> Stage:
    """A stage that is a Python script; {out} in it is its folder."""

    def command(piece: Piece) -> list[str]:
        return [*PYTHON, script.replace("{out}", str(piece.folder))]

    return Stage(name, command, limit_s, least_s=0.0, **options)


def _counts(name: str, then: str = "", **options: Any) -> Stage:
    """One that writes a line each time it runs."""
    write = "open('{out}/runs', 'a').write('x')"
    return _stage(name, f"import os, time; {write}; print('it says')\n{then}", **options)


def _suite(folder: Path) -> Suite:
    folder.mkdir(parents=True, exist_ok=True)
    return Suite(folder, folder / ARCHIVE, dict(ABOUT))


def _runs(folder: Path, name: str) -> int:
    file = folder / name / "runs"
    return len(file.read_text()) if file.is_file() else 0


def _dry(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--device", "cpu", "--minutes", "3"]
    environment = {**os.environ, "GIT_DIR": "/nonexistent"}
    return subprocess.run(
        [*command, "--out", str(out), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=gpu_suite.ROOT,
        check=False,
    )


@pytest.mark.slow
def test_a_dry_run_in_two_pieces_runs_every_stage(tmp_path: Path) -> None:
    """On machines that keep nothing but the archive, and have no git."""
    if simt.BACKENDS:
        runtime.load(runtime.ONE)  # built outside of the stage's time
    shipped = records.SHIPPED.read_bytes()
    first = _dry(tmp_path / "a", "--only", "environment", "roofs")
    assert first.returncode == 0, first.stdout + first.stderr
    (tmp_path / "a" / ARCHIVE).rename(tmp_path / "kept")
    shutil.rmtree(tmp_path / "a")
    second = _dry(tmp_path / "b", "--resume", str(tmp_path / "kept"))
    assert second.returncode == 0, second.stdout + second.stderr
    assert "nothing here is from a GPU, commit unknown" in second.stdout

    outcomes = stages.load(tmp_path / "b" / STATE)
    assert outcomes.keys() == {stage.name for stage in all_stages("cpu", "")}
    done = {name for name, outcome in outcomes.items() if outcome.status is Status.DONE}
    races = {*contest.RACES}
    always = (
        {"record of others"}
        | {"environment", "roofs", "wrappers", "warm", "record", "tune"}
        | races
    )
    assert done >= always | ({"kernels"} if simt.BACKENDS else set())
    for name, outcome in outcomes.items():
        assert outcome.status in (Status.DONE, Status.ABSENT), (name, outcome)
    state = json.loads((tmp_path / "b" / STATE).read_text())
    assert (state["device"], state["gpu"], len(state["pieces"])) == ("cpu", None, 2)

    measured = _lines(tmp_path / "b/roofs/roofs.jsonl")
    assert len(measured) == 3, "the first piece's, taken over, and not measured again"
    assert all(line["value"] > 0 and line["device"] == "cpu" for line in measured)
    for name in races:
        raced = _lines(tmp_path / f"b/{name}/{name}.jsonl")
        assert {line["gpu"] for line in raced} == {None} and any("us" in line for line in raced)
    proven = _lines(tmp_path / "b/record/results.jsonl")
    assert proven and all(line["parity"] for line in proven)
    assert records_of(proven) == [] and records.SHIPPED.read_bytes() == shipped


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


CHILD = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', '{child}']); "
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "


def test_no_stage_loses_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    late = f"import time; time.sleep(8); open({str(tmp_path / 'late')!r}, 'w')".replace("'", '"')
    chosen = [
        _counts("first"),
        _counts("crashes", "print('illegal access', flush=True); os.abort()"),
        _counts("fails", "print('2 failed'); raise SystemExit(3)"),
        _counts("hangs", f"{DEAF}{CHILD.replace('{child}', late)}time.sleep(99)", limit_s=1.0),
        _counts("fills the disk", "open('/dev/full', 'w').write('x' * 9999)"),
        Stage("isn't there", lambda _: ["/no/such/program"], 60.0),
        _counts("can't run", refusal=lambda: "there is no GPU"),
        _counts("last"),
    ]
    suite = _suite(tmp_path / "suite")
    suite.run(chosen, time.monotonic() + 60.0)
    said = {name: (o.status, o.said) for name, o in suite.outcomes.items()}
    assert said["first"] == said["last"] == (Status.DONE, "it says")
    assert said["crashes"] == (Status.FAILED, "SIGABRT; illegal access")
    assert said["fails"] == (Status.FAILED, "exit status 3; 2 failed")
    assert said["hangs"] == (Status.FAILED, "no end within 1 s; it says")
    assert said["fills the disk"][0] is Status.FAILED
    assert "No space left on device" in said["fills the disk"][1]
    assert said["isn't there"][0] is Status.FAILED and "No such file" in said["isn't there"][1]
    assert said["can't run"] == (Status.ABSENT, "there is no GPU")
    assert stages.load(tmp_path / "suite" / STATE) == suite.outcomes
    assert all(_runs(tmp_path / "suite", s.name) == 1 for s in chosen[:5])
    for stage in chosen:
        assert stage.name in suite.summary(chosen)
    assert capsys.readouterr().out.count("\n") == len(chosen)
    time.sleep(0.1)
    assert not (tmp_path / "late").exists(), "what a stage started ends with it"


def test_a_stage_that_can_goes_on_behind_a_hang_or_a_crash(tmp_path: Path) -> None:
    """In the next round. One that writes isn't stopped for its silence, however long it takes."""
    first = "len(open('{out}/runs').read()) == 1"
    talks = "for i in range(12): time.sleep(0.1); open('{out}/runs', 'a').write(' ')"
    chosen = [
        _counts("silent once", f"{first} and time.sleep(99)", silence_s=0.7),
        _counts("crashes once", f"{first} and os.abort()", silence_s=9.0),
        _counts("talks", talks, silence_s=0.7),
        _counts("silent", "time.sleep(99)", silence_s=0.1),
    ]
    suite = _suite(tmp_path)
    suite.run(chosen, time.monotonic() + 60.0)
    found = {name: (outcome.status, outcome.pieces) for name, outcome in suite.outcomes.items()}
    assert found == {
        "silent once": (Status.DONE, 2),
        "crashes once": (Status.DONE, 2),
        "talks": (Status.DONE, 1),
        "silent": (Status.UNFINISHED, gpu_suite.MOST_ROUNDS),
    }
    assert suite.outcomes["silent"].said == "no word for 0 s; it says"


def test_what_failed_or_was_absent_is_asked_again(tmp_path: Path) -> None:
    """On another machine, which may have what it takes; what failed only by its name."""
    refusals = ["not here"]
    chosen = [
        _counts("absent", refusal=lambda: refusals[0] if refusals else None),
        _counts("failed", "raise SystemExit(3)"),
    ]
    suite = _suite(tmp_path / "a")
    suite.run(chosen, time.monotonic() + 60.0)
    refusals.clear()
    other = _suite(tmp_path / "b")
    other.resume(suite.archive)
    other.run(chosen, time.monotonic() + 60.0)
    assert other.outcomes["absent"].status is Status.DONE
    assert _runs(tmp_path / "b", "failed") == 1
    other.reopen(["failed"])
    other.run(chosen, time.monotonic() + 60.0)
    assert _runs(tmp_path / "b", "failed") == 2


def test_proofs_run_at_once(tmp_path: Path) -> None:
    meets = "while not os.path.exists('{out}/../{other}/runs'): time.sleep(0.01)"
    both = [
        _counts(one, meets.replace("{other}", other), limit_s=30.0, beside="proofs")
        for one, other in (("a", "b"), ("b", "a"))
    ]
    suite = _suite(tmp_path)
    suite.run([*both, _counts("alone")], time.monotonic() + 60.0)
    assert [outcome.status for outcome in suite.outcomes.values()] == [Status.DONE] * 3


def test_what_was_cut_goes_on_and_what_hung_does_not(tmp_path: Path) -> None:
    slow = "len(open('{out}/runs').read()) == 1 and time.sleep(99)"
    again = "len(open('{out}/runs').read()) == 1 and print('5 left: run it again')"
    chosen = [_counts("done"), _counts("hung", "time.sleep(99)", limit_s=0.5), _counts("cut", slow)]
    chosen.append(_counts("more to do", again, more="run it again"))
    chosen.append(_counts("not reached"))
    suite = _suite(tmp_path / "a")
    suite.run([*chosen[:2], chosen[3]], time.monotonic() + gpu_suite.RESERVE_SECONDS + 30.0)
    suite.run(chosen[2:3], time.monotonic() + gpu_suite.RESERVE_SECONDS + 0.5)
    suite.run(chosen[4:], time.monotonic() + gpu_suite.RESERVE_SECONDS - 1.0)
    assert suite.outcomes["cut"].status is Status.UNFINISHED
    assert suite.outcomes["more to do"].status is Status.DONE, "in the same piece"
    assert "not reached" in suite.summary(chosen) and "not reached" not in suite.outcomes

    other = _suite(tmp_path / "b")
    other.resume(suite.archive)
    other.run(chosen, time.monotonic() + 60.0)
    runs = {stage.name: _runs(tmp_path / "b", stage.name) for stage in chosen}
    assert runs == {"done": 1, "hung": 1, "cut": 2, "more to do": 2, "not reached": 1}
    assert other.outcomes["hung"].status is Status.FAILED
    assert other.outcomes["cut"].pieces == 2 and other.outcomes["cut"].status is Status.DONE


KILLED = """
import signal, sys, time
from pathlib import Path
from benchmarks import gpu_suite
from tests.test_gpu_suite import _counts, _suite
signal.signal(signal.SIGTERM, gpu_suite.stop)
slow = _counts("slow", "open('{out}/pid', 'w').write(str(os.getpid())); time.sleep(20)")
_suite(Path(sys.argv[1])).run([_counts("quick"), slow], time.monotonic() + 99)
"""


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 128 + signal.SIGTERM)],
)
def test_a_kill_in_the_middle_loses_the_stage_it_was_at(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    folder, pid = tmp_path / "a", tmp_path / "a/slow/pid"
    running = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], cwd=gpu_suite.ROOT)
    end = time.monotonic() + 60.0
    while not (pid.is_file() and pid.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    running.send_signal(number)
    assert running.wait() == status
    if number is signal.SIGTERM:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)
    other = _suite(tmp_path / "b")
    other.resume(folder / ARCHIVE)
    assert other.outcomes["quick"].status is Status.DONE and other.outcomes["slow"].status is None
    other.run([_counts("quick"), _counts("slow")], time.monotonic() + 60.0)
    assert _runs(tmp_path / "b", "quick") == 1, "not run again"
    assert other.outcomes["slow"].status is Status.DONE


def test_results_of_two_commits_do_not_mix(tmp_path: Path) -> None:
    suite = _suite(tmp_path / "a")
    suite.run([_counts("one")], time.monotonic() + 60.0)
    other = _suite(tmp_path / "b")
    other.about["commit"] = "def"
    with pytest.raises(SystemExit, match="of commit 'abc', here it is 'def'"):
        other.resume(suite.archive)
    (tmp_path / "text").write_text("no archive")
    with pytest.raises(SystemExit, match="no archive of this suite"):
        _suite(tmp_path / "c").resume(tmp_path / "text")


def test_a_full_disk_stops_no_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gpu_suite, "pack", full)
    suite = _suite(tmp_path)
    suite.run([_counts("one"), _counts("two")], time.monotonic() + 60.0)
    assert [o.status for o in suite.outcomes.values()] == [Status.DONE] * 2
    assert "not kept" in capsys.readouterr().err


def test_an_archive_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite_archive, "MOST_BYTES", 20_000)
    monkeypatch.setattr(suite_archive, "LOG_KEPT_BYTES", 1000)
    source, target, archive = tmp_path / "a", tmp_path / "b", tmp_path / "suite.tar.gz"
    for name, data in {
        "one/results.jsonl": b"{}\n",
        "one/log.txt": b"begin" + os.urandom(50_000) + b"end",
        "cache/fused_lm/verified.json": b"records",
        "cache/triton/small": b"kernel",
    }.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    suite_archive.pack(source, archive)
    suite_archive.unpack(archive, target)
    assert (target / "one/results.jsonl").read_bytes() == b"{}\n"
    log = (target / "one/log.txt").read_bytes()
    assert len(log) == 1000 and log.endswith(b"end")
    assert (target / "cache/triton/small").is_file()

    (source / "cache/triton/large").write_bytes(os.urandom(50_000))
    suite_archive.pack(source, archive)
    suite_archive.unpack(archive, tmp_path / "c")
    assert not (tmp_path / "c/cache/triton").exists(), "caches are what can be made again"
    assert (tmp_path / "c/cache/fused_lm/verified.json").read_bytes() == b"records"
    (source / "one/results.jsonl").write_bytes(os.urandom(50_000))
    with pytest.raises(OSError, match="the results are more than"):
        suite_archive.pack(source, archive)
    suite_archive.unpack(archive, tmp_path / "d")
    assert (tmp_path / "d/one/results.jsonl").read_bytes() == b"{}\n", "the one before stays"


def test_the_stages_of_a_gpu_fit_a_piece() -> None:
    found = all_stages("cuda", "abc")
    assert len({stage.name for stage in found}) == len(found)
    assert {stage.name for stage in found} >= {*gpu_stages.QUICK, *gpu_stages.SANITIZERS}
    for stage in found:
        assert 0 < stage.least_s < stage.limit_s <= 600.0
        command = stage.command(Piece(Path("/out"), 100.0, first=True))
        assert all(isinstance(part, str) for part in command)
    for name, dtypes in (
        ("record", (" bfloat16 ",)),
        ("record of others", (" float16 ", " float32 ")),
    ):
        stage = next(stage for stage in found if stage.name == name)
        assert {*dtypes} <= {*stage.command(Piece(Path("/out"), 100.0, first=True))}


def test_the_races_of_a_suite_may_be_of_some(tmp_path: Path) -> None:
    run = _dry(tmp_path, "--only", "layernorm", "--contestants", "triton", "eager")
    assert run.returncode == 0, run.stdout + run.stderr
    lines = _lines(tmp_path / "layernorm/layernorm.jsonl")
    assert {line["contestant"] for line in lines if "us" in line} == {"triton", "eager"}


def test_roofs_are_of_the_device_they_name() -> None:
    import torch

    lines = list(roofs.roofs(torch.device("cpu")))
    assert [line["roof"] for line in lines] == ["copy", "matmul bf16", "launch"]
    assert all(line["value"] > 0 for line in lines)
