"""verify's workers: lanes, what a crash, a hang or full memory loses, and when times are taken."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.cuda._utils import _get_device_index

from fused_lm import cli, records
from fused_lm.commands import verify
from fused_lm.parity import lanes, worker
from fused_lm.parity.cases import SMALL, verify_cases
from fused_lm.parity.supervise import supervise

PYTHON = (sys.executable, "-S", "-c")
GPU = torch.device("cuda", 0)


def test_verify_on_a_cpu_writes_no_record(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "out"
    assert cli.main(["verify", "--device", "cpu", "--limit", "2", "--out", str(out)]) == 0
    assert "no record is written" in capsys.readouterr().out
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [result["case"] for result in results] == [case.name for case in SMALL[:2]]
    assert all(result["parity"] and result["device"] == "interpreter" for result in results)
    assert (out / "environment.json").is_file()
    assert not records.user_file().exists()


WORKER = """
import argparse, json, os, time
parser = argparse.ArgumentParser()
parser.add_argument("--jobs"); parser.add_argument("--results")
args = parser.parse_args()
for job in map(int, args.jobs.split(",")):
    if job == 1:
        print("CUDA error: an illegal memory access", flush=True)
        os.abort()
    if job == 3:
        time.sleep(1000)
    with open(args.results, "a") as file:
        file.write(json.dumps({"job": job, "problem": None}) + chr(10))
    if job == 4:
        raise SystemExit(3)
"""


def test_jobs_survive_a_crash_and_a_hang(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    jobs = [0, 1, 2, 4, 3, 5]
    found = supervise([*PYTHON, WORKER], jobs, file, job_seconds=3.0, total_seconds=60.0)
    assert [result["job"] for result in found] == jobs
    good = [result["problem"] is None for result in found]
    assert good == [True, False, True, True, False, True], "a restart (exit status 3) loses nothing"
    assert "exit status -6; CUDA error: an illegal memory access" in found[1]["problem"]
    assert "no answer in 3 s" in found[4]["problem"]
    assert [json.loads(line) for line in file.read_text().splitlines()] == found


def test_supervise_ends_in_time(tmp_path: Path) -> None:
    worker = "import time; time.sleep(1000)"
    found = supervise([*PYTHON, worker], [0, 1], tmp_path / "r", 100.0, total_seconds=1.0)
    assert found == []


def test_a_worker_that_hears_ctrl_c_itself_loses_no_job(tmp_path: Path) -> None:
    hears = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
    assert supervise([*PYTHON, hears], [0, 1], tmp_path / "r", 100.0, 60.0) == []


LANE = """
import argparse, json, os
parser = argparse.ArgumentParser()
for name in ("phase", "jobs", "results", "threads"):
    parser.add_argument("--" + name)
args = parser.parse_args()
for job in map(int, args.jobs.split(",")):
    report = {"job": job, "problem": None, "parity": True, "lane": args.results}
    if args.phase == "times":
        if job == 3:
            os.abort()
        report = {"job": job, "problem": None, "times": {"infer": {"ratio": 2}}}
        if job == 5:
            report = {"job": job, "problem": "out of memory"}
    elif job == 1:
        os.abort()
    elif job == 2:
        report.update(problem="wrong", parity=False)
    elif job == 6 or (job == 4 and args.threads):
        report.update(problem="not measured", parity=False, worst="not measured")
    with open(args.results, "a") as file:
        file.write(json.dumps(report) + chr(10))
