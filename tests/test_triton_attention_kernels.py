"""What only the Triton attention has: its Philox, its interpreter repairs, its tiles.

That its numbers are right is tested with every other backend in test_attention.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from fused_lm.reference.philox import dropout_threshold, keep_mask
from fused_lm.triton_kernels import attention, attention_tuning, interpreter
from fused_lm.triton_kernels.attention_tuning import ROWS, Tuning, tune
from fused_lm.triton_kernels.launch import SHARED_MEMORY
from fused_lm.triton_kernels.philox import keep_tile, philox_4x32
from fused_lm.triton_kernels.tanh import tanh

interpreter.patch_interpreter()


@triton.jit
def _philox_kernel(words, n_rounds: tl.constexpr):
    """words int64 [rows, 6] = counter and key -> the first four replaced by the output."""
    row = words + tl.program_id(0) * 6
    c0, c1 = tl.load(row).to(tl.uint32), tl.load(row + 1).to(tl.uint32)
    c2, c3 = tl.load(row + 2).to(tl.uint32), tl.load(row + 3).to(tl.uint32)
    k0, k1 = tl.load(row + 4).to(tl.uint32), tl.load(row + 5).to(tl.uint32)
    c0, c1, c2, c3 = philox_4x32(c0, c1, c2, c3, k0, k1, n_rounds)
    tl.store(row, c0.to(tl.int64))
    tl.store(row + 1, c1.to(tl.int64))
    tl.store(row + 2, c2.to(tl.int64))
    tl.store(row + 3, c3.to(tl.int64))


@triton.jit
def _keep_kernel(rng, keep, batch, head, row_start, col_start, threshold,
                 ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    tile = keep_tile(rng, batch, head, row_start, col_start, threshold, ROWS, COLS)
    offsets = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    tl.store(keep + offsets, tile.to(tl.int8))


@triton.jit
def _tanh_kernel(x, y, N: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(y + offsets, tanh(tl.load(x + offsets)))


def _numpy_philox(counter: list[int], key: list[int], rounds: int) -> list[int]:
    """Philox4x32 in Python integers, from the paper's figure."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = divmod(0xD2511F53 * c0, 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 1 << 32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % (1 << 32), (k1 + 0xBB67AE85) % (1 << 32)
    return [c0, c1, c2, c3]


ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [
    # Philox4x32-10 of Random123's kat_vectors: (counter, key, output).
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def _run_philox(rows: list[list[int]], rounds: int, device: torch.device) -> list[list[int]]:
    words = torch.tensor(rows, dtype=torch.int64, device=device)
    _philox_kernel[(len(rows),)](words, rounds)
    return words[:, :4].tolist()


def test_philox_known_answers_of_random123(device: torch.device) -> None:
    rows = [[*counter, *key] for counter, key, _ in KNOWN_ANSWERS]
    assert _run_philox(rows, 10, device) == [output for _, _, output in KNOWN_ANSWERS]


def test_philox_with_seven_rounds_equals_python_integers(device: torch.device) -> None:
    rows = np.random.default_rng(0).integers(0, 1 << 32, (8, 6)).tolist()
    assert _run_philox(rows, 7, device) == [_numpy_philox(row[:4], row[4:], 7) for row in rows]


@pytest.mark.parametrize(
    ("batch", "head", "why"),
    [
        (0, 0, "the first element"),
        (3, 5, "batch in the high half"),
        (65537, 1, "batch past 16 bits"),
    ],
)
def test_keep_tile_is_the_contracts_mask(
    batch: int, head: int, why: str, device: torch.device
) -> None:
    """Lane by lane: eight columns per Philox call, low half first; 64-bit seeds, 32-bit offsets."""
    p, rows, cols, row_start, col_start = 0.3, 16, 32, 48, 24
    state = [0x0123456789ABCDEF, 0xFFFFFFF0, 7, 0xFFFFFFE0]
    keep = torch.empty(rows, cols, dtype=torch.int8, device=device)
    rng = torch.tensor(state, device=device)
    _keep_kernel[(1,)](
        rng, keep, batch, head, row_start, col_start, dropout_threshold(p), rows, cols
    )
    expected = torch.empty(rows, cols, dtype=torch.int8)
    key = [state[0] & ONES, state[0] >> 32]
    for i in range(rows):
        for j in range(cols):
            row, col = row_start + i, col_start + j
            counter = [
                col >> 3,
                (row + state[3]) & ONES,
                (head + state[2] + (batch << 16)) & ONES,
                (state[1] + (batch >> 16)) & ONES,
            ]
            word = _numpy_philox(counter, key, 7)[(col & 7) >> 1]
            lane = word >> 16 if col & 1 else word & 0xFFFF
            expected[i, j] = lane >= dropout_threshold(p)
    assert torch.equal(keep.cpu(), expected), why


def test_tanh_is_within_two_ulp_also_near_zero(device: torch.device) -> None:
    magnitudes = torch.logspace(-6, 1.2, 4096, dtype=torch.float64).float()
    x = torch.cat([magnitudes, -magnitudes]).to(device)
    y = torch.empty_like(x)
    _tanh_kernel[(1,)](x, y, x.numel())
    exact = torch.tanh(x.double())
    ulp = torch.finfo(torch.float32).eps * exact.abs()
    assert ((y.double() - exact).abs() <= 2 * ulp).all()


def test_bf16_conversions_round_to_nearest_even() -> None:
    values = torch.randn(4096)
    bits = interpreter.fp32_to_bf16_bits(values.numpy())
    assert np.array_equal(bits, values.bfloat16().view(torch.uint16).numpy())
    special = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 1 + 1 / 256], np.float32)
    back = interpreter.bf16_bits_to_fp32(interpreter.fp32_to_bf16_bits(special))
    np.testing.assert_array_equal(back, np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 1.0]))


