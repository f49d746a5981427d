"""What the compiled Hopper forwards, dense and packed, could reach, by the instructions of their
main loop.
"""

from __future__ import annotations

import functools

import pytest

from benchmarks import machine_code, static
from benchmarks.gpus import GPUS, SHARED_BYTES
from benchmarks.machine_code import Graph, Instruction
from build_tools import compiled, toolchain
from build_tools.compiled import Kernel
from tests.attention_hopper_calls import HEAD_DIMS
from tests.simt import build, runtime

pytestmark = pytest.mark.slow  # what is compiled holds until the code changes, see tests/golden
WARPS = 4
"""Of a warpgroup, on each of which the loop's instructions run."""
WARPGROUP = 128
MOST_INSTRUCTIONS = {128: 480}
"""Of one tile of keys: what FlashAttention-3's loop has (simt.md 9), as a limit."""
UNITS = ["attention_fwd_sm90_bf16", "attention_varlen_fwd_sm90_bf16"]


@functools.cache
def _kernels(unit: str) -> dict[tuple[int, bool], Kernel]:
    """By head dim and whether their scores are general."""
    try:
        toolkit = toolchain.find_toolkit()
    except toolchain.Missing as error:
        pytest.skip(str(error))
    source = compiled.KERNELS / f"{unit}.cu"
    found = {}
    for kernel in compiled.compiled(toolkit, source, "90a").kernels:
        if kernel.sass is None:
            pytest.skip("no cuobjdump, neither nvcc's nor Triton's")
        _, head_dim, general = kernel.name[kernel.name.index("<") + 1 : -1].split(", ")
        found[int(head_dim), general == "true"] = kernel
    return found


def _main_loop(kernel: Kernel) -> list[Instruction]:
    """The shortest way through the loop over the tiles of keys in which nothing is hidden."""
    graph = Graph(machine_code.parse(kernel.sass or ()), kernel.branch_targets)
    ways = [graph.path(loop, lambda i: 10**6 if i.base == "HGMMA" else -1) for loop in graph.loops]
    return min((way for way in ways if any(i.base == "HGMMA" for i in way)), key=len)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_main_loop(head_dim: int, unit: str) -> None:
    """As many products and exponentials as there must be; the tensor cores bind, or at 64 columns
    the exponentials, which take as long; all of these run beside p v, before it is waited for.
    """
    if build.unavailable() is not None:
        pytest.skip(str(build.unavailable()))
    tuning = runtime.load(runtime.ONE).module.attention_tuning_sm90(head_dim, False)
    groups, keys = tuning["block_t"] // 64, tuning["block_s"]
    code = _main_loop(_kernels(unit)[head_dim, False])
    assert sum(i.base == "HGMMA" for i in code) == head_dim // 16 + keys // 16
    exponentials = [at for at, i in enumerate(code) if i.opcode.startswith("MUFU.EX2")]
    assert len(exponentials) == keys // 2
    waits = [at for at, i in enumerate(code) if i.opcode.startswith("WARPGROUP.DEPBAR")]
    assert len(waits) == 2 and waits[0] < exponentials[0] and exponentials[-1] < waits[1]
    assert len(code) <= MOST_INSTRUCTIONS.get(head_dim, len(code))
    cycles = static.cycles_of(code, GPUS["H200"], static.Traffic(code))
    busy = {unit: WARPS * groups * time for unit, time in cycles.items()}
    busy["shared"] += _operand_bytes(groups, keys, head_dim) / SHARED_BYTES
    bound = "MUFU" if head_dim == 64 else "tensor"
    assert busy[bound] >= max(busy.values()), busy
    flops = 4 * tuning["block_t"] * keys * head_dim
    assert busy["tensor"] == pytest.approx(flops / GPUS["H200"].tensor_flops)


def _operand_bytes(groups: int, keys: int, head_dim: int) -> int:
    """What wgmma reads of q and of k, of v, and what TMA writes of k and v."""
    scores = groups * (64 + keys) * head_dim
    return 2 * (scores + groups * keys * head_dim + 2 * keys * head_dim)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("general", [False, True])
def test_registers_move_between_the_groups(general: bool, unit: str) -> None:
    """ptxas ignores setmaxnreg with no more than a remark where it doesn't know the launch; and a
    block gets no more than it was launched with.
    """
    for (_, is_general), kernel in _kernels(unit).items():
        if is_general == general:
            moves = [line for line in kernel.sass or () if "USETMAXREG" in line]
            assert len(moves) == 2, moves
            consumers, producer = sorted(
                (int(m.split(", ")[-1].split()[-1], 16) for m in moves), reverse=True
            )
            groups = (kernel.max_threads or 0) // WARPGROUP - 1
            assert groups * consumers + producer <= (groups + 1) * kernel.registers
