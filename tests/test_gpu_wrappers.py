"""The wrappers of csrc/ptx on a GPU: every planted kernel, in its version without a mistake, gives
what it gives on the harness. So what the harness believes of an instruction, hardware confirms.

The kernels compute small whole numbers: equal means equal. What they give on the harness is in
``golden/planted.json`` (``python -m tests.golden.write planted``), and is held against it here.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import struct
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from build_tools import toolchain
from build_tools.toolchain import Missing
from tests.simt import build, runtime

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden/planted.json"
FLAGS = ("-std=c++17", "-O1", "-Icsrc", "-Itests/simt", "-w", "-Xcompiler", "-fPIC")
CAPABILITY = (9, 0)
"""wgmma, which some of the files have, is Hopper's and nobody else's."""
PROBLEM = build.unavailable()
MOST_SHOWN = 256
BOTH_RIGHT = ("fragments_", "count_")
"""Kernels whose other version has no mistake either."""


def versions(names: Sequence[str]) -> list[tuple[str, bool]]:
    """Of each kernel the right one; where both are, both."""
    return [(n, other) for n in names for other in (False, True)[: 1 + n.startswith(BOTH_RIGHT)]]


def summary(values: Sequence[float]) -> list[float] | str:
    """The numbers, or of many a hash."""
    if len(values) <= MOST_SHOWN:
        return list(values)
    content = struct.pack(f"<{len(values)}f", *values)
    return f"{len(values)} numbers {hashlib.sha256(content).hexdigest()[:16]}"


def on_the_harness() -> dict[str, list[float] | str]:
    """Without the kernels that give zeros, which show nothing."""
    harness = runtime.load(runtime.ONE)
    harness.configure()
    module = harness.module
    found = {
        _key(name, other): module.run_planted(name, other)
        for name, other in versions(module.planted_kernels())
    }
    return {key: summary(values) for key, values in found.items() if any(values)}


def _key(name: str, other: bool) -> str:
    return f"{name}, the other" if other else name


def golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text())


@pytest.mark.skipif(
    PROBLEM is not None or runtime.sanitized(), reason=str(PROBLEM or "the sanitizers are here")
)
def test_golden_numbers_are_the_harness_own() -> None:
    found, wanted = on_the_harness(), golden()
    changed = [key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key)]
    assert not changed, f"{sorted(changed)}: python -m tests.golden.write planted"


def compiled(arch: str, folder: Path, *flags: str) -> list[Path]:
    """Object files of all planted kernels, and of what launches them, for one architecture: what
    only that one has, wgmma, is among them.

    Raises:
        Missing: There is no nvcc.
    """
    nvcc = str(toolchain.find_toolkit().nvcc)
    sources = [p for p in sorted((ROOT / "tests/simt/planted").glob("*.cu")) if p.stem != "planted"]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        command = [
            nvcc,
            *FLAGS,
            *flags,
            f"-gencode=arch=compute_{arch}a,code=sm_{arch}a",
            "-c",
            str(source),
            "-o",
            str(target),
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return target

    with ThreadPoolExecutor(toolchain.jobs()) as pool:
        return list(pool.map(compile_one, [*sources, ROOT / "tests/gpu_planted.cu"]))


def _no_toolkit() -> str | None:
    try:
        toolchain.find_toolkit()
    except Missing as error:
        return str(error)
    return None


@pytest.mark.slow
@pytest.mark.skipif(_no_toolkit() is not None, reason=str(_no_toolkit()))
def test_they_compile_for_a_gpu(tmp_path: Path) -> None:
    """Where there is none, so that nothing is in the way when there is."""
    for path in compiled("90", tmp_path, "-Xcicc", "-O0", "-Xptxas", "-O0"):
        assert path.stat().st_size > 1000


def _refusal() -> str | None:
    if not torch.cuda.is_available():
        return "no GPU"
    if torch.cuda.get_device_capability() != CAPABILITY:
        return "wgmma is sm_90's alone"
    return _no_toolkit()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("planted")
    arch = "".join(map(str, torch.cuda.get_device_capability()))
    objects = compiled(arch, folder)
    target = folder / "planted.so"
    nvcc = str(toolchain.find_toolkit().nvcc)
    subprocess.run([nvcc, "-shared", "-o", str(target), *map(str, objects)], check=True)
    loaded = ctypes.CDLL(str(target))
    loaded.planted_run.restype = ctypes.c_char_p
    return loaded


@pytest.mark.gpu
@pytest.mark.skipif(_refusal() is not None, reason=str(_refusal()))
@pytest.mark.parametrize("key", sorted(golden()))
def test_a_gpu_gives_what_the_harness_gives(key: str, library: ctypes.CDLL) -> None:
    name, _, other = key.partition(", ")
    result = (ctypes.c_float * library.planted_outputs(name.encode()))()
    problem = library.planted_run(name.encode(), bool(other), result)
    assert not problem, problem.decode()
    assert summary(list(result)) == golden()[key]
