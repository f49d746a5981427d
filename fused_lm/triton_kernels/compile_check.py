"""Compiles the Triton kernels for GPUs that aren't here, and reports what ptxas says about them.

    python -m fused_lm.triton_kernels.compile_check --arch 80 --arch 90 --jobs 2 --json report.json

Each module of ``MODULES`` has a function ``instantiations() -> dict[str, Callable[[], object]]``:
a name and a call of that module's host functions with tensors on the device "meta". The call runs
as it would on a GPU, tile choice included, except that every kernel launch becomes a compilation
for the target. To add kernels, write such a function and append the module's name.

Reported per kernel and target: registers per thread, bytes of spill stores and loads, shared memory
(ptxas' static part plus what Triton asks for at launch), warps, seconds. Two idle cores take about
two minutes for four targets. Nothing is read from or written to Triton's cache. The exit status is
1 if a kernel doesn't compile or asks for more shared memory than the target has.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

MODULES = [
    "fused_lm.triton_kernels.attention_instantiations",
    "fused_lm.triton_kernels.cross_entropy",
    "fused_lm.triton_kernels.layernorm",
    "fused_lm.triton_kernels.linear_act",
    "fused_lm.triton_kernels.linear_residual",
    "fused_lm.triton_kernels.ffn",
    "fused_lm.triton_kernels.rotary",
]


def instantiations(only: str = "*") -> dict[str, Callable[[], object]]:
    """Every named instantiation of ``MODULES`` whose name matches the glob."""
    found: dict[str, Callable[[], object]] = {}
    for module in MODULES:
        found.update(importlib.import_module(module).instantiations())
    return {name: call for name, call in sorted(found.items()) if fnmatch.fnmatch(name, only)}


class _Target:
    """Stands in for Triton's driver: a target without a device."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> int:
        return self._target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target


@contextlib.contextmanager
def _launches_compile(arch: int, report: Callable[[Any, str, float], None]) -> Iterator[None]:
    """Inside, a launch compiles for ``arch`` and reports (kernel, ptxas log, seconds)."""
    import triton
    from triton.runtime.jit import JITFunction

    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        self.device_caches.clear()
        log = io.StringIO()
        start = time.perf_counter()
        with contextlib.redirect_stdout(log):
            kernel = original(self, *args, grid=grid, warmup=True, **options)
        report(kernel, log.getvalue(), time.perf_counter() - start)

    triton.runtime.driver.set_active(_Target(arch))
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True
    JITFunction.run = run
    try:
        with tempfile.TemporaryDirectory() as cache:
            triton.knobs.cache.dir = cache
            yield
    finally:
        JITFunction.run = original


def compile_one(task: tuple[str, int]) -> list[dict[str, Any]]:
    """Compiles the instantiation (name, arch); one row per kernel it launches, or one error row."""
    name, arch = task
    rows: list[dict[str, Any]] = []

    def report(kernel: Any, log: str, seconds: float) -> None:
        row = {"name": name, "arch": arch, "kernel": kernel.metadata.name}
        rows.append(row | _resources(kernel, log) | {"seconds": round(seconds, 2)})

    try:
        with _launches_compile(arch, report):
            instantiations(name)[name]()
    except Exception as error:
        rows.append(
            {"name": name, "arch": arch, "kernel": "", "error": f"{type(error).__name__}: {error}"}
        )
    return rows


def _resources(kernel: Any, log: str) -> dict[str, Any]:
    from fused_lm.triton_kernels.launch import shared_memory_limit

    def number(pattern: str) -> int:
        return sum(int(n) for n in re.findall(pattern, log))

    found: dict[str, Any] = {
        "registers": number(r"Used (\d+) registers"),
        "spill_stores": number(r"(\d+) bytes spill stores"),
        "spill_loads": number(r"(\d+) bytes spill loads"),
        "shared_bytes": number(r"(\d+) bytes smem") + kernel.metadata.shared,
        "num_warps": kernel.metadata.num_warps,
    }
    limit = shared_memory_limit(kernel.metadata.target.arch)
    if found["shared_bytes"] > limit:
        found["error"] = f"{found['shared_bytes']} bytes of shared memory, the target has {limit}"
    return found


def _print_row(row: dict[str, Any]) -> None:
    place = f"sm_{row['arch']:<4}{row['name']:<42}{row['kernel']:<22}"
    if "registers" not in row:
        print(f"{place}{row['error']}", flush=True)
        return
    print(
        f"{place}{row['registers']:>4} regs "
        f"{row['spill_stores']:>5}/{row['spill_loads']:<5} B spilled "
        f"{row['shared_bytes']:>7} B shared {row['num_warps']:>2} warps {row['seconds']:>6.2f} s  "
        f"{row.get('error', '')}",
        flush=True,
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="compile_check", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--arch", type=int, action="append", help="80, 86, 89, 90, 100 or 120; repeatable"
    )
    parser.add_argument("--only", default="*", metavar="GLOB", help="names of instantiations")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", metavar="OUT", help="write the rows as JSON, sorted")
    options = parser.parse_args(arguments)

    # Under the interpreter a kernel can't be compiled. Nothing has imported triton yet.
    os.environ.pop("TRITON_INTERPRET", None)
    archs = options.arch or [90]
    tasks = [(name, arch) for arch in archs for name in instantiations(options.only)]
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        run: Any = map
        if options.jobs > 1:
            spawn = multiprocessing.get_context("spawn")
            run = stack.enter_context(spawn.Pool(options.jobs)).imap_unordered
        for done in run(compile_one, tasks):
            rows.extend(done)
            for row in done:
                _print_row(row)
    rows.sort(key=lambda row: (row["name"], row["kernel"], row["arch"]))
    errors = sum("error" in row for row in rows)
    seconds = time.perf_counter() - start
    print(f"{len(rows)} kernels in {seconds:.0f} s, {errors} errors")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as out:
            json.dump(rows, out, indent=1, sort_keys=True)
            out.write("\n")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