"""


def test_lanes_share_the_jobs_and_a_lost_one_loses_no_other(tmp_path: Path) -> None:
    found: list[dict[str, Any]] = []
    lanes.prove([*PYTHON, LANE], [0, 1, 2, 4, 5, 7, 8], 3, tmp_path, 60.0, 60.0, found.append)
    assert sorted(result["job"] for result in found) == [0, 1, 2, 4, 5, 7, 8]
    bad = {result["job"]: result["problem"] for result in found if result["problem"]}
    assert bad.keys() == {1, 2} and "exit status -6" in bad[1]
    where = {r["job"]: Path(r["lane"]).stem for r in found if "lane" in r}
    names = ["parity.0", "parity.2", "parity.1", "parity.2", "parity.0"]
    assert [where[job] for job in (0, 2, 5, 7, 8)] == names


def test_what_found_no_memory_beside_others_runs_again_alone(tmp_path: Path) -> None:
    found: list[dict[str, Any]] = []
    lanes.prove([*PYTHON, LANE], [4, 5, 6], 2, tmp_path, 60.0, 60.0, found.append)
    by_job = {result["job"]: result for result in found}
    assert len(found) == 3 and by_job[4]["parity"] and by_job[6]["problem"] == "not measured"
    alone = [json.loads(line)["job"] for line in (tmp_path / "parity.alone.jsonl").open()]
    assert alone == [4, 6]
    found.clear()
    lanes.prove([*PYTHON, LANE], [6], 1, tmp_path / "..", 60.0, 60.0, found.append)
    assert [r["job"] for r in found] == [6], "one lane is alone: nothing to gain by another try"
    assert not (tmp_path / ".." / "parity.alone.jsonl").exists()


def test_no_lane_outlives_a_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = "import sys, time; open(sys.argv[-1] + '.up', 'w').close(); time.sleep(1000)"
    shares = {"a": [0], "b": [1]}

    def interrupted(*args: Any, **options: Any) -> None:
        while len(list(tmp_path.glob("*.up"))) < 2:
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(lanes, "wait", interrupted)
    found: list[dict[str, Any]] = []
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        lanes.run_lanes([*PYTHON, hangs], shares, tmp_path, 60.0, 60.0, found.append)
    assert threading.active_count() == before and found == []
    assert [(tmp_path / f"{name}.jsonl").read_text() for name in shares] == ["", ""]


def test_lane_count(monkeypatch: pytest.MonkeyPatch) -> None:
    for cpus, jobs, count in ((16, 698, 12), (8, 698, 8), (16, 3, 3), (None, 9, 1), (16, 0, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda cpus=cpus: cpus)
        assert lanes.lane_count("cuda", jobs) == count
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert lanes.lane_count("cpu", 698) == 1


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Seven jobs on what looks like a GPU, done by LANE."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    records.forget()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "G")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    monkeypatch.setattr(verify, "chosen_device", lambda name: torch.device(name or GPU))
    jobs = [worker.Job(case, "bfloat16", "triton") for case in verify_cases()[:7]]
    monkeypatch.setattr(worker, "jobs_for", lambda device: jobs)
    monkeypatch.setattr(verify, "_worker", lambda device: [*PYTHON, LANE])
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    yield
    records.forget()


@pytest.mark.usefixtures("a_gpu")
def test_a_record_needs_parity_and_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main(["verify", "--out", str(out)]) == 1
    text = capsys.readouterr().out
    assert "2 passed, 5 failed, 2 timed\n" in text and text.count("not timed: ") == 2
    assert text.count("infer 2.00x of PyTorch's speed") == 2

    def classes(*jobs: int) -> list[tuple[str, str]]:
        return [(verify_cases()[i].op, worker.labels_of(_job(i), GPU)["family"]) for i in jobs]

    stored = records.load(records.user_file())
    good = [(r.op, r.family) for r in stored if r.parity and r.mode == "infer" and r.ratio == 2]
    bad = [(r.op, r.family) for r in stored if not r.parity and r.mode == "infer"]
    assert sorted(good) == sorted(classes(0, 4)) and sorted(bad) == sorted(classes(1, 2, 3))
    raw = [json.loads(line) for line in (out / "results.jsonl").open()]
    assert [r["job"] for r in raw] == list(range(7)) and raw[4]["times"] and raw[4]["parity"]

    assert cli.main(["verify", "--limit", "6", "--out", str(tmp_path / "next")]) == 1
    text = capsys.readouterr().out
    assert text.count("known") == 5 + 1 and "0 passed, 1 failed, 0 timed, 5 known" in text
    later = [json.loads(line)["job"] for line in (tmp_path / "next" / "results.jsonl").open()]
    assert later == [5], "what passed but was not timed is next"


def _job(index: int) -> worker.Job:
    return worker.Job(verify_cases()[index], "bfloat16", "triton")


@pytest.mark.usefixtures("a_gpu")
def test_parity_only_records_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["verify", "--parity-only", "--limit", "3", "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 1
    assert "1 passed, 2 failed\n" in capsys.readouterr().out
    stored = records.load(records.user_file())
    assert len(stored) == 4 and not any(record.parity for record in stored)


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize(
    "arguments, share", [([], 60.0), (["--parity-only"], 120.0), (["--device", "cpu"], 120.0)]
)
def test_parity_leaves_half_of_the_time_for_times(
    arguments: list[str],
    share: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given: dict[str, float] = {}

    def prove(*args: Any) -> None:
        given["parity"] = args[5]
        for job in (0, 3):
            args[-1](
                {"job": job, "problem": None, "parity": True, **worker.labels_of(_job(0), GPU)}
            )

    def run_lanes(command: list[str], shares: dict[str, list[int]], *args: Any) -> None:
        given["times"] = args[2]
        assert shares == {"times": [0, 3]} and command[-1] == "times"

    monkeypatch.setattr(verify, "prove", prove)
    monkeypatch.setattr(verify, "run_lanes", run_lanes)
    cli.main(["verify", "--minutes", "2", "--out", str(tmp_path / "out"), *arguments])
    assert given.pop("parity") == share
    assert ("times" in given) == (arguments == [])
    assert all(100 < seconds <= 120 for seconds in given.values()), "what parity left over too"
    assert "5 not reached: run it again" in capsys.readouterr().out
    assert arguments or not records.load(records.user_file()), "no time, no record"


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize(
    "words, kept", [(["rms_norm plain", "mixed"], [1, 6]), (["triton"], list(range(7)))]
)
def test_only(words: list[str], kept: list[int], tmp_path: Path) -> None:
    cli.main(["verify", "--out", str(tmp_path), "--parity-only", "--only", *words])
    raw = [json.loads(line)["job"] for line in (tmp_path / "results.jsonl").open()]
    assert raw == kept


def test_a_worker_takes_a_gpu_without_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.cuda.set_device refuses a plain "cuda", which is what verify is called with."""
    taken: list[int] = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: taken.append(_get_device_index(device))
    )
    monkeypatch.setattr(worker, "jobs_for", lambda device: [])
    for device in ("cuda", "cuda:1"):
        arguments = ["--device", device, "--phase", "parity", "--jobs", ""]
        results = str(tmp_path / "results")
        monkeypatch.setattr(sys, "argv", ["worker", *arguments, "--results", results])
        with contextlib.suppress(ValueError):
            worker.main()
    assert taken == [0, 1]


