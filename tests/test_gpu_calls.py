"""The harness' calls in shares, without a GPU: what hangs, crashes, is reported or is cut. Another
program stands in for compute-sanitizer.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import call_share, gpu_calls
from benchmarks.gpu_calls import Proof, run
from tests import gpu
from tests.golden import compiled_kernels

ROOT = Path(__file__).resolve().parents[1]
CALLS = """
import os, signal, time
import pytest

def once(name):
    first = not os.path.exists(name)
    open(name, "a").close()
    return first

@pytest.mark.parametrize("i", range(5))
def test_fine(i):
    open(f"fine{i}", "a").write("x")
    if file := os.environ.get("FUSED_LM_TEST_KERNELS"):
        open(file, "a").write(f"kernel<{i % 2}>\\n")

def test_wrong():
    assert 1 == 2, "numbers"

@pytest.mark.skip
def test_elsewhere(): ...

def test_loses_the_context():
    raise RuntimeError("CUDA error: an illegal memory access")

@pytest.mark.parametrize("i", range(9))
def test_dies(i):
    os.kill(os.getpid(), signal.SIGKILL)

def test_hangs():
    open("hangs", "w").write(str(os.getpid()))
    time.sleep(99)

def test_after_it(): ...
"""
SANITIZER = """#!{python}
import os, subprocess, sys
words = sys.argv[1:]
log = words[words.index("--log-file") + 1]
assert os.environ["FUSED_LM_TEST_REPEATS"] == "1"
if {broken}:
    open(log, "w").write("Error: Device not supported")
    sys.exit(1)
status = subprocess.call(words[words.index(sys.executable):])
fine = [word for word in words if "test_fine" in word]
with open(log, "w") as out:
    for i, _ in enumerate(fine):
        print(f"========= Error: Race reported between Read access at f()+0x{{i}}0", file=out)
    print(f"========= RACECHECK SUMMARY: {{len(fine)}} hazards displayed", file=out)
