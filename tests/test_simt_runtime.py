"""The harness' Python side: what happens to the inputs of an operator, where device memory is made,
a scratch kernel; and rules for kernels whose breach the harness can't see.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from tests.simt import build, mutants, runtime

PROBLEM = build.unavailable()
pytestmark = pytest.mark.skipif(
    PROBLEM is not None or runtime.sanitized(), reason=str(PROBLEM or "the sanitizers are here")
)

# Inputs.


def test_refuses_a_kernel_that_writes_to_its_input() -> None:
    x, y = torch.ones(3, 4), torch.ones(2)
    with pytest.raises(RuntimeError, match="wrote to argument 1, an input"):
        runtime.run_on_copies(lambda x, y: y.mul_(2), set(), (x, y))
    assert torch.equal(y, torch.ones(2))
    runtime.run_on_copies(lambda x, y: y.mul_(2), {1}, (x, y))
    assert torch.equal(y, torch.full((2,), 2.0))


def test_what_a_kernel_may_write_to_is_written() -> None:
    x, rows = torch.ones(3, 4), torch.ones(3, 8)
    runtime.run_on_copies(lambda x, y: y.mul_(2), {1}, (x, rows[:, :4]))
    assert torch.equal(rows, torch.cat([torch.full((3, 4), 2.0), torch.ones(3, 4)], 1))


def test_refuses_a_kernel_that_writes_between_rows() -> None:
    rows = torch.ones(3, 8)[:, :4]
    with pytest.raises(RuntimeError, match="wrote to argument 0"):
        runtime.run_on_copies(lambda x: x.as_strided((20,), (1,)).zero_(), set(), (rows,))


def test_schema_says_what_may_be_written() -> None:
    library = torch.library.Library("simt_runtime_test", "DEF")
    library.define("accumulate(Tensor x, Tensor(a!) y) -> ()")
    function = torch.ops.simt_runtime_test.accumulate.default
    assert runtime._mutated(function) == {1}


def test_poisons_what_lies_between_rows() -> None:
    harness = runtime.load(runtime.ONE)
    rows = torch.arange(24.0).reshape(3, 8)[:, 1:5]
    with harness.device_memory():
        copy = runtime._copied(rows)
    assert torch.equal(copy.tensor, rows) and copy.tensor.stride() == rows.stride()
    assert copy.tensor.data_ptr() % 16 == rows.data_ptr() % 16
    assert int(copy.memory.isnan().sum()) == copy.memory.numel() - rows.numel()


@pytest.mark.parametrize(
    ("size", "stride"), [((3, 4), (0, 1)), ((3, 4), (2, 1)), ((1, 4), (0, 1)), ((4, 3), (1, 4))]
)
def test_copies_every_layout(size: tuple[int, int], stride: tuple[int, int]) -> None:
    t = torch.randn(32).as_strided(size, stride, 3)
    copy = runtime._copied(t).tensor
    assert torch.equal(copy, t) and copy.stride() == t.stride()


# Device memory.


def test_device_memory_nests_and_belongs_to_its_thread() -> None:
    harness = runtime.load(runtime.ONE)
    made = {}

    def make(name: str) -> None:
        memory = torch.empty(8)
        made[name] = harness.module.is_device_memory(memory.data_ptr())

    with harness.device_memory():
        with harness.device_memory():
            make("inside")
        make("after the inner")
        other = threading.Thread(target=make, args=("other thread",))
        other.start()
        other.join()
    make("after")
    assert made == {"inside": True, "after the inner": True, "other thread": False, "after": False}


# A scratch kernel.


def test_tries_the_kernel_of_the_readme(tmp_path: Path) -> None:
    readme = (build.HERE / "README.md").read_text()
    (code,) = re.findall(r"```cuda\n(.*?)```", readme, re.DOTALL)
    file = tmp_path / "scratch.cu"
    file.write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "tests.simt.try_kernel", str(file)],
        cwd=build.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    right, wrong = done.stdout.split("turned_row, with its mistake")
    assert "14 of 14 schedules: nothing" in right
    assert re.search(r"schedules: .* at scratch\.cu:\d+", wrong) and "nothing" not in wrong


# Rules for kernels.

UNSEEN = re.compile(
    r"(?:\]|^\s*\*[\w.>()-]+|[^\w=!<>]\*\w+)\s*=\s*"
    r"__(?:float2(?:bfloat16|half)|floats2|halves2|ushort_as_|h(?:add|sub|mul|fma|max|min)\w*\()"
)
"""A store through a pointer of what a conversion returns as a structure: g++ announces none."""
DEVICE_FILES = sorted(p for f in ("kernels", "common") for p in (build.ROOT / "csrc" / f).glob("*"))


@pytest.mark.parametrize("path", DEVICE_FILES, ids=lambda path: path.name)
def test_stores_through_integer_types(path: Path) -> None:
    found = [line for line in path.read_text().splitlines() if UNSEEN.search(line)]
    assert not found


def test_finds_unseen_stores() -> None:
    lines = (build.HERE / "planted/memory.cu").read_text().splitlines()
    assert [line.strip() for line in lines if UNSEEN.search(line)] == [
        "smem.value[thread] = __float2bfloat16(gIn[thread]);"
    ]
    assert UNSEEN.search("  *p = __floats2bfloat162_rn(a, b);")
    assert not UNSEEN.search("    word[e] = __float_as_uint(value);")


def test_mutants_know_their_lines() -> None:
    path = build.ROOT / "csrc/kernels/layernorm_bwd.cu"
    calls = mutants.calls_in({path})
    assert calls
    for site in calls:
        name, text, nth = mutants.key_of(site)
        assert (name, nth >= 1) == ("kernels/layernorm_bwd.cu", True) and "sync" in text
    assert build.ROOT / "csrc/common/warp.h" in mutants.sources_of("layernorm*")


def test_a_hunt_refuses_survivors(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody passes, what changes nothing, and what is excused without need."""
    hunt = mutants.Hunt(runtime.load("race"), 2)
    kernels = ("copy_read_by_others", "count_in_parts")
    for kernel in kernels:
        run = hunt.harness.module.run_planted
        hunt.drop_each(kernel, lambda run=run, kernel=kernel: [torch.tensor(run(kernel, False))])
    assert len(hunt.killed) == 3
    assert list(hunt.alive.values()) == [["count_in_parts"]]
    planted = {build.HERE / "planted" / name for name in ("copies.cu", "counted.cu")}
    text = "\n".join(hunt.problems(planted))
    assert "no call passes" in text and "changes nothing in ['count_in_parts']" in text
    excused = dict.fromkeys([*hunt.killed, *hunt.alive], "why")
    excused[str(build.HERE / "planted/copies.cu"), "gone();", 1] = "why"
    monkeypatch.setattr(mutants, "SURVIVORS", excused)
    problems = hunt.problems(planted)
    assert sum("dies in every call" in problem for problem in problems) == 4
    assert not any("changes nothing" in problem for problem in problems)


@pytest.mark.parametrize("name", ["plain", "race"])
def test_torch_goes_on_with_its_own_memory(name: str) -> None:
    """oneDNN asks the CPU allocator in its own way, with or without the harness before it."""
    harness = runtime.load(name)
    x = torch.randn(64, 48)
    outside = torch.nn.functional.gelu(x)
    with harness.device_memory():
        inside = torch.nn.functional.gelu(x)
    assert harness.module.is_device_memory(inside.data_ptr())
    assert not harness.module.is_device_memory(outside.data_ptr())
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)
