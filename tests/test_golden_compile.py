"""Every Triton kernel compiles for every GPU we support, with the resources of the golden file.

Registers, spills and shared memory are held; no GPU is needed. A file per version of Triton.
``make golden`` writes it anew: its diff is part of a review.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from fused_lm import records
from tests.golden import FOLDER, written_for

ARCHS = (80, 90, 100, 120)
ONCE_MORE = (90, 120)
"""What `make test-all` compiles again: the GPU that has been measured, and that with least shared
memory. ``make golden`` compiles for all.
"""
QUICK = (80, "*-bf16-?1*")
"""What `make test` compiles when the code has changed, target and names: kernels of each operator,
for sizes that begin with a 1. All of them take two minutes for each target.
"""
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
KERNELS = Path(records.__file__).parent / "triton_kernels"
HELD = ("registers", "spill_stores", "spill_loads", "shared_bytes", "num_warps")


def compiled(arch: int, folder: Path, only: str = "*") -> list[dict[str, Any]]:
    """Reports of kernels for one architecture, from a process outside the interpreter."""
    report = folder / f"sm_{arch}.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fused_lm.triton_kernels.compile_check"]
    done = subprocess.run(
        [*command, "--arch", str(arch), "--only", only, "--jobs", "1", "--json", str(report)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert report.is_file(), done.stderr[-2000:]
    return json.loads(report.read_text())


def golden_of(reports: list[dict[str, Any]]) -> dict[str, str]:
    """One line per kernel and architecture."""
    lines = {}
    for r in reports:
        place = f"sm_{r['arch']} {r['name']} {r['kernel']}"
        lines[place] = " ".join(f"{what}={r[what]}" for what in HELD)
    return lines


def code_hashes() -> dict[str, str]:
    """Of the code of every file with kernels, or that chooses and compiles them."""
    return {
        path.stem: hashlib.sha256(records.code_of(path.read_text()).encode()).hexdigest()[:16]
        for path in sorted(KERNELS.glob("*.py"))
    }


def _check(arch: int, only: str, folder: Path) -> None:
    import triton

    path = FOLDER / f"triton-{triton.__version__}.json"
    if not path.is_file():
        pytest.skip(f"no golden file for Triton {triton.__version__}: make golden")
    reports = compiled(arch, folder, only)
    errors = [f"{r['name']}: {r['error'][-300:]}" for r in reports if r.get("error")]
    assert not errors, "\n".join(errors)
    assert len({(r["name"], r["kernel"]) for r in reports}) >= 15
    for r in reports:
        assert r["shared_bytes"] <= SHARED_LIMIT[arch], r
    golden = json.loads(path.read_text())
    wanted = {
        place: line
        for place, line in golden.items()
        if place.startswith(f"sm_{arch} ") and fnmatch(place.split(" ")[1], only)
    }
    got = golden_of(reports)
    changed = [
        f"{place}: {got.get(place, 'gone')}, golden {wanted.get(place, 'nothing')}"
        for place in sorted(got.keys() | wanted.keys())
        if got.get(place) != wanted.get(place)
    ]
    assert not changed, "\n".join([*changed, "If this is meant: make golden"])


@pytest.mark.slow
@pytest.mark.parametrize("arch", ONCE_MORE)
def test_compiles_with_the_golden_resources(arch: int, tmp_path: Path) -> None:
    _check(arch, "*", tmp_path)


def test_the_golden_file_is_of_this_code(tmp_path: Path) -> None:
    """Of code that it was written for it tells all; of other code a part is compiled at once."""
    import triton

    wanted, found = written_for(f"triton-{triton.__version__}"), code_hashes()
    if wanted == found:
        return
    _check(*QUICK, tmp_path)
    changed = sorted(name for name in found if wanted.get(name) != found[name])
    if wanted:
        pytest.fail(f"{changed} changed; make golden compiles for all GPUs")
