"""What the compiled cross entropy could reach, by the instructions of its second pass."""

from __future__ import annotations

import pytest

from benchmarks import static
from benchmarks.gpus import BY_CODE, GPUS
from build_tools import compiled, toolchain

pytestmark = pytest.mark.slow  # what is compiled holds until the code changes, see tests/golden
CAPPED_SHARE = 0.8
"""Of a GPU's memory: two tanh a logit are most of the instructions where logits have 16 bits."""


@pytest.mark.parametrize("arch", ["80", "90"])
def test_memory_binds(arch: str) -> None:
    """Without a softcap nothing but memory does; with one it is busy most of the time."""
    try:
        toolkit = toolchain.find_toolkit()
    except toolchain.Missing as error:
        pytest.skip(str(error))
    gpu = GPUS[BY_CODE[arch]]
    source = compiled.KERNELS / "cross_entropy_rows.cu"
    kernels = compiled.compiled(toolkit, source, arch).kernels
    if kernels[0].sass is None:
        pytest.skip("no cuobjdump, neither nvcc's nor Triton's")
    assert len(kernels) == 6
    for kernel in kernels:
        row = static.row_of(kernel, source.stem, arch, gpu, None)
        bounds = [bound for bound in row.bounds if bound.stored]
        assert bounds and all(bound.loaded == bound.stored == 64 for bound in bounds), kernel.name
        for bound in bounds:
            share = bound.cycles["DRAM"] / max(bound.cycles.values())
            assert share >= (CAPPED_SHARE if "true" in kernel.name else 1.0), kernel.name
