"""Sinusoidal and rotary tables against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fused_lm.nn.positions import apply_rotary, rotary_tables, sinusoidal_table
from fused_lm.tolerance import check_close


def test_sinusoidal_table_is_the_papers() -> None:
    for width in (8, 7, 1):
        table = sinusoidal_table(torch.tensor([0, 1, 5, 100_000]), width, dtype=torch.float64)
        for row, t in enumerate((0, 1, 5, 100_000)):
            for column in range(width):
                angle = t / 10000 ** (2 * (column // 2) / width)
                wanted = math.sin(angle) if column % 2 == 0 else math.cos(angle)
                assert math.isclose(table[row, column].item(), wanted, abs_tol=1e-9)
    assert sinusoidal_table(torch.arange(3), 8).dtype == torch.float32


def complex_rotary(x: Tensor, positions: Tensor) -> Tensor:
    """Oracle: pairs (i, i + D/2) as complex numbers, multiplied by e^(i angle)."""
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones(1, dtype=torch.float64), positions[:, None] * frequencies)
    turned = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat((turned.real, turned.imag), dim=-1)


def test_rotary_equals_complex_product() -> None:
    x, positions = torch.randn(2, 3, 5, 8), torch.tensor([0, 1, 7, 1000, 100_000])
    tables = rotary_tables(positions, 8)
    for dtype in (torch.float32, torch.bfloat16):
        exact = complex_rotary(x.to(dtype).double(), positions.double())
        check_close(apply_rotary(x.to(dtype), *tables), exact.to(dtype), exact, str(dtype))


def test_rotary_scores_depend_on_distance_only() -> None:
    q, k = torch.randn(4, 8, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64)

    def scores(shift: int) -> Tensor:
        queries = rotary_tables(torch.arange(4) + shift, 8, dtype=torch.float64)
        keys = rotary_tables(torch.arange(6) + shift, 8, dtype=torch.float64)
        return apply_rotary(q, *queries) @ apply_rotary(k, *keys).T

    base = scores(0)
    assert not torch.allclose(base, q @ k.T)
    for shift in (1, 100, 4096):
        # The angle itself is rounded once: eps * shift of it, on scores of the size of |q||k|.
        bound = 8 * torch.finfo(torch.float64).eps * shift * q.norm() * k.norm()
        assert (scores(shift) - base).abs().max() <= bound
    lengths = apply_rotary(q, *rotary_tables(torch.arange(4), 8, dtype=torch.float64)).norm(dim=-1)
    check_close(lengths, q.norm(dim=-1), q.norm(dim=-1), "lengths")


def test_odd_head_dims_have_no_rotary_positions() -> None:
    with pytest.raises(ValueError, match=r"head_dim must be even, got 5"):
        rotary_tables(torch.arange(3), 5)
