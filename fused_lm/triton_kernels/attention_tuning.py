"""Tile sizes of the attention kernels: a pure function of head dims, bytes and shared memory.

``tune`` walks the rows of a kernel, best first, and takes the first whose tiles fit:

    bytes = resident + buffers * streamed + scratch

- resident: tiles that stay while the loop runs (q in the forward, k and v in dK/dV, ...).
- streamed: tiles loaded every step, with those of mask and bias. Triton keeps num_stages buffers of
  them for wgmma and tcgen05, which read shared memory while the next step arrives, and one less for
  mma.sync, which has its operands in registers by then. Without a pipeline dK/dV stores one of its
  two tiles a second time, transposed.
- scratch: one score tile on its way from the layout of one product into that of the next.

It is an upper bound, checked against ptxas by ``compile_check``. The tiles aim at no register
spills (compiled for sm_80, 90, 100 and 120; not measured on a GPU) and then at few bytes from L2
per product. Rows for 4-byte elements are for exact fp32: its products are FMAs that hold whole
rows in registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fused_lm.triton_kernels.launch import shared_memory_limit


@dataclass(frozen=True)
class Tuning:
    """One row. ``head_dim`` and ``element_bytes`` say up to which (padded) head dim it serves."""

    kernel: str
    element_bytes: int
    head_dim: int
    BLOCK_T: int
    BLOCK_S: int
    num_warps: int
    num_stages: int
    reason: str
    wgmma: bool = False
    """Only where products read shared memory directly: targets with 227 KiB of it."""
    bare: bool = False
    """Only without mask and bias: their tiles take registers."""

    def launch_options(self) -> dict[str, Any]:
        """The keyword arguments of a launch."""
        return {
            "BLOCK_T": self.BLOCK_T,
            "BLOCK_S": self.BLOCK_S,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }

    def shared_bytes(
        self, D: int, DV: int, element_bytes: int, score_bytes: int, limit: int
    ) -> int:
        """The formula of the module's docstring. D, DV: padded; score_bytes: mask and bias."""
        T, S = self.BLOCK_T, self.BLOCK_S
        resident, streamed = {
            "forward": (T * D, S * (D + DV)),
            "dkdv": (S * (D + DV), T * (D + DV)),
            "dq": (T * (D + DV), S * (D + DV)),
            "dbias": (0, (T + S) * (D + DV)),
            "weights": (0, (T + S) * D),
            "delta": (0, 0),
        }[self.kernel]
        buffers = self.num_stages - (0.0 if _is_wgmma(limit) else 1.0)
        if self.num_stages == 1:
            buffers = 1.5 if self.kernel == "dkdv" else 1.0
        per_step = streamed * element_bytes + T * S * score_bytes
        return int(resident * element_bytes + buffers * per_step + T * S * element_bytes)


