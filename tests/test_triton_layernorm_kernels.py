"""What is particular to the Triton norms: tile choices, loops over wide rows, partial sums, masks.

The formula, dtypes and extremes are tested for every backend in ``test_layernorm.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fused_lm.reference import layernorm as reference
from fused_lm.reference.philox import keep_mask
from fused_lm.tolerance import check_close
from fused_lm.triton_kernels import layernorm as kernels
from fused_lm.triton_kernels.column_sums import column_sums_tuning
from fused_lm.triton_kernels.layernorm_tuning import (
    MIN_BLOCK_C,
    REGISTERS_PER_SM,
    Tuning,
    backward_tuning,
    forward_tuning,
    row_means_tuning,
)

EPS = 1e-5
POWERS = [1 << n for n in range(21)]
WIDTHS = sorted(
    {C + d for C in POWERS for d in (-1, 0, 1) if C + d >= 1} | {768, 1600, 5120, 50257}
)
READ_BYTES = (2, 4, 6, 8, 10, 12)
SMALLEST_SHARED_MEMORY = 99 * 1024
"""Of one block, on sm_86, sm_89 and sm_120."""
LOOPED = Tuning(rows=1, block_c=64, num_warps=4, looped=True, reason="test")
LOOPED_BACKWARD = Tuning(2, 64, 4, True, "test", stages=2, programs_per_sm=4, max_registers=128)


@dataclass(frozen=True)
class Inputs:
    """Rows of width C with everything that a norm can take, in mixed dtypes."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor
    rng: Tensor | None
    dy: Tensor
    dstream: Tensor | None
    dropout_p: float

    @staticmethod
    def random(
        device: torch.device, N: int, C: int, residual: bool = True, dropout_p: float = 0.25
    ) -> Inputs:
        def rows(dtype: torch.dtype) -> Tensor:
            return torch.randn(N, C, device=device).to(dtype)

        return Inputs(
            x=rows(torch.bfloat16),
            residual=rows(torch.float32) if residual else None,
            weight=torch.randn(C, device=device),
            bias=torch.randn(C, device=device).half(),
            rng=torch.tensor([2**40 + 5, 9, 1, 2], device=device) if dropout_p > 0 else None,
            dy=rows(torch.bfloat16),
            dstream=rows(torch.float32) if residual else None,
            dropout_p=dropout_p,
        )

    def double(self) -> Inputs:
        fields = {n: t for n, t in vars(self).items() if isinstance(t, Tensor) and n != "rng"}
        return Inputs(**vars(self) | {name: t.double() for name, t in fields.items()})


def layer_norm(module: object, t: Inputs) -> dict[str, Tensor]:
    """Forward and backward of a backend's LayerNorm, every result by name."""
    exact = t.x.dtype == torch.float64
    stream_dtype = torch.float64 if exact else torch.float32
    y, stream, mean, rstd = module.layer_norm_forward(
        t.x, t.residual, t.weight, t.bias, t.rng, EPS, t.dropout_p, t.dy.dtype, stream_dtype
    )
    saved = t.x if stream.dim() == 1 else stream
    residual_dtype = None if t.residual is None else t.residual.dtype
    gradients = module.layer_norm_backward(
        t.dy, t.dstream, saved, t.weight, t.bias, mean, rstd, t.rng, t.dropout_p, t.x.dtype,
        residual_dtype,
    )  # fmt: skip
    names = ("dx", "dresidual", "dweight", "dbias")
    return {"y": y, "stream": stream} | dict(zip(names, gradients, strict=True))


def rms_norm(module: object, t: Inputs) -> dict[str, Tensor]:
    """The same for RMSNorm."""
    exact = t.x.dtype == torch.float64
    stream_dtype = torch.float64 if exact else torch.float32
    y, stream, rstd = module.rms_norm_forward(
        t.x, t.residual, t.weight, t.rng, EPS, t.dropout_p, t.dy.dtype, stream_dtype
    )
    saved = t.x if stream.dim() == 1 else stream
    residual_dtype = None if t.residual is None else t.residual.dtype
    gradients = module.rms_norm_backward(
        t.dy, t.dstream, saved, t.weight, rstd, t.rng, t.dropout_p, t.x.dtype, residual_dtype
    )
    names = ("dx", "dresidual", "dweight")
    return {"y": y, "stream": stream} | dict(zip(names, gradients, strict=True))


