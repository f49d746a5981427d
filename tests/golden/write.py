"""``make golden``: compiles every kernel for every architecture and writes what ptxas says.

``python -m tests.golden.write [triton|cuda|planted]`` writes one of the files; the last, which no
other command does, holds what small kernels give on the harness. ``--only GLOB`` compiles the
Triton kernels of those names alone, where no other's code has changed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from build_tools import compiled as cuda
from build_tools import sources, toolchain
from build_tools.toolchain import Missing
from tests.golden import FOLDER, remember
from tests.test_golden_compile import ARCHS, code_hashes, compiled, golden_of
from tests.test_gpu_wrappers import GOLDEN as PLANTED
from tests.test_gpu_wrappers import on_the_harness


def write_triton(only: str = "*") -> int:
    import triton

    path = FOLDER / f"triton-{triton.__version__}.json"
    known = json.loads(path.read_text()) if path.is_file() and only != "*" else {}
    lines = {p: line for p, line in known.items() if not fnmatch(p.split(" ")[1], only)}
    with tempfile.TemporaryDirectory() as folder:
        for arch in ARCHS:
            reports = compiled(arch, Path(folder), only)
            errors = [f"{r['name']}: {r['error']}" for r in reports if r.get("error")]
            if errors:
                print("\n".join(errors), file=sys.stderr)
                return 1
            lines.update(golden_of(reports))
    return _write(f"triton-{triton.__version__}", lines, code_hashes())


def write_cuda() -> int:
    """Spills and remarks are printed; the gate refuses them whatever this file holds."""
    try:
        toolkit = toolchain.find_toolkit()
    except Missing as error:
        print(f"No file for CUDA: {error}", file=sys.stderr)
        return 0
    lines: dict[str, str] = {}
    for source, arch in cuda.targets():
        try:
            result = cuda.compiled(toolkit, source, arch)
        except cuda.CompileError as error:
            print(error, file=sys.stderr)
            return 1
        for problem in cuda.problems_of(result):
            print(problem, file=sys.stderr)
        lines.update(cuda.golden_of(result))
    code = {source.stem: sources.code_hash(source) for source, _ in cuda.targets()}
    return _write(f"cuda-{toolkit.release}", lines, code)


def write_planted() -> int:
    """What the planted kernels give on the harness, for a GPU to be held against."""
    found = on_the_harness()
    lines = [f"{json.dumps(name)}: {json.dumps(found[name])}" for name in sorted(found)]
    PLANTED.write_text("{\n" + ",\n".join(lines).replace(".0", "") + "\n}\n")
    print(f"{len(lines)} kernels in {PLANTED}")
    return 0


def _write(name: str, lines: dict[str, str], code: dict[str, str]) -> int:
    path = FOLDER / f"{name}.json"
    remember(name, code)
    path.write_text(json.dumps(lines, indent=0, sort_keys=True) + "\n")
    print(f"{len(lines)} kernels in {path}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", help="triton, cuda or planted; default: the first two")
    parser.add_argument("--only", default="*", help="names of Triton kernels, a glob")
    given = parser.parse_args()
    writers = {
        "triton": partial(write_triton, given.only), "cuda": write_cuda, "planted": write_planted,
    }  # fmt: skip
    return max(writers[name]() for name in given.files or ("triton", "cuda"))


if __name__ == "__main__":
    sys.exit(main())
