"""What the compiled products of Hopper could reach, by the instructions of their loops."""

from __future__ import annotations

import functools

import pytest

from benchmarks import machine_code
from benchmarks.machine_code import Graph, Instruction, Loop
from build_tools import compiled, toolchain
from build_tools.compiled import Kernel

pytestmark = pytest.mark.slow  # what is compiled holds until the code changes, see tests/golden
GROUPS, WARPS, SCHEDULERS = 2, 4, 4
TENSOR_FLOPS = 4096
MUFU_CLOCKS = 8
"""Of a multiprocessor per clock; of a warp's instruction on a quarter's special function unit."""
BLOCK_M, BLOCK_K = 128, 64
BLOCK_N = {
    "(GemmSchedule)0": 256,
    "(GemmSchedule)1": 192,
    "(GemmSchedule)2": 128,
    "(GemmSchedule)3": 192,
}
COOPERATIVE, PARTS = "(GemmSchedule)0", "sums to a slot"
"""Of csrc/kernels/gemm_tuning_sm90.h."""
MOST_OTHERS = {
    "(GemmSchedule)0": 9.9,
    "(GemmSchedule)1": 6.2,
    "(GemmSchedule)2": 5.7,
    "(GemmSchedule)3": 5.9,
}
"""Instructions of a warp per wgmma of its main loop, by schedule."""
HIDDEN_WIDTH = 576
"""From this K on the products of one group hide the epilogue of the other."""
GATED_WIDTH, GATED_SHARE = 4096, 0.07
"""At this K a gated epilogue, which is not hidden, may take that of the time."""


@functools.cache
def _kernels() -> dict[tuple[str, str, str], Kernel]:
    """By schedule, layout and epilogue."""
    try:
        toolkit = toolchain.find_toolkit()
    except toolchain.Missing as error:
        pytest.skip(str(error))
    found = {}
    for kernel in compiled.compiled(toolkit, compiled.KERNELS / "gemm_sm90_bf16.cu", "90a").kernels:
        if kernel.sass is None:
            pytest.skip("no cuobjdump, neither nvcc's nor Triton's")
        name, parameters = kernel.name[:-1].split("<", 1)
        if name == "gemm::gemm_sm90":
            _, schedule, layout, epilogue = parameters.split(", ")
            found[schedule, layout, epilogue.removeprefix("gemm::")] = kernel
        elif name == "gemm::gemm_parts_sm90":
            _, layout = parameters.split(", ")
            found[COOPERATIVE, layout, PARTS] = kernel
    return found


def _products(code: list[Instruction]) -> int:
    return sum(i.base == "HGMMA" for i in code)


def _loops(kernel: Kernel) -> tuple[Graph, Loop, Loop]:
    """The loop over tiles, and inside of it the one over K."""
    graph = Graph(machine_code.parse(kernel.sass or ()), kernel.branch_targets)
    multiply = [loop for loop in graph.loops if _products(_shortest(graph, loop))]
    outer, inner = sorted(multiply, key=lambda loop: len(_shortest(graph, loop)), reverse=True)
    return graph, outer, inner


def _shortest(graph: Graph, loop: Loop) -> list[Instruction]:
    return graph.path(loop, lambda i: 10**6 if i.base == "HGMMA" else -1)


def _longest(graph: Graph, loop: Loop) -> list[Instruction]:
    """Whose waits end at once."""
    return graph.path(
        loop, lambda i: -100 if "TRYWAIT" in i.opcode else 100 if i.base == "MUFU" else 1
    )


@pytest.mark.parametrize("schedule", BLOCK_N)
def test_the_main_loop(schedule: str) -> None:
    """Two steps of K: few instructions beside the products, no descriptor that is moved to a
    uniform register for each of them, no fence, and one batch stays under way.
    """
    for (own, _, _), kernel in _kernels().items():
        if own != schedule:
            continue
        graph, _, loop = _loops(kernel)
        code = _longest(graph, loop)
        products = _products(code)
        rows = BLOCK_M // 64 // (GROUPS if schedule == COOPERATIVE else 1)
        assert products == 2 * rows * BLOCK_K // 16
        assert (len(code) - products) / products <= MOST_OTHERS[schedule], kernel.name
        assert not [i for i in code if i.base in ("R2UR", "MEMBAR", "WARPSYNC", "LDL", "STL")]
        waits = [i for i in code if i.opcode.startswith("WARPGROUP.DEPBAR")]
        assert len(waits) == 2, kernel.name


def test_every_epilogue_of_a_group_is_hidden() -> None:
    """In ping-pong a warp of each group is on every scheduler: the longest way through the
    epilogue, by issue slots and by special functions, beside the products of the other.
    """
    seen = set()
    for (schedule, _, epilogue), kernel in _kernels().items():
        if schedule == COOPERATIVE:
            continue
        seen.add(epilogue)
        graph, outer, inner = _loops(kernel)
        code, loop = _longest(graph, outer), _longest(graph, inner)
        special = sum(i.base == "MUFU" for i in code)
        clocks = max(len(code) - len(loop), special * MUFU_CLOCKS)
        products = 2 * BLOCK_M * BLOCK_N[schedule] * HIDDEN_WIDTH / TENSOR_FLOPS
        assert WARPS == SCHEDULERS and clocks <= products, (kernel.name, clocks, products)
    assert seen == {
        "ActivationEpilogue", "ActivationBackwardEpilogue", "GatedBackwardEpilogue",
        "GradientEpilogue", "LinearEpilogue", "ResidualEpilogue",
    }  # fmt: skip


def test_the_epilogue_of_both_groups_is_short() -> None:
    """In a cooperative kernel nothing hides it: at a K of 768 it may take a tenth of the time; of
    gates and values, with a bias and pre-activations that are kept, more.
    """
    seen = set()
    for (schedule, _, epilogue), kernel in _kernels().items():
        if schedule != COOPERATIVE:
            continue
        seen.add(epilogue)
        way, K, share = _shortest, 768, 0.1
        if epilogue == "GatedEpilogue":
            way, K, share = _longest, GATED_WIDTH, GATED_SHARE
        graph, outer, inner = _loops(kernel)
        clocks = GROUPS * (len(way(graph, outer)) - len(way(graph, inner)))
        products = 2 * BLOCK_M * BLOCK_N[schedule] * K / TENSOR_FLOPS
        assert clocks <= share * products, (kernel.name, clocks, products)
    assert seen == {"LinearEpilogue", "GatedEpilogue", PARTS}


def test_registers_move_between_the_groups() -> None:
    """ptxas ignores setmaxnreg with no more than a remark where it doesn't know the launch; and a
    block gets no more than it was launched with.
    """
    for kernel in _kernels().values():
        moves = [line for line in kernel.sass or () if "USETMAXREG" in line]
        assert len(moves) == 2, moves
        counts = [int(move.split(", ")[-1].split()[-1], 16) for move in moves if ", " in move]
        assert sum(GROUPS * count for count in counts) + 24 <= 3 * kernel.registers