sys.exit(9 if fine else status)
"""


COMMAND = (sys.executable, "-m", "benchmarks.gpu_calls", "plain", "--tests", "test_calls.py")


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Ids, which are the same in every folder."""
    folder = tmp_path_factory.mktemp("collected")
    (folder / "test_calls.py").write_text(CALLS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return gpu_calls.collected("test_calls.py")


@pytest.fixture
def calls(collected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a file in the folder that processes run in."""
    (tmp_path / "test_calls.py").write_text(CALLS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(gpu_calls, "LEAST_SECONDS", 0.5)
    return collected


def _only(calls: list[str], *tests: str) -> list[str]:
    return [call for call in calls if gpu_calls.test_of(call) in tests]


def _outcomes(proof: Proof) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {}
    for call, (outcome, _) in proof.outcomes.items():
        found.setdefault(gpu_calls.test_of(call), Counter())[outcome] += 1
    return found


def _put_sanitizer(folder: Path, monkeypatch: pytest.MonkeyPatch, broken: bool = False) -> None:
    program = folder / "bin/compute-sanitizer"
    program.parent.mkdir()
    program.write_text(SANITIZER.format(python=sys.executable, broken=broken))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


def test_no_call_loses_the_others(
    calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call_share, "SILENCE_SECONDS", 5.0)
    proof = Proof(tmp_path)
    assert run("plain", proof, calls, 1, time.monotonic() + 90.0) == 0
    assert _outcomes(proof) == {
        "test_fine": {"passed": 5},
        "test_wrong": {"failed": 1},
        "test_elsewhere": {"skipped": 1},
        "test_loses_the_context": {"crashed": 1},
        "test_dies": {"crashed": gpu_calls.MOST_CRASHES, "left out": 9 - gpu_calls.MOST_CRASHES},
        "test_hangs": {"hung": 1},
        "test_after_it": {"passed": 1},
    }
    words = "\n".join(proof.words())
    assert "failed: test_wrong: AssertionError: numbers" in words and "left out: 6 more" in words
    assert "crashed: test_dies[0]: SIGKILL" in words and "an illegal memory access" in words
    assert proof.sum_up() == "6 passed, 1 failed, 4 crashed, 1 hung, 6 left out, 1 skipped"
    assert not _runs(int((tmp_path / "hangs").read_text()))
    assert Proof(tmp_path).outcomes == proof.outcomes and not proof.is_clean()


def test_it_goes_on_where_its_time_was_over(calls: list[str], tmp_path: Path) -> None:
    chosen = [*_only(calls, "test_fine"), *_only(calls, "test_hangs")]
    proof = Proof(tmp_path)
    assert run("plain", proof, chosen, 1, time.monotonic() + 4.0) == 6, "cut, not hung"
    assert not proof.outcomes
    assert run("plain", proof, chosen[:5], 1, _soon()) == 0
    before = (tmp_path / "fine0").read_text()
    assert proof.kernels == {"kernel<0>", "kernel<1>"}
    again = Proof(tmp_path)
    assert again.kernels == proof.kernels
    assert run("plain", again, [*chosen[:5], *_only(calls, "test_wrong")], 1, _soon()) == 0
    assert (tmp_path / "fine0").read_text() == before, "not again"
    assert again.sum_up() == "5 passed, 1 failed"


def _soon() -> float:
    return time.monotonic() + 60.0


def test_what_did_not_pass_is_asked_again_when_nothing_is_new(
    calls: list[str], tmp_path: Path
) -> None:
    (wrong,) = _only(calls, "test_wrong")
    run("plain", Proof(tmp_path), [wrong], 1, _soon())
    (tmp_path / "test_calls.py").write_text(CALLS.replace("1 == 2", "1 == 1"))
    proof = Proof(tmp_path)
    assert run("plain", proof, [wrong], 1, _soon()) == 0 and proof.is_clean()
    assert Proof(tmp_path).is_clean()


def test_what_is_skipped_proves_nothing(calls: list[str], tmp_path: Path) -> None:
    proof = Proof(tmp_path)
    assert run("plain", proof, _only(calls, "test_elsewhere"), 1, _soon()) == 0
    assert proof.sum_up() == "0 passed, 1 skipped" and not proof.is_clean()


def test_a_report_is_kept_though_all_calls_pass(
    calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two processes at once, whose reports differ by an address."""
    _put_sanitizer(tmp_path, monkeypatch)
    monkeypatch.setattr(gpu_calls, "AT_ONCE", 3)
    proof = Proof(tmp_path)
    assert run("racecheck", proof, _only(calls, "test_fine", "test_after_it"), 2, _soon()) == 0
    assert _outcomes(proof) == {"test_fine": {"passed": 5}, "test_after_it": {"passed": 1}}
    assert [*proof.words()] == ["5 times Error: Race reported between Read access at f()"]
    assert not proof.is_clean() and Proof(tmp_path).reports == proof.reports
    assert not proof.kernels, "CUPTI and a sanitizer share no process"


def test_a_tool_that_does_not_work_proves_nothing(
    calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _put_sanitizer(tmp_path, monkeypatch, broken=True)
    with pytest.raises(RuntimeError, match="racecheck, exit status 1: Error: Device not supported"):
        run("racecheck", Proof(tmp_path), _only(calls, "test_fine"), 1, _soon())
    with pytest.raises(RuntimeError, match="plain, exit status 4"):
        run("plain", Proof(tmp_path), ["test_calls.py::test_nowhere"], 1, _soon())


@pytest.mark.parametrize("fine", [True, False])
def test_the_command_says_what_came_out(fine: bool, calls: list[str], tmp_path: Path) -> None:
    (tmp_path / "test_calls.py").write_text(f"def test_it(): assert {fine}")
    process = subprocess.run(
        [*COMMAND, "--out", "found"], capture_output=True, text=True, check=False
    )
    assert process.returncode == (not fine), process.stderr
    how = "1 passed" if fine else "0 passed, 1 failed"
    assert process.stdout.splitlines()[-1] == f"plain, 1 calls: {how}, 0 kernels"
    assert Proof(tmp_path / "found").sum_up() == how


def test_what_it_started_ends_with_it(calls: list[str], tmp_path: Path) -> None:
    """As the suite ends a stage: by a signal to the whole group."""
    source = CALLS[CALLS.index("def test_hangs") : CALLS.index("def test_after_it")]
    (tmp_path / "test_calls.py").write_text(f"import os, time\n{source}")
    process = subprocess.Popen([*COMMAND, "--out", "found"], start_new_session=True)
    end, pid = time.monotonic() + 60.0, tmp_path / "hangs"
    while not (pid.is_file() and pid.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    while _runs(int(pid.read_text())) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _runs(int(pid.read_text()))


def _runs(pid: int) -> bool:
    """Nobody may have asked how it ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except OSError:
        return False
    return state != "Z"


def test_kernels_are_noted_by_this_projects_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As CUPTI has them, demangled; torch's own are none of ours."""
    template = "void fused_lm::attention_fwd::attention_fwd_sm80<__nv_bfloat16, 192, true>"
    ours = SimpleNamespace(name=f"{template}(fused_lm::AttentionForwardParams, int)")
    torchs = SimpleNamespace(name="void at::native::copy<float>(int)")

    class Seen:
        def __enter__(self) -> Seen:
            return self

        def __exit__(self, *error: object) -> None: ...

        def events(self) -> list[SimpleNamespace]:
            return [ours, torchs, ours]

    monkeypatch.setattr(gpu, "profile", lambda activities: Seen())
    with gpu.kernels_noted():
        pass
    monkeypatch.setenv("FUSED_LM_TEST_KERNELS", str(tmp_path / "kernels"))
    with gpu.kernels_noted():
        pass
    (noted,) = (tmp_path / "kernels").read_text().splitlines()
    assert noted in compiled_kernels("attention_fwd_sm80_bf16", ("sm_90",))
