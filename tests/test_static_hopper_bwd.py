"""What the compiled Hopper backward could reach, by the instructions of its main loop."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from benchmarks import machine_code, static
from benchmarks.gpus import GPUS, SHARED_BYTES
from benchmarks.machine_code import Graph, Instruction
from build_tools import compiled, toolchain
from build_tools.compiled import Kernel
from tests.attention_bwd_hopper_calls import (
    GROUP_ROWS,
    GROUPS,
    WIDE,
    operands_of_group,
)
from tests.simt import build, runtime

pytestmark = pytest.mark.slow  # what is compiled holds until the code changes, see tests/golden
WARPS = 4
PLAIN, GENERAL, LONG = "plain", "general", "plain, no band"
MOST_INSTRUCTIONS = {
    (64, PLAIN): 480,
    (96, PLAIN): 516,
    (128, PLAIN): 440,
    (128, LONG): 466,
    (64, GENERAL): 536,
    (96, GENERAL): 512,
    (128, GENERAL): 546,
    (192, PLAIN): 580,
    (192, GENERAL): 696,
    (256, PLAIN): 600,
    (256, GENERAL): 712,
}
"""Of one tile of queries, by head dim and what scores are; of packed sequences too."""
SHARED_SHARE = {
    (64, PLAIN): 0.72,
    (96, PLAIN): 1.0,
    (128, PLAIN): 0.79,
    (128, LONG): 0.83,
    (192, PLAIN): 0.89,
    (256, PLAIN): 0.93,
}
"""Of the time that shared memory needs, the least part that the tensor cores need."""
MAIN = ("attention_bwd_sm90", "attention_bwd_wide_sm90")
PACKED = ("attention_varlen_bwd_sm90",)
MOVED_DESCRIPTORS = {MAIN: 1, PACKED: 3}
"""Most moves to uniform registers in a tile; each product had one, unless it knew better."""


@functools.cache
def _kernels(units: tuple[str, ...] = MAIN) -> dict[tuple[int, str], Kernel]:
    try:
        toolkit = toolchain.find_toolkit()
    except toolchain.Missing as error:
        pytest.skip(str(error))
    sources = [compiled.KERNELS / f"{name}_bf16.cu" for name in units]
    results = [compiled.compiled(toolkit, source, "90a") for source in sources]
    found = {}
    for kernel in [kernel for result in results for kernel in result.kernels]:
        if kernel.sass is None:
            pytest.skip("no cuobjdump, neither nvcc's nor Triton's")
        name, parameters = kernel.name.split("<")
        if name.endswith(units):
            _, head_dim, general, *is_long = parameters[:-1].split(", ")
            kind = GENERAL if general == "true" else LONG if is_long == ["true"] else PLAIN
            found[int(head_dim), kind] = kernel
    return found


def _main_loop(kernel: Kernel) -> list[Instruction]:
    """The shortest way through the loop over the tiles of queries: nothing is hidden or huge, no
    feature is asked for.
    """
    graph = Graph(machine_code.parse(kernel.sass or ()), kernel.branch_targets)
    ways = [graph.path(loop, lambda i: 10**6 if i.base == "HGMMA" else -1) for loop in graph.loops]
    return min((way for way in ways if any(i.base == "HGMMA" for i in way)), key=len)


LOOPS = [(MAIN, *each) for each in MOST_INSTRUCTIONS]
LOOPS += [(PACKED, head_dim, kind) for head_dim, kind in MOST_INSTRUCTIONS if kind != LONG]


@pytest.mark.parametrize(("units", "head_dim", "kind"), LOOPS)
def test_the_main_loop(units: tuple[str, ...], head_dim: int, kind: str) -> None:
    """As many products and exponentials as there must be, no descriptor that is moved to a uniform
    register for each product, and in the plain kernels all exponentials beside dP.
    """
    code = _main_loop(_kernels(units)[head_dim, kind])
    tuning = _tuning(head_dim, kind)
    block_t, block_s = tuning["block_t"], tuning["block_s"]
    dq = GROUPS * block_s if head_dim > WIDE else block_s
    assert sum(i.base == "HGMMA" for i in code) == (2 * head_dim + 2 * block_t + dq) // 16
    exponentials = [at for at, i in enumerate(code) if i.opcode.startswith("MUFU.EX2")]
    assert len(exponentials) == block_t * block_s // (GROUPS * WARPS * 32)
    assert sum(i.base == "R2UR" for i in code) <= MOVED_DESCRIPTORS[units]
    assert len(code) <= MOST_INSTRUCTIONS[head_dim, kind]
    if kind != GENERAL:
        waits = [at for at, i in enumerate(code) if i.opcode.startswith("WARPGROUP.DEPBAR")]
        assert waits[0] < exponentials[0] and exponentials[-1] < waits[1]


@pytest.mark.parametrize(("head_dim", "kind"), SHARED_SHARE)
def test_what_binds(head_dim: int, kind: str) -> None:
    """The plain kernels: shared memory, or with 96 columns the tensor cores, by what
    attention_bwd_tuning_sm90.h says; nothing else is near their time.
    """
    tuning = _tuning(head_dim, kind)
    rows = tuning["block_t"] * tuning["block_s"]
    code = _main_loop(_kernels()[head_dim, kind])
    cycles = static.cycles_of(code, GPUS["H200"], static.Traffic(code))
    busy = {unit: GROUPS * WARPS * time for unit, time in cycles.items()}
    busy["shared"] += _asynchronous_bytes(tuning, head_dim) / SHARED_BYTES
    made = 4 * head_dim + -(-head_dim // GROUP_ROWS) * GROUP_ROWS
    assert busy["tensor"] == pytest.approx(2 * rows * made / GPUS["H200"].tensor_flops)
    bound = "tensor" if head_dim == 96 else "shared"
    assert max(busy, key=lambda unit: busy[unit]) == bound
    assert busy["tensor"] / busy["shared"] >= SHARED_SHARE[head_dim, kind], busy
    others = [time for unit, time in busy.items() if unit not in ("shared", "tensor")]
    assert max(others) <= 0.55 * busy["tensor"], busy


def _asynchronous_bytes(tuning: dict[str, Any], head_dim: int) -> int:
    """What wgmma reads, what TMA writes of q and dout, and reads of dq, if it does."""
    block_t = tuning["block_t"]
    operands = operands_of_group(head_dim, block_t, tuning["block_s"])
    dq = 4 * block_t * head_dim * tuning["bulk_adds"]
    return 2 * GROUPS * operands + 2 * 2 * block_t * head_dim + dq


def _tuning(head_dim: int, kind: str) -> dict[str, Any]:
    if build.unavailable() is not None:
        pytest.skip(str(build.unavailable()))
    module = runtime.load(runtime.ONE).module
    found: dict[str, Any] = module.attention_bwd_tuning_sm90(
        head_dim, kind == GENERAL, 8000 if kind == LONG else 0
    )
    return found


def test_registers_move_between_the_groups() -> None:
    """ptxas ignores setmaxnreg with no more than a remark where it doesn't know the launch; and a
    block gets no more than it was launched with.
    """
    for kernel in [*_kernels().values(), *_kernels(PACKED).values()]:
        moves = [line for line in kernel.sass or () if "USETMAXREG" in line]
        assert len(moves) == 2, moves
        counts = [int(move.split(", ")[-1].split()[-1], 16) for move in moves if ", " in move]
        assert sum(GROUPS * count for count in counts) + 24 <= 3 * kernel.registers