NORMS = [layer_norm, rms_norm]
Norm = Callable[[object, Inputs], dict[str, Tensor]]


def check(norm: Norm, inputs: Inputs) -> dict[str, Tensor]:
    """Holds the kernels' results against fp64; returns them."""
    got = norm(kernels, inputs)
    same, exact = norm(reference, inputs), norm(reference, inputs.double())
    if exact["dresidual"].dim() == 1:
        exact["dresidual"] = exact["dx"]  # left out in fp64, where the dtypes are the same
    for name, tensor in got.items():
        if tensor.dim() == 1 and tensor.numel() == 0:
            assert same[name].shape == (0,), name
        else:
            check_close(tensor, same[name], exact[name], name)
    return got


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory from ``torch.empty`` is NaN: an element that no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def looped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row takes the wide path, in blocks of 64 columns."""
    monkeypatch.setattr(kernels, "forward_tuning", lambda C, read_bytes: LOOPED)
    monkeypatch.setattr(kernels, "backward_tuning", lambda C, read_bytes: LOOPED_BACKWARD)
    monkeypatch.setattr(kernels, "row_means_tuning", lambda: LOOPED)


@pytest.mark.parametrize("read_bytes", READ_BYTES)
def test_tuning_fits_every_width(read_bytes: int) -> None:
    for C in WIDTHS:
        forward, backward = forward_tuning(C, read_bytes), backward_tuning(C, read_bytes)
        for tuning in (forward, backward, row_means_tuning(), column_sums_tuning(C)):
            for n in (tuning.rows, tuning.block_c, tuning.num_warps):
                assert n >= 1 and n & (n - 1) == 0, (C, tuning)
            assert tuning.rows * tuning.block_c <= 32 * 32 * tuning.num_warps, (C, tuning)
            assert tuning.block_c % MIN_BLOCK_C == 0 and tuning.reason, (C, tuning)
        for tuning in (forward, backward):
            assert tuning.looped == (tuning.block_c < C), (C, tuning)
        warps = backward.programs_per_sm * backward.num_warps
        assert backward.max_registers * 32 * warps <= REGISTERS_PER_SM, (C, backward)
        tile_bytes = backward.rows * backward.block_c * read_bytes
        prefetched = backward.programs_per_sm * (backward.stages - 1) * tile_bytes
        assert prefetched < SMALLEST_SHARED_MEMORY, (C, backward)


@pytest.mark.parametrize("norm", NORMS)
def test_rows_beyond_the_register_limit(norm: Norm, device: torch.device) -> None:
    C = 20000
    assert forward_tuning(C, 2).looped and backward_tuning(C, 4).looped
    check(norm, Inputs.random(device, 2, C, dropout_p=0.0))


@pytest.mark.parametrize("C", [1, 64, 65, 300], ids=["one", "a block", "a block and 1", "ragged"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.usefixtures("looped", "poisoned")
def test_loops_equal_fp64(norm: Norm, C: int, device: torch.device) -> None:
    check(norm, Inputs.random(device, 5, C))
    check(norm, Inputs.random(device, 5, C, residual=False, dropout_p=0.0))


@pytest.mark.usefixtures("looped")
def test_loops_keep_the_digits_under_a_large_mean(device: torch.device) -> None:
    inputs = Inputs.random(device, 5, 300, dropout_p=0.0)
    inputs.residual.add_(1000.0)
    check(layer_norm, inputs)


@pytest.mark.parametrize("sms", [1, 2, 1000], ids=["one SM", "uneven strips", "a tile per strip"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.usefixtures("poisoned")
def test_any_number_of_partial_sums(
    norm: Norm, sms: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: sms)
    inputs = Inputs.random(device, 41, 100, dropout_p=0.0)
    tuning = backward_tuning(100, 2 + 4 + 4)
    assert 41 // tuning.rows > 2 * tuning.programs_per_sm and 41 % tuning.rows
    check(norm, inputs)


@pytest.mark.parametrize("norm", NORMS)
def test_repeats_bitwise(norm: Norm, device: torch.device) -> None:
    inputs = Inputs.random(device, 50, 100)
    first, second = norm(kernels, inputs), norm(kernels, inputs)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("C", [1, 7, 8, 100, 257])
@pytest.mark.parametrize("path", ["rows", "loops"])
def test_dropout_is_the_shared_mask(
    C: int, path: str, device: torch.device, request: pytest.FixtureRequest
) -> None:
    if path == "loops":
        request.getfixturevalue("looped")
    N, p = 9, 0.5
    rng = torch.tensor([-(2**50) + 3, 2**33 + 1, 4, 2**32 - 5], device=device)
    keep = keep_mask(rng, 1, 1, N, C, p)[0, 0]
    x = torch.ones(N, C, device=device)
    _, stream, rstd = kernels.rms_norm_forward(x, None, None, rng, EPS, p, x.dtype, x.dtype)
    assert torch.equal(stream, keep * 2.0)
    # A stream gradient of one arrives at x through the mask, and dy = 0 adds nothing.
    dx, dresidual, _ = kernels.rms_norm_backward(
        torch.zeros_like(x), x, stream, None, rstd, rng, p, x.dtype, x.dtype
    )
    assert torch.equal(dx, keep * 2.0)
    assert torch.equal(dresidual, x)


@pytest.mark.parametrize("path", ["rows", "loops"])
def test_layouts_give_the_same_bits(
    path: str, device: torch.device, request: pytest.FixtureRequest
) -> None:
    if path == "loops":
        request.getfixturevalue("looped")
    plain = Inputs.random(device, 6, 100)
    apart = torch.randn(6, 200, device=device).bfloat16()
    apart[:, :100] = plain.x
    strided = Inputs(
        **vars(plain)
        | {
            "x": apart[:, :100],
            "residual": plain.residual[:1].expand(6, 100),
            "dy": plain.dy.T.contiguous().T,
            "dstream": plain.dstream[:, :1].expand(6, 100),
            "weight": plain.weight.repeat_interleave(2)[::2],
        }
    )
    dense = {n: t.contiguous() if isinstance(t, Tensor) else t for n, t in vars(strided).items()}
    expected, got = layer_norm(kernels, Inputs(**dense)), layer_norm(kernels, strided)
    for name, tensor in got.items():
        assert tensor.is_contiguous() and torch.equal(tensor, expected[name]), name


def test_offsets_beyond_32_bits(device: torch.device) -> None:
    """Five rows 2^29 elements apart; only the rows' own pages are touched."""
    C, stride = 16, 1 << 29
    try:
        storage = torch.empty(4 * stride + C, dtype=torch.float16, device=device)
    except (RuntimeError, MemoryError):
        pytest.skip("no 4 GB of address space")
    far = storage.as_strided((5, C), (stride, 1))
    far.copy_(torch.randn(5, C, device=device))
    near = far.clone()
    arguments = (None, None, None, None, EPS, 0.0, torch.float32, torch.float16)
    y_far, _, mean, rstd = kernels.layer_norm_forward(far, *arguments)
    y_near, *_ = kernels.layer_norm_forward(near, *arguments)
    assert torch.equal(y_far, y_near)
    rest = (None, None, mean, rstd, None, 0.0, torch.float16, None)
    dx_far, *_ = kernels.layer_norm_backward(far, None, far, *rest)
    dx_near, *_ = kernels.layer_norm_backward(near, None, near, *rest)
    assert torch.equal(dx_far, dx_near)


@pytest.mark.parametrize("norm", NORMS)
def test_no_rows(norm: Norm, device: torch.device) -> None:
    got, expected = (norm(m, Inputs.random(device, 0, 24)) for m in (kernels, reference))
    for name, tensor in expected.items():
        assert got[name].shape == tensor.shape and got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("C", [64, 768, 1600])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_saved_statistics(offset: float, C: int, device: torch.device) -> None:
    """The mean that the backward gets is as exact as PyTorch's, near 0 and far from it."""
    x = (torch.randn(64, C, device=device) + offset).bfloat16()
    options = (None, None, None, None, EPS, 0.0)
    _, _, *got = kernels.layer_norm_forward(x, *options, x.dtype, x.dtype)
    _, _, *same = reference.layer_norm_forward(x, *options, x.dtype, x.dtype)
    wide = (torch.float64, torch.float64)
    _, _, *exact = reference.layer_norm_forward(x.double(), *options, *wide)
    for ours, plain, truth in zip(got, same, exact, strict=True):
        check_close(ours, plain, truth)
