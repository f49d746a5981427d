"""CuTe's fragment layouts, from its own templates: CUTLASS' headers compiled for the host.

``nvidia-cutlass`` on PyPI carries the headers; nothing but these tests uses them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
from collections import defaultdict
from pathlib import Path

from tests.simt import build

SOURCE = Path(__file__).parent / "layouts.cpp"

Fragment = dict[tuple[int, int], tuple[int, int]]
"""(lane, value) -> (row, column)."""


def cutlass_include() -> Path | None:
    """The headers of the wheel, None where it isn't installed."""
    spec = importlib.util.find_spec("cutlass_library")
    for folder in spec.submodule_search_locations or () if spec else ():
        include = Path(folder) / "source/include"
        if (include / "cute/layout.hpp").is_file():
            return include
    return None


def unavailable() -> str | None:
    """Why there is nothing to compare with, None if there is."""
    if build.unavailable() is not None:
        return build.unavailable()
    if cutlass_include() is None:
        return "CUTLASS' headers are not installed: pip install --no-deps nvidia-cutlass==4.2.0.0"
    return None


def layouts() -> dict[str, Fragment]:
    """Every table of ``layouts.cpp`` by name.

    Raises:
        RuntimeError: The compiler's words.
    """
    done = subprocess.run([_program()], capture_output=True, text=True, check=True)
    found: dict[str, Fragment] = defaultdict(dict)
    for line in done.stdout.splitlines():
        table, *numbers = line.split() or [""]
        if len(numbers) != 4 or not numbers[0].isdigit():  # CuTe complains of the host
            continue
        lane, value, row, column = map(int, numbers)
        found[table][lane, value] = (row, column)
    return dict(found)


def _program() -> Path:
    """Compiled once for each content of the source and version of the headers."""
    cutlass, cuda = cutlass_include(), build.cuda_include()
    assert cutlass is not None and cuda is not None
    version = (cutlass / "cutlass/version.h").read_bytes()
    name = hashlib.sha256(SOURCE.read_bytes() + version + str(cuda).encode()).hexdigest()[:16]
    folder = build.OUTPUT / "cute"
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / name
    if not program.is_file():
        fresh = folder / f"{name}.{os.getpid()}"  # processes of xdist may meet here
        includes = [f"-isystem{path}" for path in (cutlass, cuda, cuda / "cccl")]
        command = ["g++", "-std=c++20", "-w", *includes, str(SOURCE), "-o", str(fresh)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}:\n{done.stderr}")
        fresh.replace(program)
    return program
