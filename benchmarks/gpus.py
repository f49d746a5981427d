"""What GPUs can do per clock, and how many blocks one of their multiprocessors holds.

Numbers of a GPU are NVIDIA's data sheets'; its clock is the one at which its data sheet's tensor
throughput (bf16, dense, fp32 sums) comes out. Rates per clock are the table "Throughput of native
arithmetic instructions" of the CUDA C++ programming guide, limits its table "Technical
specifications per compute capability"; the block reserve and the granularities are those of
cuda_occupancy.h.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
REGISTERS = 64 << 10
REGISTERS_PER_THREAD = 255
REGISTER_GRANULE = 256
"""Registers of a warp are rounded up to this."""

SUBPARTITIONS = 4
"""Schedulers of a multiprocessor; each owns a fourth of the registers."""

SHARED_GRANULE = 128
SHARED_RESERVE = 1024
"""Of every block, for the system, since sm_80."""

ISSUE_RATE = 4
MUFU_RATE = 16
ALU_RATE = 64
SHARED_BYTES = 128
L2_BYTES = 64
"""Per clock and multiprocessor: warp instructions, lanes, lanes, bytes, bytes."""


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor."""

    warps: int
    blocks: int
    shared_bytes: int
    fp32_rate: int


LIMITS = {
    "8.0": Limits(64, 32, 164 << 10, 64),
    "8.9": Limits(48, 24, 100 << 10, 128),
    "9.0": Limits(64, 32, 228 << 10, 128),
    "10.0": Limits(64, 32, 228 << 10, 128),
    "12.0": Limits(48, 24, 100 << 10, 128),
}


@dataclass(frozen=True)
class Gpu:
    """One product.

    Attributes:
        capability: A key of ``LIMITS``.
        code: The architecture of the cubin that a release has for it.
        tensor_flops: Per clock and multiprocessor: bf16, dense, fp32 sums.
        mma_sync_share: Of it, what mma.sync reaches: on an H200 ncu called the tensor pipe 46.8 %
            busy at 296 TFLOP/s (2026-11-26), and an H100 has the same multiprocessors; 1 where
            nobody has measured.
        dram_bytes: Per second.
    """

    name: str
    capability: str
    code: str
    multiprocessors: int
    clock_hz: float
    dram_bytes: float
    tensor_flops: int
    source: str
    mma_sync_share: float = 1.0

    @property
    def limits(self) -> Limits:
        return LIMITS[self.capability]

    @property
    def dram_bytes_per_clock(self) -> float:
        """A multiprocessor's share."""
        return self.dram_bytes / self.multiprocessors / self.clock_hz


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", "8.0", "80", 108, 1.41e9, 2.039e12, 2048, "A100 80GB SXM: 312 TFLOP/s"),
        Gpu("H100", "9.0", "90", 132, 1.83e9, 3.35e12, 4096, "H100 SXM: 989 TFLOP/s", 0.65),
        Gpu("H200", "9.0", "90", 132, 1.83e9, 4.8e12, 4096, "H200 SXM: 989 TFLOP/s", 0.65),
        Gpu("B200", "10.0", "100", 148, 1.86e9, 8.0e12, 8192, "HGX B200, per GPU: 2.25 PFLOP/s"),
        Gpu("RTX 4090", "8.9", "80", 128, 2.52e9, 1.008e12, 512, "Ada whitepaper: 165 TFLOP/s"),
        Gpu(
            "RTX 5090",
            "12.0",
            "120",
            170,
            2.41e9,
            1.792e12,
            512,
            "Blackwell whitepaper: 210 TFLOP/s",
        ),
    )
}
BY_CODE = {"80": "A100", "90": "H200", "100": "B200", "120": "RTX 5090"}
"""The GPU that stands for an architecture where none is named."""


@dataclass(frozen=True)
class Occupancy:
    """Per multiprocessor; ``limit`` is what keeps one more block out."""

    blocks: int
    warps: int
    share: float
    limit: str


def _rounded_up(value: int, granule: int) -> int:
    return -(-value // granule) * granule


def occupancy(limits: Limits, registers: int, threads: int, shared_bytes: int) -> Occupancy:
    """cuda_occupancy.h's arithmetic, with the multiprocessor's largest shared memory carve-out."""
    warps = -(-threads // WARP)
    warp_registers = _rounded_up(max(registers, 1) * WARP, REGISTER_GRANULE)
    by_registers = REGISTERS // SUBPARTITIONS // warp_registers * SUBPARTITIONS // warps
    block_shared = _rounded_up(shared_bytes + SHARED_RESERVE, SHARED_GRANULE)
    counts = {
        "registers": by_registers,
        "shared memory": limits.shared_bytes // block_shared,
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
    }
    limit = min(counts, key=lambda what: counts[what])
    blocks = counts[limit]
    return Occupancy(blocks, blocks * warps, blocks * warps / limits.warps, limit)
