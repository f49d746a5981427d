"""The harness' ldmatrix, stmatrix and mma.sync move every element where CuTe's layouts say.

csrc/ptx draws the same fragments; the kernels of tests/simt/planted/fragments.cu show them.
"""

from __future__ import annotations

import functools
import re

import pytest
import torch

from tests.simt import build, runtime
from tests.simt.cute import layouts as cute
from tests.simt.cute.layouts import Fragment

PROBLEM = cute.unavailable()
pytestmark = pytest.mark.skipif(
    PROBLEM is not None or runtime.sanitized(), reason=str(PROBLEM or "the sanitizers are here")
)
LANES = 32
ROW = 8
"""Elements of a matrix' row."""
M, N, K = 16, 8, 16


@functools.cache
def _layout(table: str) -> Fragment:
    return _layouts()[table]


@functools.cache
def _layouts() -> dict[str, Fragment]:
    return cute.layouts()


@functools.cache
def _shown(kernel: str, other: bool) -> list[float]:
    harness = runtime.load(runtime.ONE)
    harness.configure()
    return harness.module.run_planted(f"fragments_{kernel}", other)


def _wrong(found: dict, expected: dict) -> list[str]:
    assert found.keys() == expected.keys()
    return [f"{k}: {found[k]}, CuTe {expected[k]}" for k in expected if found[k] != expected[k]]


@pytest.mark.parametrize("transposed", [False, True], ids=["", "trans"])
@pytest.mark.parametrize("matrices", [2, 4])
def test_ldmatrix(matrices: int, transposed: bool) -> None:
    """Element ``column`` of lane ``row``'s row has the value 8 row + column."""
    expected = _layout(f"ldmatrix_x{matrices}" + "_trans" * transposed)
    shown = _shown(f"ldmatrix_x{matrices}", transposed)
    values = 2 * matrices
    assert len(shown) == len(expected) == LANES * values
    found = {divmod(i, values): divmod(int(x), ROW) for i, x in enumerate(shown)}
    assert not _wrong(found, expected)


@pytest.mark.parametrize("transposed", [False, True], ids=["", "trans"])
def test_stmatrix(transposed: bool) -> None:
    """Value v of lane l is 8 l + v; what lies in shared memory says who wrote it."""
    expected = _layout("stmatrix_x4" + "_trans" * transposed)
    shown = _shown("stmatrix_x4", transposed)
    found = {divmod(int(x), ROW): divmod(i, ROW) for i, x in enumerate(shown)}
    assert not _wrong(found, expected)


@pytest.mark.parametrize("turned_back", [False, True])
def test_movmatrix(turned_back: bool) -> None:
    """PTX defines it by its effect: a matrix in registers becomes its transpose."""
    assert _shown("movmatrix", turned_back) == _shown("ldmatrix_x2", not turned_back)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_mma(dtype: str) -> None:
    """One 1 in A picks a row of B, which appears in a row of D on top of C.

    Which k a value belongs to shows only where A and B agree on it, on a GPU as here: what ldmatrix
    puts there is compared with CuTe above.
    """
    a, b, c = (_layout(f"mma_{dtype}_{operand}") for operand in "abc")
    shown = _shown("mma", dtype == "f16")
    row_of_b = {k: {} for k in range(K)}
    for (lane, value), (k, n) in b.items():
        row_of_b[k][n] = 4 * lane + value
    wrong = []
    for one, (i, k) in ((8 * lane + value, place) for (lane, value), place in a.items()):
        for (lane, value), (m, n) in c.items():
            expected = 256 * (4 * lane + value) + (row_of_b[k][n] if m == i else 0)
            found = shown[(one * LANES + lane) * 4 + value]
            if found != expected:
                wrong.append(f"A{(i, k)} lane {lane} value {value}: {found}, CuTe {expected}")
    assert len(shown) == len(a) * len(c) and not wrong, wrong[:20]


WARPGROUP = 128


def test_wgmma_sums() -> None:
    """What each register of each thread holds the sum of."""
    expected, values = _layout("wgmma_d"), 32
    rows, columns = _shown("wgmma_d", False), _shown("wgmma_d", True)
    assert len(rows) == len(expected) == WARPGROUP * values
    found = {divmod(i, values): (int(rows[i]), int(columns[i])) for i in range(WARPGROUP * values)}
    assert not _wrong(found, expected)


