"""``fused_lm.rotary`` and ``rotary_qk`` against the formula in fp64, on every backend that runs
here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fused_lm
from fused_lm.nn.positions import apply_rotary, rotary_tables
from fused_lm.parity.rotary_cases import formula
from fused_lm.tolerance import check_close
from fused_lm.triton_kernels.rotary import TILE_PAIRS, tune
from tests.oracle import check_against_oracle, check_strided

BACKENDS = ("reference", "pytorch", "triton")
KERNELS = ("reference", "triton")
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@dataclass(frozen=True)
class Case:
    """One call; ``why`` is what it is there for."""

    why: str
    B: int = 2
    H: int = 3
    Hkv: int = 0  # 0: no k
    T: int = 5
    D: int = 16
    R: int = 16
    dtype: torch.dtype = F32
    table_dtype: torch.dtype = F32
    interleaved: bool = False
    positions: str = ""  # "[T]" or "[B, T]"


CASES = [
    Case("plain"),
    Case("half a pair's dims, bf16", dtype=BF16, R=8),
    Case("fp16, rows of several tiles", T=131, D=32, R=32, dtype=F16),
    Case("neighbours", interleaved=True),
    Case("neighbours, bf16, partial, odd D", D=23, R=10, dtype=BF16, interleaved=True),
    Case("R = 2, the least", D=2, R=2),
    Case("R = 2 neighbours of D = 3", D=3, R=2, interleaved=True),
    Case("R/2 is no power of two", D=40, R=24),
    Case("one row", T=1),
    Case("one head, one batch", B=1, H=1, T=7),
    Case("more heads than a tile holds", B=1, H=9, T=2, D=512, R=512),
    Case("grouped heads", H=6, Hkv=2),
    Case("one key head, bf16", H=5, Hkv=1, dtype=BF16),
    Case("more key heads than query heads", H=2, Hkv=7, interleaved=True),
    Case("shared positions", positions="[T]"),
    Case("positions of each sequence", Hkv=3, positions="[B, T]"),
    Case("positions of each sequence, neighbours, fp16", dtype=F16, interleaved=True,
         positions="[B, T]"),
    Case("16-bit tables", dtype=BF16, table_dtype=BF16),
    Case("narrow tables of a wide x", dtype=F32, table_dtype=F16),
]  # fmt: skip


def tables(S: int, R: int, device: torch.device, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor]:
    return rotary_tables(torch.arange(S, device=device) * 3, R, dtype=dtype)


def heads(device: torch.device, B: int, H: int, T: int, D: int, **options: Any) -> Tensor:
    """[B, H, T, D] as a transposed view."""
    return torch.randn(B, T, H, D, device=device, **options).transpose(1, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_equals_fp64(case: Case, backend: str, device: torch.device) -> None:
    S = case.T + 4
    cos, sin = tables(S, case.R, device, case.table_dtype)
    options: dict[str, Any] = {"interleaved": case.interleaved}
    if case.positions:
        shape = (case.T,) if case.positions == "[T]" else (case.B, case.T)
        options["positions"] = torch.randint(S, shape, device=device)
    sizes = [case.H, case.Hkv] if case.Hkv else [case.H]
    inputs = [heads(device, case.B, n, case.T, case.D).to(case.dtype) for n in sizes]

    def ours(*tensors: Tensor) -> Any:
        with fused_lm.use_backend(backend):
            if case.Hkv:
                return fused_lm.rotary_qk(*tensors, cos, sin, **options)
            return (fused_lm.rotary(*tensors, cos, sin, **options),)

    def textbook(*tensors: Tensor) -> Any:
        return [formula(t, cos, sin, **options) for t in tensors]

    names = ("q", "k")[: len(sizes)]
    check_against_oracle(ours, textbook, inputs, [*names, *(f"d{name}" for name in names)])


@pytest.mark.parametrize("backend", ("reference", "pytorch"))
@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_of_every_order_in_fp64(interleaved: bool, backend: str) -> None:
    q, k = (torch.randn(2, n, 3, 6, dtype=F64, requires_grad=True) for n in (2, 1))
    cos, sin = tables(4, 4, q.device, F64)
    positions = torch.tensor([[0, 1, 3], [2, 2, 0]])

    def run(q: Tensor, k: Tensor) -> Any:
        a, b = fused_lm.rotary_qk(q, k, cos, sin, positions=positions, interleaved=interleaved)
        return a.square(), b.sin()

    with fused_lm.use_backend(backend):
        assert torch.autograd.gradcheck(run, (q, k))
        assert torch.autograd.gradgradcheck(run, (q, k))


@pytest.mark.parametrize("interleaved", [False, True])
def test_second_derivatives_of_the_kernel(interleaved: bool, device: torch.device) -> None:
    x, direction = (torch.randn(2, 2, 3, 6, device=device) for _ in range(2))
    cos, sin = tables(3, 4, device)

    def curvature(x: Tensor, backend: str) -> Tensor:
        x = x.clone().requires_grad_()
        with fused_lm.use_backend(backend):
            y = fused_lm.rotary(x, cos, sin, interleaved=interleaved)
        (first,) = torch.autograd.grad((y * y * y).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((first * direction.to(x.dtype)).sum(), x)
        return second

    exact = curvature(x.double(), "reference")
    check_close(curvature(x, "triton"), curvature(x, "pytorch"), exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_turns_keep_lengths_and_distances(
    interleaved: bool, backend: str, device: torch.device
) -> None:
    q, k = (heads(device, 1, 2, 6, 16) for _ in range(2))
    cos, sin = rotary_tables(torch.arange(600, device=device), 16)
    start = torch.arange(6, device=device)

    def turned(t: Tensor, shift: int) -> Tensor:
        with fused_lm.use_backend(backend):
            return fused_lm.rotary(t, cos, sin, positions=start + shift, interleaved=interleaved)

    def scores(shift: int) -> Tensor:
        return turned(q, shift).double() @ turned(k, shift).double().transpose(-1, -2)

    length = q.double().norm(dim=-1)
    check_close(turned(q, 500).double().norm(dim=-1).float(), length.float(), length)
    base, plain = scores(0), q.double() @ k.double().transpose(-1, -2)
    assert (base - plain).abs().max() > 0.1
    # Each of the D products of a score carries the rounding of its four factors.
    allowed = 16 * 4 * torch.finfo(F32).eps * q.abs().max() * k.abs().max()
    assert (scores(500) - base).abs().max() <= allowed


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_in_order_change_nothing(backend: str, device: torch.device) -> None:
    q, k = heads(device, 2, 3, 7, 12), heads(device, 2, 1, 7, 12)
    cos, sin = tables(9, 8, device)
    order = torch.arange(7, device=device)
    with fused_lm.use_backend(backend):
        expected = fused_lm.rotary_qk(q, k, cos, sin)
        for positions in (order, order.expand(2, 7), order.repeat(2, 1)):
            given = fused_lm.rotary_qk(q, k, cos, sin, positions=positions)
            assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))
        alone = fused_lm.rotary(q, cos, sin), fused_lm.rotary(k, cos, sin)
        again = fused_lm.rotary_qk(q, k, cos, sin)
        prefix = fused_lm.rotary(q[:, :, :4], cos, sin)
    for other in (alone, again):
        assert all(torch.equal(a, b) for a, b in zip(other, expected, strict=True))
    assert torch.equal(prefix, expected[0][:, :, :4])
    if backend == "pytorch":
        assert torch.equal(apply_rotary(q[..., :8], cos[:7], sin[:7]), expected[0][..., :8])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_reads_any_strides_and_keeps_their_order(
    interleaved: bool, backend: str, device: torch.device
) -> None:
    packed = torch.randn(2, 5, 4 + 2 * 2, 6, device=device)
    q, k, _ = (part.transpose(1, 2) for part in packed.split((4, 2, 2), dim=2))
    wide = torch.randn(2, 4, 5, 12, device=device)
    cos, sin = tables(5, 6, device)
    strided = {
        "slice of a packed projection": q,
        "contiguous": q.contiguous(),
        "dims last but one": q.transpose(2, 3).contiguous().transpose(2, 3),
        "every second dim": wide[..., ::2],
        "one row for all": q[:, :, :1].expand(-1, -1, 5, -1),
        "one head for all": q[:, :1].expand(-1, 4, -1, -1),
        "one dim for all": q[..., :1].expand(-1, -1, -1, 6),
    }
    for name, x in strided.items():
        with fused_lm.use_backend(backend):
            y = fused_lm.rotary(x, cos, sin, interleaved=interleaved)
            dense = fused_lm.rotary(x.contiguous(), cos, sin, interleaved=interleaved)
        exact = formula(x.double(), cos, sin, interleaved=interleaved)
        check_strided(y, dense, exact, backend, name)
        rows_first = x.stride(2) > x.stride(1) and backend != "pytorch"
        assert (y.transpose(1, 2) if rows_first else y).is_contiguous(), name
    with fused_lm.use_backend(backend):
        for y in fused_lm.rotary_qk(q, k, cos, sin, interleaved=interleaved):
            assert (y if backend == "pytorch" else y.transpose(1, 2)).is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_results_may_be_changed_in_place(
    interleaved: bool, backend: str, device: torch.device
) -> None:
    """What an operator returns is no view: autograd would forbid it."""
    cos, sin = tables(5, 8, device)
    for x in (heads(device, 2, 3, 5, 8), torch.randn(2, 3, 5, 8, device=device)):
        with fused_lm.use_backend(backend):
            y = fused_lm.rotary(x.requires_grad_(), cos, sin, interleaved=interleaved)
        doubled = y.detach().clone() * 2
        assert torch.equal(y.mul_(2), doubled)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unusual_gradients(backend: str, device: torch.device) -> None:
    """Only q or k used, only one with a gradient, and gradients of stride 0 and another order."""
    q, k = (heads(device, 2, n, 5, 8, requires_grad=True) for n in (4, 2))
    cos, sin = tables(5, 8, device)
    with fused_lm.use_backend(backend):
        a, b = fused_lm.rotary_qk(q, k, cos, sin)
        c, _ = fused_lm.rotary_qk(q.detach(), k, cos, sin)
        _, d = fused_lm.rotary_qk(q.detach(), k, cos, sin)
        e, _ = fused_lm.rotary_qk(q, k.detach(), cos, sin)
    dy = torch.randn(2, 4, 5, 8, device=device)
    both = torch.autograd.grad((a, b), (q, k), (dy, torch.ones_like(b)), retain_graph=True)
    only_q = torch.autograd.grad(a, (q, k), dy, retain_graph=True, allow_unused=True)
    only_k = torch.autograd.grad(b.sum(), (q, k), retain_graph=True, allow_unused=True)
    assert only_k[0] is None or not only_k[0].any()
    assert only_q[1] is None or not only_q[1].any()
    torch.testing.assert_close((only_q[0], only_k[1]), both, rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(d.sum(), k)[0], both[1], rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(e, q, dy)[0], both[0], rtol=0, atol=0)
    assert torch.equal(c.detach(), a.detach())
    transposed = dy.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(torch.autograd.grad(a, q, transposed)[0], both[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 0, 3, 8), (2, 2, 0, 8)], ids=str)
def test_nothing_in_nothing_out(shape: Any, backend: str, device: torch.device) -> None:
    x = torch.randn(shape, device=device, requires_grad=True)
    cos, sin = tables(4, 8, device)
    with fused_lm.use_backend(backend):
        y = fused_lm.rotary(x, cos, sin)
        y, k = fused_lm.rotary_qk(x, x.detach(), cos, sin)
    assert y.shape == k.shape == shape
    assert torch.autograd.grad(y.sum(), x)[0].shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_extremes_stay_where_they_are(backend: str, device: torch.device) -> None:
    x = heads(device, 1, 2, 3, 8)
    x[0, 1, 1, 0], x[0, 0, 2, 7] = float("inf"), float("nan")
    cos, sin = tables(3, 4, device)
    with fused_lm.use_backend(backend):
        y = fused_lm.rotary(x, cos, sin)
    expected = torch.zeros(1, 2, 3, 8, dtype=torch.bool, device=device)
    expected[0, 1, 1, [0, 2]] = expected[0, 0, 2, 7] = True
    assert torch.equal(~torch.isfinite(y), expected)


def test_the_kernel_reads_no_row_outside_of_the_tables(device: torch.device) -> None:
    """Past the checks, as on a GPU: rows of unknown positions are zeros, their rest is copied."""
    x = torch.randn(1, 2, 4, 6, device=device)
    cos, sin = tables(3, 4, device)
    positions = torch.tensor([1, -1, 3, 2**40], device=device)
    y, _ = torch.ops.fused_lm.rotary_fwd(x, None, cos, sin, positions, False, False, "triton")
    assert not y[:, :, 1:, :4].any() and y[:, :, 0, :4].all()
    assert torch.equal(y[..., 4:], x[..., 4:])


@pytest.mark.parametrize("backend", ["auto", *KERNELS])
def test_compile_and_transforms(backend: str, device: torch.device) -> None:
    cos, sin = tables(11, 6, device)

    def inputs(T: int) -> list[Tensor]:
        return [heads(device, 2, n, T, 6, requires_grad=True) for n in (4, 3)]

    def step(q: Tensor, k: Tensor) -> Tensor:
        T = q.shape[2]
        a, b = fused_lm.rotary_qk(q, k, cos[:T], sin[:T])
        c = fused_lm.rotary(q, cos, sin, interleaved=True)
        return (a.sin() * c).sum() + (b * b.cos()).sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    with fused_lm.use_backend(backend):
        for T in (5, 8, 9):
            pair = inputs(T)
            results = [run(*pair) for run in (step, compiled)]
            torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
            eager, traced = (torch.autograd.grad(total, pair) for total in results)
            torch.testing.assert_close(traced, eager)
        transformed = torch.func.grad(step, argnums=(0, 1))(*(t.detach() for t in pair))
        many = torch.stack([pair[0].detach(), 2 * pair[0].detach()])
        batched = torch.func.vmap(lambda x: fused_lm.rotary(x, cos, sin))(many)
        each = torch.stack([fused_lm.rotary(x, cos, sin) for x in many])
        tangent = torch.func.jvp(lambda x: fused_lm.rotary(x, cos, sin), (many[0],), (many[1],))[1]
    assert counter.frame_count == 1, "one graph for every length"
    torch.testing.assert_close(transformed, eager)
    torch.testing.assert_close(batched, each)
    torch.testing.assert_close(tangent, each[1])


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("pair", [False, True])
def test_opcheck(pair: bool, backend: str, device: torch.device) -> None:
    x = heads(device, 2, 3, 4, 6, requires_grad=True)
    k = torch.randn(2, 2, 4, 6, device=device, requires_grad=True) if pair else None
    cos, sin = tables(5, 4, device)
    positions = torch.tensor([[0, 1, 2, 4], [1, 1, 0, 0]], device=device) if pair else None
    op = torch.ops.fused_lm.rotary_fwd.default
    torch.library.opcheck(op, (x, k, cos, sin, positions, pair, False, backend))


def test_tiles_hold_whole_heads_and_fill_a_program() -> None:
    for half in (1, 3, 20, 32, 64, 128, 1000, 2048):
        row_pairs = 1 << (half - 1).bit_length()
        for H, Hkv in ((1, 0), (12, 12), (32, 8), (5, 1), (3, 64), (128, 128), (0, 4)):
            tile = tune(half, H, Hkv)
            limit = max(TILE_PAIRS, row_pairs)
            assert row_pairs * tile.block_t * max(tile.block_h, tile.block_hkv) <= limit
            assert row_pairs * tile.block_t * tile.block_h > TILE_PAIRS // 2
            assert all(n & (n - 1) == 0 for n in (tile.block_t, tile.block_h, tile.block_hkv))


x = torch.zeros(2, 3, 4, 8)
c = torch.zeros(4, 4)
BAD_CALLS = [
    ((x[0], c, c), {}, ValueError, "takes [B, H, T, D] tensors, got x [3, 4, 8]"),
    ((x.int(), c, c), {}, TypeError, "takes float tensors, got x torch.int32"),
    ((x, c[:, :0], c[:, :0]), {}, ValueError, "[S, R/2] with 2 <= R <= D, got x [2, 3, 4, 8]"),
    ((x[..., :7], c, c), {}, ValueError, "2 <= R <= D, got x [2, 3, 4, 7], cos [4, 4]"),
    ((x[..., :1], c[:, :1], c[:, :1]), {}, ValueError, "2 <= R <= D"),
    ((x, c, c[:3]), {}, ValueError, "cos [4, 4], sin [3, 4]"),
    ((x, c[0], c[0]), {}, ValueError, "cos [4], sin [4]"),
    ((x, c[:3], c[:3]), {}, ValueError, "a row for each of x's T rows"),
    ((x, c.int(), c.int()), {}, TypeError, "of one float dtype, got torch.int32"),
    ((x, c, c.half()), {}, TypeError, "got torch.float32 and torch.float16"),
    ((x, c.to("meta"), c), {}, TypeError, "one device, got x on cpu, cos on meta"),
    ((x, c.clone().requires_grad_(), c), {}, ValueError, "constants of rotary"),
    ((x, c, c), {"positions": torch.zeros(4)}, TypeError, "positions must be int64"),
    ((x, c, c), {"positions": torch.zeros(3, 4).long()}, ValueError, "[T] or [B, T], got x"),
    ((x, c, c), {"positions": torch.zeros(()).long()}, ValueError, "positions []"),
    ((x, c, c), {"positions": torch.tensor([0, 1, 4, 2])}, ValueError, "0 .. 3, got 0 .. 4"),
    ((x, c, c), {"positions": torch.tensor([0, 1, -1, 2])}, ValueError, "0 .. 3, got -1 .. 2"),
    ((x, x[0], c, c), {}, ValueError, "share B, T and D, got q [2, 3, 4, 8], k [3, 4, 8]"),
    ((x, x[:1], c, c), {}, ValueError, "k [1, 3, 4, 8]"),
    ((x, x[:, :, :3], c, c), {}, ValueError, "k [2, 3, 3, 8]"),
    ((x, x.half(), c, c), {}, TypeError, "q torch.float32 and k torch.float16"),
    ((x, x.to("meta"), c, c), {}, TypeError, "one device, got q on cpu, k on meta"),
]  # fmt: skip


@pytest.mark.parametrize("args, options, error, text", BAD_CALLS, ids=lambda value: str(value)[:40])
def test_bad_calls(args: Any, options: Any, error: type[Exception], text: str) -> None:
    run = fused_lm.rotary_qk if len(args) == 4 else fused_lm.rotary
    with pytest.raises(error) as caught:
        run(*args, **options)
    assert text in str(caught.value)


def test_why_and_refusals() -> None:
    assert fused_lm.why("rotary", x, c, c).backend == "pytorch"
    with fused_lm.use_backend("triton"), pytest.raises(RuntimeError, match="float64 runs through"):
        fused_lm.rotary(x.double(), c, c)