def test_a_class_has_a_record_when_all_of_its_cases_were_timed() -> None:
    label = {
        "op": "attention", "backend": "cuda", "dtype": "bfloat16", "family": "d64-band", "size": 1,
        "kernel": "k", "gpu": "G", "problem": None, "parity": True,
    }  # fmt: skip
    timed = {**label, "times": {way: {"ratio": 2.0} for way in ("infer", "train")}}
    other = {**timed, "family": "d64-plain"}
    wrong = {**label, "parity": False, "problem": "wrong"}

    def made(*results: dict[str, Any], missed: tuple[dict[str, Any], ...] = ()) -> list[Any]:
        return [(r.family, r.parity) for r in verify.records_of([*results], missed)][::2]

    assert made(timed, timed, other) == [("d64-band", True)] * 2 + [("d64-plain", True)]
    assert made(timed, label, other) == [("d64-plain", True)]
    assert made(timed, other, missed=(label,)) == [("d64-plain", True)]
    assert made(timed, label, wrong) == [("d64-band", False)], "what is wrong is wrong at once"


@pytest.mark.parametrize(
    "problem",
    [
        {"worst": "not measured", "problem": "not measured, CUDA out of memory"},
        {"problem": "RuntimeError: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"},
        {"problem": "no answer in 90 s; nothing printed", "lost": True},
    ],
    ids=lambda problem: str(problem["problem"])[:20],
)
def test_what_the_other_lanes_may_have_caused_runs_again_alone(problem: dict[str, Any]) -> None:
    assert lanes._may_be_the_others_fault(problem)
    assert not lanes._may_be_the_others_fault({"problem": "dx: error 1 > allowed 0.5"})
    assert not lanes._may_be_the_others_fault({"problem": None})
