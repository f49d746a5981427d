"""What the compiled kernels could reach at most, from their instructions alone: no GPU is needed.

    python -m benchmarks.static [--gpu H200] [--arch 90] [--kernel GLOB] [--threads N] [--json OUT]

Without options each architecture of the release is shown on one GPU. Per kernel: registers, shared
memory per block, threads per block (its launch bound), resident blocks and warps; then, for one
pass of its main loop (a kernel without one: for its whole body), the instructions by class and how
long each unit of a multiprocessor is busy, in % of the busiest, which is the bound. A pass has a
heavy and a lean path, see benchmarks/machine_code.py; rates follow from each.

These are bounds from instruction counts, not measurements: no kernel can be faster, and most are
slower. Not modelled:

- latency, and whether the resident warps hide it ("in flight" is what their loads could have
  outstanding: hardware needs bandwidth times latency, about 26 KB per multiprocessor on an H200);
- caches: stores and loads that the code keeps out of the L1 count as DRAM traffic, also where the
  L2 serves them, but for the tiles that a kernel of the tensor cores copies into shared memory:
  other blocks read the same, so they count as the L2's; loads that the code lets into the L1
  count only in a kernel without any of the former;
- predication: a predicated instruction counts fully, also where no lane executes it;
- bank conflicts, and lanes of one vector that fall into different sectors or past an edge;
- how often a loop inside the region runs (it counts once), prologue and epilogue around it, the
  tail of the grid;
- bytes that TMA moves and the work of tcgen05.mma, whose sizes are not in the instruction;
- mma.sync counts at the full tensor rate on Blackwell, which gives it a part; on Hopper at what was
  measured.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from build_tools import compiled, toolchain
from build_tools.compiled import Kernel

from . import gpus, machine_code
from .gpus import BY_CODE, GPUS, WARP, Gpu, Occupancy
from .machine_code import Graph, Instruction, Loop

LEAN_SHARES = (1.0, 0.5, 0.25, 0.125, 0.0)
UNITS = ("issue", "FP32", "ALU", "MUFU", "shared", "tensor", "L2", "DRAM")


@dataclass(frozen=True)
class Bound:
    """One pass of a warp.

    Attributes:
        cycles: Of the multiprocessor, by unit.
        loaded: Bytes that a thread loads past the L1, from DRAM or the L2.
        cached: Bytes that it loads through the L1, taken as served there.
        stored: Bytes that it stores to global memory.
        rate_bytes: Of DRAM per second, on the whole GPU; rate_flops: of the tensor cores.
    """

    path: str
    instructions: int
    mix: dict[str, int]
    loaded: int
    cached: int
    stored: int
    cycles: dict[str, float]
    unit: str
    rate_bytes: float
    rate_flops: float


@dataclass(frozen=True)
class Row:
    """A kernel on a GPU; ``shared`` is None where its dynamic part is unknown."""

    kernel: str
    source: str
    arch: str
    gpu: str
    registers: int
    shared: int | None
    threads: int
    occupancy: Occupancy
    region: str
    bounds: list[Bound]


class Traffic:
    """What a kernel moves through the L2 and to and from DRAM, per instruction and thread."""

    def __init__(self, kernel: Iterable[Instruction]) -> None:
        code = list(kernel)
        self._marked = any(instruction.is_streaming for instruction in code)
        self._tiled = any(instruction.flops for instruction in code)

    def l2_bytes(self, instruction: Instruction) -> int:
        """What passes the L2, all of DRAM's among it."""
        cached = instruction.kind != "STG" and self._marked and not instruction.is_streaming
        return 0 if cached else instruction.global_bytes

    def dram_bytes(self, instruction: Instruction) -> int:
        served = self._tiled and instruction.kind == "LDGSTS"
        return 0 if served else self.l2_bytes(instruction)