def test_the_interpreter_still_needs_its_repairs() -> None:
    """When this fails, Triton has fixed bf16: remove create_dot and cast_impl from the patch."""
    assert not interpreter.upstream_is_fixed()


LIMITS = sorted({kib * 1024 for kib in SHARED_MEMORY.values()})
KERNELS = sorted({row.kernel for row in ROWS})


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_tile_fits_its_shared_memory(kernel: str, limit: int) -> None:
    """Also with an fp32 bias and a mask; the formula itself is checked by compile_check."""
    for head_dim in (1, 16, 40, 64, 96, 128, 256, 512):
        for value_dim in (16, head_dim):
            for element_bytes, score_bytes in ((2, 0), (2, 5), (4, 0), (4, 5)):
                arguments = head_dim, value_dim, element_bytes, limit, score_bytes
                if attention_tuning.refuses(*arguments) is not None:
                    assert (element_bytes, head_dim, limit) == (4, 512, 99 * 1024)
                    continue
                tile = tune(kernel, *arguments)
                padded = (max(16, triton.next_power_of_2(n)) for n in (head_dim, value_dim))
                assert tile.shared_bytes(*padded, element_bytes, score_bytes, limit) <= limit
                assert tile.reason and tile.BLOCK_T >= 16 and tile.BLOCK_S >= 16
                assert tile.element_bytes >= element_bytes and not (tile.bare and score_bytes)


def test_rows_are_in_reach() -> None:
    """Every row is taken for some target: a row that never is would be dead."""
    taken = {
        tune(kernel, dim, dim, element_bytes, limit, score_bytes)
        for kernel in KERNELS
        for dim in (16, 64, 128, 256, 512)
        for element_bytes in (2, 4)
        for score_bytes in (0, 1, 2, 4, 5)
        for limit in LIMITS
        if attention_tuning.refuses(dim, dim, element_bytes, limit, score_bytes) is None
    }
    assert [row for row in ROWS if row not in taken] == []


@pytest.mark.parametrize(
    ("lower", "upper", "dropout_p", "masked"),
    [(None, 0, 0.0, False), (-20, 9, 0.25, False), (None, None, 0.25, True)],
    ids=["causal", "window-dropout", "masked-dropout"],
)
def test_results_do_not_depend_on_the_tiles(
    lower: int | None,
    upper: int | None,
    dropout_p: float,
    masked: bool,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whole, cut and skipped tiles fall elsewhere; the dropout mask stays bitwise the same."""
    B, H, HKV, T, S, D = 1, 2, 1, 75, 83, 16
    q, k, v = (torch.randn(B, h, n, D, device=device) for h, n in ((H, T), (HKV, S), (HKV, S)))
    dout = torch.randn(B, H, T, D, device=device)
    mask = (torch.rand(B, 1, T, S, device=device) < 0.8) if masked else None
    bias = torch.randn(1, H, 1, S, device=device) if masked else None
    rng = torch.tensor([11, 12, 13, 14], device=device) if dropout_p else None
    tail = (mask, None, bias, rng, lower, upper, 0.3, 0.0, dropout_p)

    def run(block_t: int, block_s: int) -> list[torch.Tensor]:
        def fixed(kernel: str, *_: object) -> Tuning:
            return Tuning(kernel, 4, 512, block_t, block_s, 4, 1, "test")

        monkeypatch.setattr(attention, "tune", fixed)
        out, lse = attention.attention_forward(q, k, v, *tail)
        grads = attention.attention_backward(dout, None, q, k, v, out, lse, *tail, masked)
        weights = attention.attention_weights_forward(q, k, lse, *tail, False)
        return [weights, out, lse, *grads]

    one, other = run(16, 32), run(64, 16)
    if rng is not None:
        kept = keep_mask(rng, B, H, T, S, dropout_p)
        for weights in (one[0], other[0]):
            assert not weights[~kept].any()
        assert torch.equal(one[0] == 0, other[0] == 0)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)