ROWS = (
    Tuning("forward", 2, 64, 128, 64, 4, 3, "4 warps share each k and v more often", bare=True),
    Tuning("forward", 2, 64, 128, 64, 8, 2, "8 warps have registers for mask and bias"),
    Tuning("forward", 2, 128, 128, 64, 8, 3, "8 warps hold the 128 x 128 output without spills"),
    Tuning("forward", 2, 128, 128, 64, 8, 2, "as above, for 99 KiB"),
    Tuning("forward", 2, 128, 64, 32, 4, 2, "for 99 KiB with fp32 biases"),
    Tuning("forward", 2, 256, 128, 64, 8, 2, "the output alone is 128 registers per thread"),
    Tuning("forward", 2, 256, 64, 32, 8, 2, "for 99 KiB, and for biases"),
    Tuning("forward", 2, 512, 64, 32, 8, 2, "the output alone is 128 registers per thread"),
    Tuning("forward", 2, 512, 32, 32, 8, 1, "for 99 KiB"),
    Tuning("forward", 2, 512, 32, 16, 4, 1, "for 99 KiB with biases"),
    Tuning("forward", 4, 128, 32, 32, 8, 2, "larger ones spill"),
    Tuning("forward", 4, 512, 16, 16, 4, 1, "the smallest tile"),
    Tuning("dkdv", 2, 64, 64, 128, 8, 2, "128 keys are M of two warpgroups", wgmma=True),
    Tuning("dkdv", 2, 64, 64, 128, 8, 2, "few bytes of q and dout per product", bare=True),
    Tuning("dkdv", 2, 64, 32, 128, 8, 2, "a shorter query tile leaves registers for mask and bias"),
    Tuning("dkdv", 2, 128, 64, 128, 8, 2, "128 keys are M of two warpgroups", wgmma=True),
    Tuning("dkdv", 2, 128, 32, 128, 8, 2, "dk and dv are 128 registers: a shorter query tile"),
    Tuning("dkdv", 2, 128, 32, 64, 4, 2, "for 99 KiB with biases"),
    Tuning("dkdv", 2, 256, 32, 64, 8, 2, "dk and dv are 128 registers"),
    Tuning("dkdv", 2, 256, 32, 32, 8, 1, "for 99 KiB"),
    Tuning("dkdv", 2, 512, 32, 32, 8, 1, "dk and dv are 128 registers"),
    Tuning("dkdv", 2, 512, 16, 16, 4, 1, "for 99 KiB"),
    Tuning("dkdv", 4, 128, 32, 32, 8, 2, "larger ones spill"),
    Tuning("dkdv", 4, 512, 16, 16, 4, 1, "the smallest tile"),
    Tuning("dq", 2, 64, 128, 64, 8, 2, "8 warps: dout takes registers as q does"),
    Tuning("dq", 2, 128, 128, 64, 8, 2, "as above"),
    Tuning("dq", 2, 128, 64, 64, 4, 2, "for 99 KiB"),
    Tuning("dq", 2, 256, 64, 32, 8, 2, "dq is 64 registers, and as many q and dout on mma.sync"),
    Tuning("dq", 2, 256, 32, 32, 4, 1, "for 99 KiB"),
    Tuning("dq", 2, 512, 32, 32, 8, 1, "as for 256"),
    Tuning("dq", 2, 512, 16, 16, 4, 1, "for 99 KiB"),
    Tuning("dq", 4, 128, 32, 32, 8, 2, "larger ones spill"),
    Tuning("dq", 4, 512, 16, 16, 4, 1, "the smallest tile"),
    Tuning("dbias", 2, 128, 64, 64, 8, 2, "four tiles stream, only the scores stay"),
    Tuning("dbias", 2, 256, 32, 32, 4, 2, "for 99 KiB, and for 256"),
    Tuning("dbias", 2, 512, 16, 16, 4, 1, "for 99 KiB, and for 512"),
    Tuning("dbias", 4, 128, 32, 32, 8, 2, "larger ones spill"),
    Tuning("dbias", 4, 512, 16, 16, 4, 1, "the smallest tile"),
    Tuning("weights", 2, 128, 64, 64, 4, 2, "two tiles stream, only the scores stay"),
    Tuning("weights", 2, 512, 32, 32, 4, 1, "for wide heads"),
    Tuning("weights", 4, 128, 32, 32, 8, 2, "larger ones spill"),
    Tuning("weights", 4, 512, 16, 16, 4, 1, "the smallest tile"),
    Tuning("delta", 4, 128, 64, 16, 4, 1, "streams rows, keeps nothing; BLOCK_S is unused"),
    Tuning("delta", 4, 512, 16, 16, 4, 1, "the same, for wide heads"),
)  # fmt: skip
"""Best first within (kernel, element bytes, head dim)."""

_INTERPRETER = {"BLOCK_T": 64, "BLOCK_S": 64, "num_warps": 4, "num_stages": 1}


def tune(
    kernel: str,
    head_dim: int,
    value_dim: int,
    element_bytes: int,
    shared_limit: int | None,
    score_bytes: int = 0,
) -> Tuning:
    """The first row of ``kernel`` that serves these dims and fits.

    Args:
        kernel: forward, delta, dkdv, dq, dbias or weights.
        head_dim, value_dim: up to 512.
        element_bytes: of q, k and v: 2 or 4.
        shared_limit: Bytes of shared memory a program can have; None is Triton's interpreter, which
            pays per operation, whatever the size, but whose tests need several tiles.
        score_bytes: of mask and bias together, per score.
    """
    if shared_limit is None:
        return Tuning(kernel, element_bytes, head_dim, **_INTERPRETER, reason="interpreter")
    D, DV = _padded(head_dim), _padded(value_dim)
    for row in ROWS:
        if row.kernel != kernel or row.element_bytes < element_bytes or row.head_dim < max(D, DV):
            continue
        if (row.wgmma and not _is_wgmma(shared_limit)) or (row.bare and score_bytes > 0):
            continue
        if row.shared_bytes(D, DV, element_bytes, score_bytes, shared_limit) <= shared_limit:
            return row
    raise ValueError(
        f"no {kernel} tile for head dims {head_dim} and {value_dim} of {element_bytes} bytes fits "
        f"{shared_limit} bytes of shared memory"
    )


def refuses(
    head_dim: int, value_dim: int, element_bytes: int, shared_limit: int, score_bytes: int = 0
) -> str | None:
    """Why some kernel of forward or backward has no tile for these arguments; None if all have."""
    for kernel in dict.fromkeys(row.kernel for row in ROWS):
        try:
            tune(kernel, head_dim, value_dim, element_bytes, shared_limit, score_bytes)
        except ValueError as error:
            return str(error)
    return None


def _padded(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


def _is_wgmma(shared_limit: int) -> bool:
    return shared_limit >= shared_memory_limit(90)
