"""What is particular to the Triton cross entropy: bodies and edges of wide rows, targets out of
range, layouts.

Formula, options and dtypes are tested for every backend in ``test_cross_entropy.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fused_lm.reference import cross_entropy as reference
from fused_lm.tolerance import check_close
from fused_lm.triton_kernels import cross_entropy as kernels
from fused_lm.triton_kernels.cross_entropy_tuning import ALIGN, Tuning, scale_tuning, tuning

OPTIONS = (-100, 0.1, 0.01, 5.0)
PLAIN = (-100, 0.0, 0.0, 0.0)
LANES = 4
WIDE = Tuning(rows=0, block_v=0, lanes=LANES, num_warps=4, reason="test")
TILE = LANES * ALIGN
WIDTHS = {
    1: "less than the way to an aligned address",
    7: "all of it edge",
    TILE - 1: "less than a tile",
    TILE: "a tile where it is aligned, else an edge of a whole tile",
    TILE + ALIGN - 1: "a tile at every alignment, and an edge",
    2 * TILE: "an edge before and behind a tile",
    5 * TILE + 3: "several tiles, odd",
}


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory from ``torch.empty`` is NaN: an element that no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row takes the wide path, in tiles of 32 columns."""
    monkeypatch.setattr(kernels, "tuning", lambda V, itemsize: WIDE)
    monkeypatch.setattr(kernels, "scale_tuning", lambda: WIDE)


