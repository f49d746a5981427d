"""The parts of the extension's build that need no compiler, and the schemas it implements."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from build_tools import commands, cuda_build, toolchain
from build_tools.toolchain import Missing
from fused_lm.ops import schemas
from fused_lm.reference import (
    attention,
    attention_decode,
    attention_varlen,
    cross_entropy,
    ffn,
    layernorm,
    linear_act,
    linear_residual,
)

NVCC = """#!/bin/sh
case "$1" in
--dryrun) echo '#$ TOP={root}/bin/..' >&2 ;;
--version) echo 'Cuda compilation tools, release {version}, V{version}.88' ;;
--list-gpu-code) printf 'sm_80\\nsm_90a\\n' ;;
esac
"""
PARTS = ("include/cuda_runtime.h", "include/crt/host_config.h", "lib/libcudart_static.a")


def _toolkit(root: Path, version: str, nvcc: Path | None = None) -> Path:
    """A toolkit that consists of what is looked for, and its nvcc."""
    for part in (*PARTS, "nvvm/bin/cicc"):
        (root / part).parent.mkdir(parents=True, exist_ok=True)
        (root / part).touch()
    nvcc = nvcc or root / "bin/nvcc"
    nvcc.parent.mkdir(exist_ok=True)
    nvcc.write_text(NVCC.format(root=root, version=version))
    nvcc.chmod(0o755)
    return nvcc


def test_where_nvcc_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'scripts'}:/bin:/usr/bin")
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: None)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(Missing, match="nvcc was found neither in CUDA_HOME, on PATH nor in"):
        toolchain._find_toolkit([])
    _toolkit(tmp_path / "nvidia/cu13", "13.0")
    wheel = toolchain._find_toolkit([str(tmp_path / "nvidia")])
    assert (wheel.version, wheel.archs) == ("13.0", ("80", "90a"))
    # On PATH lies a script; its toolkit is elsewhere.
    script = _toolkit(tmp_path / "usr", "13.1", tmp_path / "nvcc")
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: str(script))
    on_path = toolchain._find_toolkit([str(tmp_path / "nvidia")])
    assert (on_path.version, on_path.include) == ("13.1", tmp_path / "usr/include")
    _toolkit(tmp_path / "chosen", "13.2")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "chosen"))
    assert toolchain._find_toolkit([]).version == "13.2"
    (tmp_path / "chosen/lib/libcudart_static.a").unlink()
    assert toolchain._find_toolkit([]).version == "13.1", "one that is not whole is left out"
    (tmp_path / "usr/include/cuda_runtime.h").unlink()
    with pytest.raises(Missing, match=r"chosen/bin/nvcc has no libcudart_static\.a") as caught:
        toolchain._find_toolkit([])
    assert caught.value.mend == f"pip install {toolchain.TOOLKIT_WHEELS}"


def test_torch_that_is_too_old(tmp_path: Path) -> None:
    header = tmp_path / "torch/include/torch/csrc/stable/tensor.h"
    header.parent.mkdir(parents=True)
    header.touch()
    version = tmp_path / "torch/version.py"
    version.write_text("__version__ = '2.9.1+cu128'\n")
    with pytest.raises(Missing, match=r"torch 2\.9\.1\+cu128 is older than 2\.10"):
        toolchain._find_torch([str(tmp_path / "torch")])
    version.write_text("__version__ = '2.10.0'\n")
    assert toolchain._find_torch([str(tmp_path / "torch")]) == (tmp_path / "torch", "2.10.0")


def test_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    known = ("75", "80", "86", "90", "90a", "100", "120")
    monkeypatch.setattr(toolchain, "gpu_archs", lambda: ["86"])
    monkeypatch.delenv("FUSED_LM_CUDA_ARCHS", raising=False)
    assert cuda_build.chosen_archs(known) == ["86"]
    for gpus in ([], ["75"], ["130"]):
        monkeypatch.setattr(toolchain, "gpu_archs", lambda gpus=gpus: gpus)
        assert cuda_build.chosen_archs(known) == ["80", "90", "100", "120"]
    monkeypatch.setenv("FUSED_LM_CUDA_ARCHS", "9.0; 80,100")
    assert cuda_build.chosen_archs(known) == ["80", "90", "100"]
    for wrong in ("75", "ninety", "99"):
        monkeypatch.setenv("FUSED_LM_CUDA_ARCHS", wrong)
        with pytest.raises(Missing, match="this nvcc compiles for: 80, 86, 90, 100, 120"):
            cuda_build.chosen_archs(known)


def test_kernels_for_hopper_are_compiled_for_it_alone(tmp_path: Path) -> None:
    for name in ("norm.cu", "attention_sm90_bf16.cu"):
        (tmp_path / name).touch()
    hopper, _ = cuda_build.units_of(tmp_path, ["80", "90"])
    assert hopper.gencode == ["-gencode=arch=compute_90a,code=[sm_90a]"]
    assert [unit.name for unit in cuda_build.units_of(tmp_path, ["80"])] == ["norm"]


@pytest.mark.parametrize(
    ("archs", "gencode"),
    [
        (["80", "90"], ["80,code=[sm_80,sm_90,compute_80]"]),
        (["90"], ["80,code=[sm_90,compute_80]"]),
        (["86", "100", "120"], ["80,code=[sm_86,compute_80]", "100,code=[sm_100,sm_120]"]),
        (["120"], ["100,code=[sm_120,compute_100]"]),
    ],
)
def test_targets_of_a_kind_share_their_ptx(
    archs: list[str], gencode: list[str], tmp_path: Path
) -> None:
    (tmp_path / "norm.cu").touch()
    (unit,) = cuda_build.units_of(tmp_path, archs)
    assert unit.gencode == [f"-gencode=arch=compute_{code}" for code in gencode]
    assert f"compute_{unit.ptx}]" in unit.gencode[0]


@pytest.mark.parametrize(
    ("changed", "counts"),
    [
        ("kernels/norm_fwd.cu", True),
        ("kernels/norm_tuning.h", True),  # by way of kernels/norm.h
        ("norm.cpp", True),
        ("ptx/launch.h", True),
        ("ptx/lane.h", False),  # machine code
        ("common/tiles.h", False),  # of another operator
        ("kernels/norm_bwd.cu", False),
        ("norm_wide.cpp", False),  # an operator of its own, by its header
    ],
)
def test_host_code_is_what_a_unit_includes(
    changed: str, counts: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = {
        "kernels/norm_fwd.cu": '#include "kernels/norm.h"\n#include "ptx/lane.h"\n#include <cmath>',
        "kernels/norm_bwd.cu": '#include "kernels/norm.h"',
        "kernels/norm.h": '#include "kernels/norm_tuning.h"\n#include "ptx/launch.h"',
        "kernels/norm_tuning.h": "int tile = 1;",
        "kernels/other.h": '#include "common/tiles.h"',
        "common/tiles.h": "int tile = 3;",
        "norm.cpp": '#include "kernels/norm.h"',
        "norm_wide.cpp": '#include "norm_wide_ops.h"',
        "norm_wide_ops.h": "int wide;",
        "ptx/launch.h": "int launch = 1;",
        "ptx/lane.h": "int lane = 1;",
    }
    monkeypatch.setattr(cuda_build, "ROOT", tmp_path)
    for name, text in files.items():
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    before = cuda_build.host_code_of("norm_fwd")
    path = tmp_path / "csrc" / changed
    path.write_text("// A comment,   and a line.\n\n" + path.read_text())
    assert cuda_build.host_code_of("norm_fwd") == before
    path.write_text(path.read_text() + "int more;\n")
    assert (cuda_build.host_code_of("norm_fwd") != before) == counts


def test_jobs_follow_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0))
    for free, expected in ((1.0, 1), (6.5, min(2, cores)), (3000.0, cores)):
        monkeypatch.setattr(toolchain, "free_gib", lambda free=free: free)
        assert toolchain.jobs() == expected


def test_the_build_knows_the_schemas_without_torch() -> None:
    assert commands.schema_hash() == schemas.SCHEMA_HASH


def _decode_arguments() -> tuple[object, ...]:
    q, k, v = torch.randn(2, 4, 3, 16), torch.randn(5, 2, 4, 16), torch.randn(5, 2, 4, 8)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    return (q, k, v, torch.tensor([5, 8]), torch.tensor([[1, 0], [4, 2]]), -3, 0, 0.25, 5.0)


def _varlen_arguments(op: str) -> tuple[object, ...]:
    q, k, v = torch.randn(8, 4, 16), torch.randn(9, 2, 16), torch.randn(9, 2, 8)
    out, lse = torch.randn(8, 4, 8), torch.randn(4, 8)
    tensors = (q, k, v) if op.endswith("fwd") else (out, lse, q, k, v, out.clone(), lse.clone())
    return (*tensors, torch.tensor([0, 5, 8]), torch.tensor([0, 2, 9]), -3, 0, True, 0.25, 5.0)


def _attention_arguments(op: str) -> tuple[object, ...]:
    if op.startswith("attention_varlen"):
        return _varlen_arguments(op)
    if op == "attention_decode_fwd":
        return _decode_arguments()
    q, k, v = torch.randn(2, 4, 6, 16), torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 8)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)  # results take the order of their inputs
    masks = (torch.ones(2, 1, 6, 5).bool(), torch.ones(2, 5).bool(), torch.randn(1, 4, 6, 5))
    score = (*masks, torch.arange(4), -3, 2, 0.25, 5.0, 0.25)
    lse = torch.randn(2, 4, 6)
    if op == "attention_fwd":
        return (q, k, v, *score)
    if op == "attention_weights_fwd":
        return (q, k, lse, *score, True)
    out = torch.randn(2, 4, 6, 8)
    return (torch.randn_like(out), lse, q, k, v, out, lse, *score, True)


def _loss_arguments(op: str) -> tuple[object, ...]:
    logits, target, dloss = torch.randn(4, 9), torch.tensor([1, -100, 8, 0]), torch.randn(4)
    if op == "cross_entropy_scale_in_place":
        return (logits, dloss)
    options = (-100, 0.1, 0.01, 5.0)
    if op == "cross_entropy_rows_in_place":
        return (logits, target, torch.empty(4), dloss, *options, True)
    if op == "cross_entropy_fwd":
        return (logits, target, *options, "mean", "with the loss")
    return (dloss, logits, target, *options, "none")


def _linear_arguments(op: str) -> tuple[object, ...]:
    x, weight, bias, y = torch.randn(5, 8), torch.randn(16, 8), torch.randn(16), torch.randn(5, 16)
    if op == "ffn_dpre":
        return (x, weight.T, y, "silu", False, True)
    if op == "linear_act_fwd":
        return (x, weight, bias, None, "silu", False, True)
    backward = (y, x, weight, bias, y.clone(), "silu", False, True, True)
    return (*backward, False, torch.zeros(16, 8)) if op.endswith("add") else (*backward, True)


def _residual_arguments(op: str) -> tuple[object, ...]:
    x, weight, bias, stream = (torch.randn(*s) for s in ((5, 8), (16, 8), (16,), (5, 16)))
    drops = (torch.arange(4), 0.25, False)
    if op.endswith("fwd"):
        return (x, weight, bias, stream, *drops)
    return (stream, x, weight, bias, *drops, True, True, True)


def _arguments(op: str) -> tuple[object, ...]:
    if op.startswith("attention"):
        return _attention_arguments(op)
    if op.startswith("cross_entropy"):
        return _loss_arguments(op)
    if op.startswith("linear_residual"):
        return _residual_arguments(op)
    if op.startswith(("linear_act", "ffn")):
        return _linear_arguments(op)
    x, weight, rng = torch.randn(4, 8), torch.randn(8), torch.arange(4)
    statistics = (torch.randn(4), torch.rand(4) + 0.5)
    dtype = torch.float32
    bias, mean = ((), ()) if op.startswith("rms") else ((weight,), statistics[:1])
    if op.endswith("fwd"):
        return (x, x, weight, *bias, rng, 1e-5, 0.25, torch.bfloat16, dtype)
    return (x, x, x, weight, *bias, *mean, statistics[1], rng, 0.25, dtype, dtype)


def _without_the_last(function: Callable[..., object], *arguments: object) -> object:
    return function(*arguments[:-1])


@pytest.mark.parametrize("name", sorted(schemas.CUDA_SCHEMAS))
def test_inner_ops(name: str) -> None:
    """Schema, fake and aliasing of what the extension implements, by the reference on a CPU; and
    the fake on a GPU's tensors.
    """
    op = name.removeprefix("cuda_").removesuffix("_sm90")
    inner = getattr(torch.ops.fused_lm, name).default
    references = {
        "attention_decode": attention_decode,
        "attention_varlen": attention_varlen,
        "attention": attention,
        "cross_entropy": cross_entropy,
        "linear_act": linear_act,
        "linear_residual": linear_residual,
        "ffn": ffn,
    }
    found = (module for start, module in references.items() if op.startswith(start))
    reference = next(found, layernorm)
    words = op.removesuffix("_add").replace("cross_entropy_scale", "scale")
    function = getattr(reference, words.replace("_fwd", "_forward").replace("_bwd", "_backward"))
    arguments = _arguments(op)
    if name == "cuda_attention_bwd_sm90":  # told how to add up dq, which the reference is not
        arguments = (*arguments, 0)
        function = partial(_without_the_last, function)
    with torch.library._scoped_library("fused_lm", "IMPL") as library:
        library.impl(name, function, "CPU")
        torch.library.opcheck(inner, arguments)
        expected = inner(*arguments)
    with FakeTensorMode():
        on_gpu = [
            torch.empty(a.shape, dtype=a.dtype, device="cuda") if torch.is_tensor(a) else a
            for a in arguments
        ]
        outputs = inner(*on_gpu)
        if expected is None:
            assert outputs is None
            return
        pairs = (
            [(outputs, expected)]
            if torch.is_tensor(expected)
            else zip(outputs, expected, strict=True)
        )
        for fake, real in pairs:
            assert fake.is_cuda and fake.shape == real.shape and fake.dtype == real.dtype
