"""The static performance estimate: what it reads in SASS, and its arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpus, machine_code, static
from benchmarks.gpus import GPUS, LIMITS, occupancy
from benchmarks.machine_code import Graph, parse
from build_tools import compiled, toolchain
from build_tools.compiled import Kernel

# A persistent kernel: rows in the outer loop, four sums of a row in the inner one, and a cold block
# behind the end that waits for a barrier and goes back.
LOOPS = """
0000 S2R R0, SR_TID.X
0010 @P0 EXIT
0020 LDG.E.NA.128.CONSTANT R4, desc[UR8][R2.64]
0030 SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R8
0040 @!P1 BRA 0x00d0
0050 LDS R9, [R1]
0060 FFMA R10, R9, R9, R10
0070 ISETP.NE.AND P2, PT, R9, RZ, PT
0080 @P2 BRA 0x0050
0090 MUFU.RSQ R10, R10
00a0 STG.E.EF.64 desc[UR8][R2.64], R10
00b0 @P3 BRA 0x0020
00c0 EXIT
00d0 SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R8
00e0 @!P1 BRA 0x00d0
00f0 BRA 0x0050
0100 BRA 0x0100
""".strip().splitlines()

# Two ways for the same bytes (dropout or none), one that leaves at once, and a diverged warp's.
BRANCHES = """
0000 @P0 EXIT
0010 LDG.E.128 R4, desc[UR8][R2.64]
0020 BRA.DIV UR4, 0x00a0
0030 SHFL.BFLY PT, R4, R31, 0x10, 0x1f
0040 BSSY B0, 0x0090
0050 @P1 BRA 0x0080
0060 IMAD.WIDE.U32 R6, R7, R8, RZ
0070 LOP3.LUT R6, R6, R7, R8, 0x96, !PT
0080 BSYNC B0
0090 STG.E.128 desc[UR8][R2.64], R4
0098 EXIT
00a0 WARPSYNC.COLLECTIVE R15, 0x00b0
00b0 SHFL.BFLY PT, R4, R31, 0x10, 0x1f
00c0 BRA 0x0040
""".strip().splitlines()


def _addresses(code: list[machine_code.Instruction]) -> list[int]:
    return [instruction.address for instruction in code]


@pytest.mark.parametrize(
    ("text", "kind", "global_bytes", "shared_bytes"),
    [
        ("LDG.E.NA.128.CONSTANT R4, desc[UR8][R6.64]", "LDG", 16, 0),
        ("LDG.E.U16 R4, desc[UR8][R6.64]", "LDG", 2, 0),
        ("LDG.E R4, desc[UR8][R6.64]", "LDG", 4, 0),
        ("STG.E.EF.64 desc[UR8][R6.64], R4", "STG", 8, 0),
        ("LDGSTS.E.BYPASS.LTC128B.128 [R5], desc[UR8][R6.64]", "LDGSTS", 16, 16),
        ("LDS.128 R4, [R5+UR4]", "LDS", 0, 16),
        ("LDSM.16.M88.4 R4, [R5]", "LDS", 0, 16),
        ("LDSM.16.MT88.2 R4, [R5]", "LDS", 0, 8),
        ("STS [R26+UR4], R37", "STS", 0, 4),
        ("SHFL.BFLY PT, R4, R31, 0x10, 0x1f", "shuffle", 0, 4),
        ("MUFU.RSQ R4, R37", "MUFU", 0, 0),
        ("I2F.S64 R4, R6", "convert", 0, 0),
        ("I2FP.F32.S32 R4, R6", "ALU", 0, 0),
        ("F2FP.BF16.F32.PACK_AB R4, R5, R6", "ALU", 0, 0),
        ("@!P0 FMUL R37, R37, 16777216", "FP32", 0, 0),
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24", "tensor", 0, 0),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x0", "barrier", 0, 0),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", "barrier", 0, 0),
        ("UTMALDG.3D [UR8], [UR4]", "TMA", 0, 0),
        ("UIADD3 UR4, UR4, 0x1, URZ", "uniform", 0, 0),
        ("BSYNC B0", "branch", 0, 0),
        ("LDL.LU R4, [R1]", "local", 0, 0),
        ("FMNMX R4, R5, R6, !PT", "ALU", 0, 0),
    ],
)
def test_classes(text: str, kind: str, global_bytes: int, shared_bytes: int) -> None:
    (instruction,) = parse([f"0040 {text}"])
    assert instruction.kind == kind
    assert (instruction.global_bytes, instruction.shared_bytes) == (global_bytes, shared_bytes)
    assert compiled.opcode_of(f"0040 {text}") == instruction.opcode


def test_tensor_work_of_a_warp() -> None:
    texts = ("HMMA.16816.F32.BF16 R4", "HMMA.1688.F32 R4", "HGMMA.64x256x16.F32 R4")
    flops = [instruction.flops for instruction in parse(f"0000 {text}" for text in texts)]
    assert flops == [2 * 16 * 8 * 16, 2 * 16 * 8 * 8, 2 * 64 * 256 * 16 // 4]


def test_predicates() -> None:
    texts = ("@P0 BRA 0x10", "BRA !P0, 0x10", "@PT BRA 0x10", "BRA 0x10", "BRA.U UP0, 0x10")
    found = [instruction.conditional for instruction in parse(f"0000 {text}" for text in texts)]
    assert found == [True, True, False, False, True]


def test_loops_are_found() -> None:
    graph = Graph(parse(LOOPS))
    spans = {
        tuple(sorted(i.address for block in loop.blocks for i in graph.blocks[block]))
        for loop in graph.loops
    }
    rows = tuple(range(0x20, 0xC0, 0x10))
    cold = (0xD0, 0xE0)
    assert spans == {(*rows, *cold, 0xF0), (0x50, 0x60, 0x70, 0x80), cold}
    loop = graph.main_loop()
    assert loop is not None and graph.blocks[loop.head][0].address == 0x20
    assert _addresses(graph.path(loop, lambda _: -1)) == list(rows)
    assert set(_addresses(graph.path(loop, lambda _: 1))) == {*rows, *cold, 0xF0}


def test_loops_without_global_memory_are_no_main_loop() -> None:
    code = [line for line in LOOPS if "00b0" not in line]
    graph = Graph(parse(code))
    assert len(graph.loops) == 2 and graph.main_loop() is None


def test_paths_through_a_body() -> None:
    graph = Graph(parse(BRANCHES))
    everything = graph.everything
    assert not graph.loops
    heavy = _addresses(graph.path(everything, lambda _: 1))
    assert heavy == [0x00, 0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70, 0x80, 0x90, 0x98]
    traffic = static.Traffic(parse(BRANCHES))
    lean = _addresses(static.lean_path(graph, everything, GPUS["H200"], traffic))
    assert lean == [address for address in heavy if address not in (0x60, 0x70)]


def test_a_lean_path_never_leaves_at_once() -> None:
    """Not even where arithmetic outweighs the bytes."""
    arithmetic = [f"{0x20 + i:04x} FFMA R4, R4, R4, R4" for i in range(1000)]
    code = ["0000 @P0 EXIT", "0010 LDG.E R4, [R2]", *arithmetic, "1000 STG.E [R2], R4", "1010 EXIT"]
    lean = static.lean_path(
        graph := Graph(parse(code)), graph.everything, GPUS["H200"], static.Traffic(parse(code))
    )
    assert len(lean) == len(code)


def test_jump_tables() -> None:
    code = ["0000 BRXU UR4 -0x10", "0010 EXIT", "0020 FADD R4, R4, R4", "0030 EXIT"]
    graph = Graph(parse(code), {0: [0x10, 0x20]})
    assert _addresses(graph.path(graph.everything, lambda _: 1)) == [0x00, 0x20, 0x30]


@pytest.mark.parametrize(
    ("capability", "registers", "threads", "shared", "blocks", "limit"),
    [
        ("9.0", 64, 256, 0, 4, "registers"),
        ("9.0", 65, 256, 0, 3, "registers"),  # 72 x 32 of 16 Ki: 7 warps of each scheduler
        ("9.0", 32, 256, 0, 8, "registers"),
        ("9.0", 168, 384, 0, 1, "registers"),
        ("9.0", 16, 32, 0, 32, "blocks"),
        ("9.0", 16, 1024, 0, 2, "warps"),
        ("9.0", 32, 128, 227 << 10, 1, "shared memory"),
        ("9.0", 32, 128, 113 << 10, 2, "shared memory"),  # the kilobyte of each block included
        ("9.0", 32, 128, 114 << 10, 1, "shared memory"),
        ("8.0", 32, 128, 163 << 10, 1, "shared memory"),
        ("12.0", 40, 256, 0, 6, "registers"),
        ("12.0", 16, 256, 0, 6, "warps"),
        ("9.0", 255, 512, 0, 0, "registers"),
    ],
)
def test_occupancy(
    capability: str, registers: int, threads: int, shared: int, blocks: int, limit: str
) -> None:
    found = occupancy(LIMITS[capability], registers, threads, shared)
    assert (found.blocks, found.limit) == (blocks, limit)
    assert found.warps == blocks * threads // 32
    assert found.share == found.warps / LIMITS[capability].warps


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_clocks_are_those_of_the_data_sheets_tensor_throughput(gpu: gpus.Gpu) -> None:
    number, unit = gpu.source.split()[-2:]
    stated = float(number) * {"TFLOP/s": 1e12, "PFLOP/s": 1e15}[unit]
    assert gpu.multiprocessors * gpu.clock_hz * gpu.tensor_flops == pytest.approx(stated, rel=0.01)


def test_bounds() -> None:
    """By hand: 128 warp instructions of FP32 against 16 bytes in and 8 out."""
    text = [
        "0000 LDG.E.128 R4, [R2]",
        *["0010 FFMA R4, R4, R4, R4"] * 128,
        "0020 STG.E.64 [R2], R4",
    ]
    code, gpu = parse(text), GPUS["H200"]
    bound = static.bound_of("only", code, gpu, static.Traffic(code))
    assert bound.cycles["issue"] == 130 / 4
    assert bound.cycles["FP32"] == 128 * 32 / 128
    per_clock = 4.8e12 / 132 / 1.83e9
    assert bound.cycles["DRAM"] == pytest.approx(24 * 32 / per_clock, abs=0.01)
    assert bound.unit == "DRAM" and bound.rate_bytes == pytest.approx(4.8e12)
    slow = static.cycles_of(code, GPUS["A100"], static.Traffic(code))
    assert slow["FP32"] == 128 * 32 / 64

    half = parse([*text, *["0030 MUFU.EX2 R4, R4"] * 24])
    bound = static.bound_of("only", half, gpu, static.Traffic(half))
    assert bound.unit == "MUFU" and bound.cycles["MUFU"] == 24 * 32 / 16
    assert bound.rate_bytes == pytest.approx(4.8e12 * bound.cycles["DRAM"] / 48, rel=1e-3)


def test_the_tensor_bound_is_the_data_sheets() -> None:
    code = parse(["0000 HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24"] * 8)
    bound = static.bound_of("only", code, GPUS["H200"], static.Traffic(code))
    assert bound.unit == "tensor" and bound.rate_flops == pytest.approx(989e12, rel=0.01)
    assert bound.rate_bytes == 0


def test_mma_sync_has_its_share_and_its_tiles_come_from_the_l2() -> None:
    text = ["0000 LDGSTS.E.BYPASS.128 [R4], [R2]", "0010 HMMA.16816.F32.BF16 R4, R8, R2, R4"]
    code = parse(text)
    for name, share in (("H200", 0.65), ("A100", 1.0)):
        gpu = GPUS[name]
        bound = static.bound_of("only", code, gpu, static.Traffic(code))
        assert bound.cycles["tensor"] == pytest.approx(4096 / gpu.tensor_flops / share, abs=0.01)
        assert bound.cycles["L2"] == 16 * 32 / 64 and bound.cycles["DRAM"] == 0
        assert bound.loaded == 16 and bound.rate_bytes == 0
    copied = static.bound_of("only", code[:1], GPUS["H200"], static.Traffic(code[:1]))
    assert copied.unit == "DRAM", "nobody says that another block reads the same"


def test_loads_through_the_l1_are_no_dram_traffic_beside_streaming_ones() -> None:
    code = parse(["0000 LDG.E.NA.128.CONSTANT R4, [R2]", "0010 LDG.E.128 R8, [R3]"])
    bound = static.bound_of("only", code, GPUS["H200"], static.Traffic(code))
    assert (bound.loaded, bound.cached, bound.stored) == (16, 16, 0)
    bound = static.bound_of("only", code[1:], GPUS["H200"], static.Traffic(code[1:]))
    assert (bound.loaded, bound.cached) == (16, 0)


def test_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels = [
        Kernel("rows<(DType)2>", 64, dynamic_shared=768, max_threads=256, sass=LOOPS),
        Kernel("other", 32, dynamic_shared=None, max_threads=128, sass=BRANCHES),
    ]
    result = compiled.Compiled("norm_fwd", "90", kernels, [], 1.0)
    monkeypatch.setattr(static.toolchain, "find_toolkit", lambda: None)
    monkeypatch.setattr(compiled, "targets", lambda archs: [(Path("norm_fwd.cu"), *archs)])
    monkeypatch.setattr(compiled, "compiled", lambda toolkit, source, arch: result)
    report = tmp_path / "rows.json"
    assert static.main(["--gpu", "H200", "--kernel", "rows*", "--json", str(report)]) == 0
    text = capsys.readouterr().out
    assert "rows<BFloat16>  [norm_fwd, sm_90]" in text and "other" not in text
    assert "64 registers, 768 B shared, 256 threads: 4 blocks, 32 warps, 50%" in text
    assert "loop of 3, 2 inside" in text
    (row,) = json.loads(report.read_text())
    assert row["occupancy"]["blocks"] == 4 and [b["path"] for b in row["bounds"]] == [
        "lean",
        "heavy",
    ]
    assert static.main(["--arch", "90", "--kernel", "other"]) == 0
    assert "dynamic shared" in capsys.readouterr().out
    assert static.main(["--kernel", "nothing*"]) == 1
    with pytest.raises(SystemExit):
        static.main(["--gpu", "H200", "--arch", "80"])


WIDE_HEADS = {
    "attention_fwd_sm80<T, 96, false>": 1.0,
    "attention_fwd_sm80<T, 128, false>": 1.0,
    "attention_fwd_teams_sm80<T, 192, 8, false>": 1.0,
    "attention_fwd_teams_sm80<T, 192, 8, true>": 1.0,
    "attention_fwd_teams_sm80<T, 256, 8, false>": 1.0,
    "attention_fwd_teams_sm80<T, 256, 8, true>": 1.0,
    # lse and delta take 2 % of shared memory's time, more than at 128 columns.
    "attention_bwd_dkdv_sm80<T, 96, false, (attention_dkdv::Part)0, 8>": 0.97,
    "attention_bwd_dkdv_sm80<T, 96, true, (attention_dkdv::Part)0, 8>": 0.97,
    "attention_bwd_dkdv_sm80<T, 128, false, (attention_dkdv::Part)0, 8>": 1.0,
    "attention_bwd_dkdv_sm80<T, 128, true, (attention_dkdv::Part)0, 8>": 1.0,
    "attention_bwd_dq_sm80<T, 96, false>": 1.0,
    "attention_bwd_dq_sm80<T, 128, false>": 1.0,
    "attention_bwd_teams_sm80<T, 96, (TeamPass)2, 4, true>": 0.96,
    "attention_bwd_teams_sm80<T, 128, (TeamPass)2, 4, true>": 1.0,
    "attention_bwd_teams_sm80<T, 192, (TeamPass)0, 8, false>": 0.98,
    "attention_bwd_teams_sm80<T, 192, (TeamPass)0, 8, true>": 0.98,
    "attention_bwd_teams_sm80<T, 192, (TeamPass)2, 8, false>": 1.0,
    "attention_bwd_teams_sm80<T, 192, (TeamPass)2, 8, true>": 1.0,
    "attention_bwd_teams_sm80<T, 256, (TeamPass)1, 8, false>": 1.0,
    "attention_bwd_teams_sm80<T, 256, (TeamPass)1, 8, true>": 1.0,
    # Own rows of two tensors: 163 KB hold two teams, for which all tiles are copied.
    "attention_bwd_teams_sm80<T, 256, (TeamPass)0, 4, false>": 0.93,
    "attention_bwd_teams_sm80<T, 256, (TeamPass)0, 4, true>": 0.93,
    "attention_bwd_teams_sm80<T, 256, (TeamPass)2, 4, false>": 0.94,
    "attention_bwd_teams_sm80<T, 256, (TeamPass)2, 4, true>": 0.94,
    # Two or three blocks of two teams, because a GPU was faster so than with one of four.
    "attention_fwd_teams_sm80<T, 96, 4, true>": 0.78,
    "attention_fwd_teams_sm80<T, 128, 4, true>": 0.9,
    "attention_bwd_teams_sm80<T, 192, (TeamPass)1, 4, false>": 0.89,
    "attention_bwd_teams_sm80<T, 192, (TeamPass)1, 4, true>": 0.89,
}
"""What an A100 runs, and how busy its tensor cores are at least while the main loop is at its
bound, with none of the features that a general kernel has; T is bf16."""


@pytest.mark.slow
def test_the_tensor_cores_bind_wide_heads() -> None:
    """From 96 columns on, rather than shared memory or issue slots; where not, it is known why."""
    try:
        toolkit = toolchain.find_toolkit()
    except toolchain.Missing as error:
        pytest.skip(str(error))
    found = {}
    for name in ("fwd", "bwd_dkdv", "bwd_dq"):
        source = compiled.KERNELS / f"attention_{name}_sm80_bf16.cu"
        for kernel in compiled.compiled(toolkit, source, "80").kernels:
            if kernel.sass is None:
                pytest.skip("no cuobjdump, neither nvcc's nor Triton's")
            short = kernel.name.split("::", 1)[-1].replace("__nv_bfloat16", "T")
            if short in WIDE_HEADS:
                row = static.row_of(kernel, source.stem, "80", GPUS["A100"], None)
                assert row.occupancy.blocks > 0, short
                cycles = row.bounds[0].cycles
                found[short] = cycles["tensor"] / max(cycles.values())
    assert found.keys() == WIDE_HEADS.keys()
    slow = {name: share for name, share in found.items() if share < WIDE_HEADS[name]}
    assert not slow