def cycles_of(code: Iterable[Instruction], gpu: Gpu, traffic: Traffic) -> dict[str, float]:
    """How long one warp's instructions keep each unit of a multiprocessor busy."""
    cycles = dict.fromkeys(UNITS, 0.0)
    for instruction in code:
        kind = instruction.kind
        cycles["issue"] += 1 / gpus.ISSUE_RATE
        if kind == "FP32":
            cycles["FP32"] += WARP / gpu.limits.fp32_rate
        elif kind == "ALU":
            cycles["ALU"] += WARP / gpus.ALU_RATE
        elif kind in ("MUFU", "convert"):
            cycles["MUFU"] += WARP / gpus.MUFU_RATE
        cycles["shared"] += WARP * instruction.shared_bytes / gpus.SHARED_BYTES
        share = gpu.mma_sync_share if instruction.base == "HMMA" else 1.0
        cycles["tensor"] += instruction.flops / (gpu.tensor_flops * share)
        cycles["L2"] += WARP * traffic.l2_bytes(instruction) / gpus.L2_BYTES
        cycles["DRAM"] += WARP * traffic.dram_bytes(instruction) / gpu.dram_bytes_per_clock
    return cycles


def bound_of(path: str, code: list[Instruction], gpu: Gpu, traffic: Traffic) -> Bound:
    """The busiest unit, and what the GPU would do if it were never idle."""
    cycles = cycles_of(code, gpu, traffic)
    unit = max(cycles, key=lambda name: cycles[name])
    per_second = gpu.multiprocessors * gpu.clock_hz / cycles[unit]
    loaded = sum(traffic.l2_bytes(i) for i in code if i.kind != "STG")
    stored = sum(i.global_bytes for i in code if i.kind == "STG")
    cached = sum(i.global_bytes for i in code) - loaded - stored
    return Bound(
        path,
        len(code),
        machine_code.mix_of(code),
        loaded,
        cached,
        stored,
        {name: round(value, 2) for name, value in cycles.items()},
        unit,
        WARP * sum(map(traffic.dram_bytes, code)) * per_second,
        sum(i.flops for i in code) * per_second,
    )


def lean_path(graph: Graph, region: Loop, gpu: Gpu, traffic: Traffic) -> list[Instruction]:
    """The path on which the memory's time exceeds issue time most.

    A path that leaves at once has neither: issue time is discounted until half of the bytes that
    could be moved are.
    """
    dram = WARP / gpu.dram_bytes_per_clock

    def bytes_of(code: list[Instruction]) -> int:
        return sum(map(traffic.l2_bytes, code))

    def along(share: float) -> list[Instruction]:
        issue = share / gpus.ISSUE_RATE
        return graph.path(region, lambda i: dram * traffic.l2_bytes(i) - issue)

    most = bytes_of(along(0.0))
    return next(way for share in LEAN_SHARES if 2 * bytes_of(way := along(share)) >= most)


def bounds_of(kernel: Kernel, gpu: Gpu) -> tuple[str, list[Bound]]:
    """The region that was looked at, in words, and the bound of its paths."""
    code = machine_code.parse(kernel.sass or ())
    graph, traffic = Graph(code, kernel.branch_targets), Traffic(code)
    loop = graph.main_loop()
    region = loop or graph.everything
    inner = sum(other.blocks < region.blocks for other in graph.loops)
    name = f"loop of {len(graph.loops)}" if loop else "body"
    name += f", {inner} inside" if inner else ""
    heavy = graph.path(region, lambda instruction: 1)
    lean = lean_path(graph, region, gpu, traffic)
    if [i.address for i in heavy] == [i.address for i in lean]:
        return name, [bound_of("only", heavy, gpu, traffic)]
    paths = (("lean", lean), ("heavy", heavy))
    return name, [bound_of(path, way, gpu, traffic) for path, way in paths]


def row_of(kernel: Kernel, source: str, arch: str, gpu: Gpu, threads: int | None) -> Row:
    """All about one kernel; ``threads`` replaces its launch bound."""
    threads = threads or kernel.max_threads or 1024
    shared = kernel.static_shared + (kernel.dynamic_shared or 0)
    occupancy = gpus.occupancy(gpu.limits, kernel.registers, threads, shared)
    region, bounds = bounds_of(kernel, gpu)
    known = None if kernel.dynamic_shared is None else shared
    return Row(
        readable(kernel.name),
        source,
        arch,
        gpu.name,
        kernel.registers,
        known,
        threads,
        occupancy,
        region,
        bounds,
    )


@functools.cache
def _dtypes() -> list[str]:
    text = (compiled.ROOT / "csrc/common/types.h").read_text()
    listed = re.search(r"enum class DType[^{]*\{([^}]*)\}", text)
    return [name.strip().removeprefix("k") for name in listed[1].split(",")] if listed else []