def _rows(V: int, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    logits = (torch.randn(11, V, device=device) * 3).to(dtype)
    target = torch.randint(V, (11,), device=device)
    target[4] = target[9] = -100
    return logits, target


def _is_power_of_2(n: int) -> bool:
    return n >= 1 and n & (n - 1) == 0


def test_tuning_fits_every_vocabulary() -> None:
    powers = [1 << n for n in range(21)]
    widths = {V + d for V in powers for d in (-1, 0, 1) if V + d >= 1} | {50257, 50304, 128256}
    for V in sorted(widths):
        for itemsize in (2, 4):
            chosen = tuning(V, itemsize)
            assert _is_power_of_2(chosen.num_warps) and 4 <= chosen.num_warps <= 32
            tile = chosen.rows * chosen.block_v or chosen.lanes * ALIGN
            assert _is_power_of_2(tile) and tile <= 32 * 32 * chosen.num_warps, (V, chosen)
            if chosen.rows:
                assert chosen.block_v >= V and chosen.rows * (chosen.block_v // 2) <= 16384
            else:
                assert V > TILE and chosen.lanes >= 32 * chosen.num_warps // 2, (V, chosen)
            assert chosen.reason
    assert _is_power_of_2(scale_tuning().lanes)


@pytest.mark.parametrize("V", WIDTHS, ids=WIDTHS.values())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [PLAIN, OPTIONS], ids=["plain", "all options"])
@pytest.mark.usefixtures("wide", "poisoned")
def test_wide_rows_equal_fp64(
    V: int, dtype: torch.dtype, options: tuple[float, ...], device: torch.device
) -> None:
    """Eleven rows start at every alignment; loss and gradient, and the gradient alone."""
    logits, target = _rows(V, device, dtype)
    arguments = (target, *options, "none", "with the loss")
    got = kernels.cross_entropy_forward(logits, *arguments)
    same = reference.cross_entropy_forward(logits, *arguments)
    exact = reference.cross_entropy_forward(logits.double(), *arguments)
    for ours, theirs, truth, name in zip(got, same, exact, ("loss", "dlogits"), strict=True):
        check_close(ours, theirs, truth, name)
    only_loss, nothing = kernels.cross_entropy_forward(logits, *arguments[:-1], "never")
    assert torch.equal(only_loss, got[0]) and nothing.shape == (0,)
    ones = torch.ones(11, device=device)
    assert torch.equal(kernels.cross_entropy_backward(ones, logits, *arguments[:-1]), got[1])


@pytest.mark.parametrize("path", ["rows", "wide"])
@pytest.mark.parametrize("V", [7, 50, 5 * TILE + 3])
@pytest.mark.usefixtures("poisoned")
def test_layouts_give_the_same_bits(
    V: int, path: str, device: torch.device, request: pytest.FixtureRequest
) -> None:
    """Padded rows and in place, and the columns beside them stay as they are."""
    if path == "wide":
        request.getfixturevalue("wide")
    logits, target = _rows(V, device, torch.bfloat16)
    dloss = torch.randn(11, device=device)
    arguments = (target, *OPTIONS, "none")
    expected = kernels.cross_entropy_backward(dloss, logits, *arguments)
    padded = torch.full((11, V + 5), 7.0, device=device, dtype=torch.bfloat16)
    padded[:, 2 : V + 2] = logits
    inside = padded[:, 2 : V + 2]
    stretched = torch.stack([dloss, dloss], 1)[:, 0]
    assert torch.equal(kernels.cross_entropy_backward(stretched, inside, *arguments), expected)
    kernels.cross_entropy_backward_in_place(dloss, inside, *arguments)
    assert torch.equal(inside, expected)
    assert bool((padded[:, :2] == 7.0).all()) and bool((padded[:, V + 2 :] == 7.0).all())
    transposed = logits.t().contiguous().t()
    assert torch.equal(kernels.cross_entropy_backward(dloss, transposed, *arguments), expected)


@pytest.mark.parametrize("path", ["rows", "wide"])
def test_a_target_out_of_range_is_nan_in_its_own_row(
    path: str, device: torch.device, request: pytest.FixtureRequest
) -> None:
    """On a GPU nobody can raise: nothing is read out of bounds, and the loss shows it."""
    if path == "wide":
        request.getfixturevalue("wide")
    logits, target = _rows(100, device)
    options = (*PLAIN, "none", "with the loss")
    loss, dlogits = kernels.cross_entropy_forward(logits, target, *options)
    wrong = target.clone()
    wrong[2], wrong[3], wrong[5] = 100, -1, 2**40
    spoiled, dspoiled = kernels.cross_entropy_forward(logits, wrong, *options)
    bad = torch.zeros(11, dtype=torch.bool, device=device)
    bad[[2, 3, 5]] = True
    assert bool(spoiled[bad].isnan().all()) and bool(dspoiled[bad].isnan().all())
    assert torch.equal(spoiled[~bad], loss[~bad]) and torch.equal(dspoiled[~bad], dlogits[~bad])


@pytest.mark.parametrize("path", ["rows", "wide"])
def test_masked_and_extreme_logits(
    path: str, device: torch.device, request: pytest.FixtureRequest
) -> None:
    """Whole tiles of -inf before the first number, rows of one number, 1e4 beside -1e4."""
    if path == "wide":
        request.getfixturevalue("wide")
    logits = torch.randn(6, 200, device=device) * 1e4
    logits[1, :150] = -torch.inf
    logits[2, 50:] = -torch.inf
    logits[3, :199], logits[4, 1:] = -torch.inf, -torch.inf
    logits[5] = -torch.inf
    target = torch.tensor([0, 199, 3, 199, 0, 1], device=device)
    for options in (PLAIN, (-100, 0.1, 0.0, 0.0)):
        arguments = (target, *options, "none", "with the loss")
        got = kernels.cross_entropy_forward(logits, *arguments)
        same = reference.cross_entropy_forward(logits, *arguments)
        exact = reference.cross_entropy_forward(logits.double(), *arguments)
        for ours, theirs, truth in zip(got, same, exact, strict=True):
            check_close(ours, theirs, truth)
        assert bool(got[1][5].isnan().all()) and not bool(got[1][:5].isnan().any())


@pytest.mark.parametrize("rows", [1, 4096, 4097, 10000], ids=["one", "a block", "+ 1", "several"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions_of_many_rows(rows: int, reduction: str, device: torch.device) -> None:
    loss = torch.rand(rows, device=device)
    target = torch.randint(3, (rows,), device=device) - 1
    target[0] = 0
    got = kernels.reduced(loss, target, -1, reduction)
    exact = reference.reduced(loss.double(), target, -1, reduction)
    check_close(got, reference.reduced(loss, target, -1, reduction), exact)
    count = kernels.inverse_count(target, -1)
    assert count.item() == pytest.approx(1.0 / int((target != -1).sum()))


@pytest.mark.parametrize("V", [5, TILE + 9])
@pytest.mark.usefixtures("wide")
def test_scale_in_place(V: int, device: torch.device) -> None:
    t = torch.randn(11, V, device=device).bfloat16()
    for factor in (torch.randn(11, device=device), torch.randn((), device=device), torch.ones(())):
        ours, expected = t.clone(), t.clone()
        kernels.scale_in_place(ours, factor.to(device))
        reference.scale_in_place(expected, factor.to(device))
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("path", ["rows", "wide"])
def test_repeats_bitwise(path: str, device: torch.device, request: pytest.FixtureRequest) -> None:
    if path == "wide":
        request.getfixturevalue("wide")
    logits, target = _rows(331, device, torch.bfloat16)
    arguments = (target, *OPTIONS, "mean", "with the loss")
    first = kernels.cross_entropy_forward(logits, *arguments)
    second = kernels.cross_entropy_forward(logits, *arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("path", ["rows", "wide"])
def test_offsets_beyond_32_bits(
    path: str, device: torch.device, request: pytest.FixtureRequest
) -> None:
    """Five rows 2^29 + 3 elements apart; only the rows' own pages are touched."""
    if path == "wide":
        request.getfixturevalue("wide")
    V, stride = 100, (1 << 29) + 3
    try:
        storage = torch.empty(4 * stride + V, dtype=torch.float16, device=device)
    except (RuntimeError, MemoryError):
        pytest.skip("no 4 GB of address space")
    far = storage.as_strided((5, V), (stride, 1))
    near = torch.randn(5, V, device=device).half()
    far.copy_(near)
    target = torch.tensor([0, 99, -100, 50, 7], device=device)
    arguments = (target, *OPTIONS, "none")
    for t in (far, near):
        loss, _ = kernels.cross_entropy_forward(t, *arguments, "never")
        kernels.cross_entropy_backward_in_place(loss, t, *arguments)
    assert torch.equal(far, near)