def test_wgmma_left_operand_in_registers() -> None:
    """Of each element the thread and the value that it comes from."""
    expected = _layout("wgmma_a")
    threads, values = _shown("wgmma_a", False), _shown("wgmma_a", True)
    assert len(threads) == len(expected) == 64 * K
    found = {(int(threads[i]), int(values[i])): divmod(i, K) for i in range(64 * K)}
    assert not _wrong(found, expected)


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("major", ["k", "mn"])
def test_wgmma_operands_in_shared_memory(major: str, swizzle: int) -> None:
    """Every element of [128, 64], in products of 16 whose descriptors lie further and further on:
    by CuTe's fields, the harness finds it where CuTe's layout has it.
    """
    table = f"operand_{major}_{swizzle}"
    places = {element: offset for element, (offset, _) in _layout(table).items()}
    ((leading, stride),) = _layout(f"fields_{table}").values()
    address = runtime.load(runtime.ONE).module.operand_address
    wrong = [
        (mn, k)
        for mn, k in places
        if places[mn, k]
        != address(leading, stride, swizzle, places[0, k // K * K], mn, k % K, major == "mn")
    ]
    assert len(places) == 128 * 64 and not wrong, wrong[:8]


@pytest.mark.parametrize("outside", [False, True], ids=["behind the end", "before the beginning"])
def test_tma_zeroes_what_is_outside(outside: bool) -> None:
    """A box half outside of [32, 32] both ways: the other half is what is there."""
    shown = torch.tensor(_shown("box_outside", outside)).view(8, 32)
    whole = torch.arange(1.0, 1025.0).view(32, 32)
    expected = torch.zeros(8, 32)
    if outside:
        expected[4:, 8:] = whole[:4, :24]
    else:
        expected[:4, :24] = whole[28:, 8:]
    assert torch.equal(shown, expected)


@pytest.mark.parametrize("stores", [False, True], ids=["adds", "stores"])
def test_tma_adds(stores: bool) -> None:
    twice = 2 * torch.arange(1.0, 257.0)
    assert _shown("reduce_add", stores) == (twice if stores else 100 + 2 * twice).tolist()


def test_layouts_are_whole() -> None:
    """Every element is held once, so that no test above compares less than all."""
    for table, (rows, columns) in {
        "mma_bf16_a": (M, K),
        "mma_bf16_b": (K, N),
        "mma_bf16_c": (M, N),
        "ldmatrix_x4": (LANES, ROW),
        "ldmatrix_x2_trans": (LANES // 2, ROW),
        "stmatrix_x4_trans": (LANES, ROW),
        "wgmma_d": (64, 64),
        "wgmma_a": (64, K),
    }.items():
        every = {(row, column) for row in range(rows) for column in range(columns)}
        assert sorted(_layout(table).values()) == sorted(every), table


# The pictures in csrc/ptx, which people write kernels by, as code.


def _mma_by_the_drawing(operand: str) -> Fragment:
    found = {}
    for lane in range(LANES):
        for value in range({"a": 8, "b": 4, "c": 4}[operand]):
            register, half = divmod(value, 2)
            major, minor = lane // 4, 2 * (lane % 4) + half
            found[lane, value] = {
                "a": (major + register % 2 * 8, minor + register // 2 * 8),
                "b": (minor + register * 8, major),
                "c": (major + register * 8, minor),
            }[operand]
    return found


@pytest.mark.parametrize("operand", ["a", "b", "c"])
def test_the_drawings_of_mma_are_true(operand: str) -> None:
    header = (build.ROOT / "csrc/ptx/mma.h").read_text()
    words = " ".join(re.sub(r"^//", "", line) for line in header.splitlines())
    assert "register 0 of lane l holds (l / 4, 2 (l % 4) + {0, 1}); register 1 is 8 rows" in re.sub(
        r"\s+", " ", words
    )
    assert not _wrong(_mma_by_the_drawing(operand), _layout(f"mma_bf16_{operand}"))