def readable(name: str) -> str:
    """``(DType)2`` by its name."""

    def named(match: re.Match[str]) -> str:
        names = _dtypes()
        return names[int(match[1])] if int(match[1]) < len(names) else match[0]

    return re.sub(r"\(DType\)(\d+)", named, name)


def lines_of(row: Row) -> list[str]:
    """A kernel's part of the table."""
    held = row.occupancy
    shared = "dynamic" if row.shared is None else f"{row.shared} B"
    lines = [
        f"{row.kernel}  [{row.source}, sm_{row.arch}]",
        f"  {row.registers} registers, {shared} shared, {row.threads} threads: {held.blocks} "
        f"blocks, {held.warps} warps, {held.share:.0%} (limit: {held.limit}); {row.region}",
    ]
    for bound in row.bounds:
        most = bound.cycles[bound.unit]
        used = " ".join(f"{bound.cycles[u] / most:>7.0%}" for u in UNITS)
        flight = bound.loaded * held.warps * WARP / 1024
        rates = [f"{bound.rate_bytes / 1e12:.2f} TB/s"] if bound.rate_bytes else []
        rates += [f"{bound.rate_flops / 1e12:.0f} TFLOP/s"] if bound.rate_flops else []
        verdict = f"{bound.unit + ':':<7} {', '.join(rates) or '-'}"
        lines.append(
            f"  {bound.path:<6}{bound.instructions:>6}{bound.loaded:>6}{bound.cached:>7}"
            f"{bound.stored:>6}{flight:>8.0f} {used}  {verdict}"
        )
        mix = " ".join(f"{name} {count}" for name, count in bound.mix.items())
        lines.append(f"         {mix}")
    return lines


def heading_of(gpu: Gpu) -> str:
    """The GPU, and what the columns are."""
    units = " ".join(f"{unit:>7}" for unit in UNITS)
    return (
        f"{gpu.name} ({gpu.source}): {gpu.multiprocessors} multiprocessors, "
        f"{gpu.clock_hz / 1e9:.2f} GHz, {gpu.dram_bytes / 1e12:.2f} TB/s\n"
        f"Bounds from instruction counts, not measurements. Per pass and thread: instructions, "
        f"bytes loaded\npast the L1, loaded through it, stored; per multiprocessor: KB in flight;"
        f" units busy in % of the bound.\n"
        f"  path   instr  load cached store  flight {units}  bound"
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static")
    parser.add_argument("--gpu", choices=sorted(GPUS), help="default: one per architecture")
    parser.add_argument("--arch", choices=sorted(BY_CODE), help="default: the GPU's, or all")
    parser.add_argument("--kernel", default="*", metavar="GLOB", help="of its name as printed")
    parser.add_argument("--threads", type=int, help="per block, instead of the launch bound")
    parser.add_argument("--json", type=Path, metavar="OUT")
    given = parser.parse_args(arguments)
    if given.gpu and given.arch not in (None, GPUS[given.gpu].code):
        parser.error(f"a release's code for {given.gpu} is sm_{GPUS[given.gpu].code}")
    if given.gpu:
        chosen = [GPUS[given.gpu]]
    else:
        chosen = [GPUS[BY_CODE[arch]] for arch in ([given.arch] if given.arch else BY_CODE)]
    try:
        rows = _rows(chosen, given.kernel, given.threads)
    except (compiled.Missing, compiled.CompileError) as error:
        print(f"benchmarks.static: {error}", file=sys.stderr)
        return 1
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0 if rows else 1


def _rows(chosen: list[Gpu], pattern: str, threads: int | None) -> list[Row]:
    """Prints while it compiles."""
    toolkit = toolchain.find_toolkit()
    rows = []
    for gpu in chosen:
        print(heading_of(gpu))
        for source, arch in compiled.targets((gpu.code,)):
            for kernel in compiled.compiled(toolkit, source, arch).kernels:
                if kernel.sass is None:
                    raise compiled.Missing("no cuobjdump, neither nvcc's nor Triton's")
                if fnmatch.fnmatchcase(readable(kernel.name), pattern):
                    rows.append(row_of(kernel, source.stem, arch, gpu, threads))
                    print("\n".join(lines_of(rows[-1])), flush=True)
        print()
    return rows


if __name__ == "__main__":
    sys.exit(main())
