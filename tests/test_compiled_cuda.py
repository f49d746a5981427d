"""Every CUDA kernel compiles for every GPU we support: no spills, no remark, golden resources.

A golden file per version of nvcc; without it only resources go unchecked. ``make golden`` compiles
all files for all GPUs and writes it anew: its diff is part of a review, and code that it was not
written for fails. ``make test-all`` compiles each file once more, for one of the GPUs in turn. The
gates themselves are shown to fail, on planted kernels.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from build_tools import compiled, cubin, sources, toolchain
from build_tools.cuda_build import RELEASE_ARCHS, hopper_alone
from build_tools.toolchain import Missing, Toolkit
from tests.golden import FOLDER, written_for

SHARED_LIMIT = {"80": 163 << 10, "90": 227 << 10, "100": 227 << 10, "120": 99 << 10}
TARGETS = compiled.targets()
SPILLS = """
__global__ void __launch_bounds__(1024) spills(const float4* x, float4* y) {
  float4 v[32];
#pragma unroll
  for (int i = 0; i < 32; ++i) v[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 32; ++i) y[i * 1024 + threadIdx.x] = v[31 - i];
}
__global__ void __launch_bounds__(256) is_clean(const float* x, float* y) {
  __shared__ float sX[256];
  sX[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = sX[255 - threadIdx.x];
}
"""
MARKED = """
template <int kRows> __global__ void __launch_bounds__(128) marked(float* y) {
  extern __shared__ float sRows[];
  asm volatile("// fused_lm_shared_bytes %0" ::"n"(kRows * 16));
  sRows[threadIdx.x] = y[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = sRows[127 - threadIdx.x];
}
template __global__ void marked<4>(float*);
template __global__ void marked<32>(float*);
"""


@functools.cache
def _toolkit() -> Toolkit:
    try:
        return toolchain.find_toolkit()
    except Missing as error:
        pytest.skip(str(error))


def _planted(folder: Path, code: str, *flags: str) -> compiled.Compiled:
    source = folder / "planted.cu"
    source.write_text(code)
    return compiled.compiled(_toolkit(), source, "90", folder / "cache", flags)


def _has_another(kernel: str) -> bool:
    """Whether another kernel runs where a GPU has too little shared memory for this one."""
    return "_teams_" in kernel or ("attention_bwd_dkdv" in kernel and not kernel.endswith(", 0>"))


SOURCES = sorted({source for source, _ in TARGETS})


def _in_turn() -> list[tuple[Path, str]]:
    """Every file with one of its architectures, each of which has as many files."""
    found, seen = [], 0
    for source in SOURCES:
        archs = [arch for path, arch in TARGETS if path == source]
        found.append((source, archs[seen % len(archs)]))
        seen += len(archs) > 1
    return found


def _check(source: Path, arch: str) -> None:
    toolkit = _toolkit()
    if arch.rstrip("a") not in toolkit.archs:
        pytest.skip(f"nvcc {toolkit.version} does not compile for sm_{arch}")
    result = compiled.compiled(toolkit, source, arch)
    problems = compiled.problems_of(result)
    assert not problems, "\n".join(problems)
    for kernel in result.kernels:
        shared = kernel.static_shared + (kernel.dynamic_shared or 0)
        limit = SHARED_LIMIT["90"] if _has_another(kernel.name) else SHARED_LIMIT[arch.rstrip("a")]
        assert shared <= limit, kernel.name
    got = compiled.golden_of(result)
    assert len(got) == len(result.kernels), "two kernels have one name"
    path = FOLDER / f"cuda-{toolkit.release}.json"
    if not path.is_file():
        pytest.skip(f"no spills and no remarks; resources: no {path.name} yet, see make golden")
    prefix = f"sm_{arch} {source.stem} "
    golden = json.loads(path.read_text())
    wanted = {place: line for place, line in golden.items() if place.startswith(prefix)}
    changed = [
        f"{place}: {got.get(place, 'gone')}, golden {wanted.get(place, 'nothing')}"
        for place in sorted(got.keys() | wanted.keys())
        if got.get(place) != wanted.get(place)
    ]
    assert not changed, "\n".join([*changed, "If this is meant: make golden"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "arch"), [pytest.param(s, a, id=f"{s.stem}-sm_{a}") for s, a in _in_turn()]
)
def test_compiles_without_spills_and_with_the_golden_resources(source: Path, arch: str) -> None:
    _check(source, arch)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_a_kernel_is_compiled_when_its_code_changes(source: Path) -> None:
    """Of code that the golden file was written for it tells all; other code is compiled at once,
    for one target.
    """
    wanted = written_for(f"cuda-{_toolkit().release}").get(source.stem)
    if wanted == sources.code_hash(source):
        return
    _check(source, next(arch for path, arch in TARGETS if path == source))
    if wanted is not None:
        pytest.fail("the golden resources, but of other code: make golden compiles it for all GPUs")


def test_the_golden_file_names_no_kernel_that_is_gone() -> None:
    """The test above sees only files that there are."""
    files = {f"sm_{arch} {source.stem}" for source, arch in TARGETS}
    for path in FOLDER.glob("cuda-*.json"):
        named = {" ".join(place.split(" ")[:2]) for place in json.loads(path.read_text())}
        assert named <= files, f"{path.name}: {sorted(named - files)}; make golden"


def test_every_file_is_compiled_for_its_architectures() -> None:
    for source in compiled.KERNELS.glob("*.cu"):
        archs = {arch for path, arch in TARGETS if path == source}
        assert archs == ({"90a"} if hopper_alone(source.stem) else set(RELEASE_ARCHS))


def test_a_spilling_kernel_is_reported(tmp_path: Path) -> None:
    result = _planted(tmp_path, SPILLS)
    kernels = {kernel.name: kernel for kernel in result.kernels}
    assert kernels["spills"].spill_stores > 0 and kernels["spills"].stack_bytes > 0
    assert kernels["spills"].max_threads == 1024
    assert kernels["is_clean"].static_shared == 1024 and kernels["is_clean"].dynamic_shared == 0
    assert kernels["is_clean"].stack_bytes == kernels["is_clean"].local_accesses == 0
    (problem,) = compiled.problems_of(result)
    assert problem.startswith("planted sm_90 spills: ") and "bytes of spill stores" in problem
    if cubin.find_cuobjdump(_toolkit()) is None:
        pytest.skip("no cuobjdump: LDL and STL were not looked for")
    assert kernels["spills"].local_accesses > 0


def test_local_memory_is_reported_without_spills(tmp_path: Path) -> None:
    """An array that is indexed at run time lies in local memory, and nothing is spilled."""
    code = """
    __global__ void indexes(const int* at, float* y) {
      float rows[32];
    #pragma unroll 1
      for (int i = 0; i < 32; ++i) rows[at[i]] = y[i];
      y[threadIdx.x] = rows[at[threadIdx.x]];
    }"""
    (kernel,) = (result := _planted(tmp_path, code)).kernels
    assert kernel.spill_stores == kernel.spill_loads == 0 and kernel.stack_bytes == 128
    assert "128 of stack" in compiled.problems_of(result)[0]


def test_dynamic_shared_memory_is_what_the_code_says(tmp_path: Path) -> None:
    found = {k.name: k.dynamic_shared for k in _planted(tmp_path, MARKED).kernels}
    assert found == {"marked<4>": 64, "marked<32>": 512}


def test_unknown_dynamic_shared_memory_is_said_to_be(tmp_path: Path) -> None:
    line = '  asm volatile("// fused_lm_shared_bytes %0" ::"n"(kRows * 16));\n'
    result = _planted(tmp_path, MARKED.replace(line, ""))
    if result.kernels[0].sass is None:
        pytest.skip("no cuobjdump: whether a kernel uses shared memory is not known")
    assert {k.dynamic_shared for k in result.kernels} == {None}
    assert "dynamic_shared=unknown" in compiled.golden_of(result)["sm_90 planted marked<4>"]


def test_a_result_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _planted(tmp_path, MARKED)
    monkeypatch.setattr(compiled, "_compile", None)
    assert _planted(tmp_path, MARKED) == first
    assert _planted(tmp_path, f"// Another comment.\n{MARKED}") == first
    with pytest.raises(TypeError):
        _planted(tmp_path, MARKED.replace("fused_lm_shared_bytes", "bytes"))
    with pytest.raises(TypeError):
        _planted(tmp_path, MARKED, "-maxrregcount=32")


def test_what_does_not_compile_says_why(tmp_path: Path) -> None:
    with pytest.raises(compiled.CompileError, match='identifier "nothing" is undefined'):
        _planted(tmp_path, "__global__ void broken() { nothing(); }")


LOG = """\
ptxas info    : 0 bytes gmem, 16 bytes cmem[4]
ptxas info    : Compiling entry function '_ZN8fused_lm4rowsILi4EEEvPf' for 'sm_90a'
ptxas info    : Function properties for _ZN8fused_lm4rowsILi4EEEvPf
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 3 barriers, 8 bytes cumulative stack size, 2048 bytes smem
ptxas info    : Compile time = 10.263 ms
"""
REMARKS = (
    "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
    "serialized due to insufficient register resources in the function 'rows'",
    "ptxas warning : setmaxnreg ignored to maintain minimum register requirement",
    "ptxas /tmp/x.ptx, line 7; info    : Advisory: Modifier '.aligned' is deprecated",
    'csrc/kernels/a.cu(3): warning #177-D: variable "a" was declared but never referenced',
    "a remark of a compiler to come",
)


def test_the_log_is_read() -> None:
    kernels, remarks = compiled.parse_log(LOG)
    assert kernels == {
        "_ZN8fused_lm4rowsILi4EEEvPf": compiled.Kernel(
            "rows<4>", 168, stack_bytes=8, spill_stores=4, spill_loads=12, static_shared=2048
        )
    }
    assert remarks == []


@pytest.mark.parametrize("remark", REMARKS)
def test_remarks_are_reported(remark: str) -> None:
    before, after = LOG.split("ptxas info    : Used", 1)
    kernels, remarks = compiled.parse_log(f"{before}{remark}\nptxas info    : Used{after}")
    assert remarks == [remark]
    for kernel in kernels.values():
        kernel.stack_bytes = kernel.spill_stores = kernel.spill_loads = 0
    result = compiled.Compiled("a", "90a", list(kernels.values()), remarks, 0.0)
    assert compiled.problems_of(result) == [f"a sm_90a: {remark}"]


def test_a_file_without_kernels_is_reported() -> None:
    assert compiled.problems_of(compiled.Compiled("a", "90", [], [], 0.0)) == ["a sm_90: no kernel"]


def test_names() -> None:
    symbol = "_ZN8fused_lm36_GLOBAL__N__64f9edd7_4_t_cu_03f48de54rowsILi4EEEvPK5uint4PS2_i"
    assert cubin.short_name(symbol) == "rows<4>"
    assert cubin.short_name("not_mangled") == "not_mangled"
