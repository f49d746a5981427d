"""Backend ``cuda`` where it can't run: one clear sentence each, and the identity of its kernels."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fused_lm
from fused_lm import records
from fused_lm.commands import doctor
from fused_lm.cuda import attention as cuda_attention
from fused_lm.cuda import extension
from fused_lm.ops import schemas

REPORT: dict[str, Any] = {
    "format": 1,
    "toolkit": "13.0",
    "archs": ["80", "90"],
    "ptx": "80",
    "kernels": {
        "layernorm_fwd": {"sm_80": "f80", "sm_90": "f90", "compute_80": "fptx"},
        "layernorm_bwd": {"sm_80": "b80", "sm_90": "b90", "compute_80": "bptx"},
    },
    "host_code": {"layernorm_fwd": "fh", "layernorm_bwd": "bh"},
}
x = torch.zeros(4, 8)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Returns a function that pretends an installed extension, a GPU and a driver."""
    monkeypatch.setattr(extension, "_REPORT", tmp_path / "_build.json")
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def pretend(
        report: dict[str, Any] | None = None,
        capability: tuple[int, int] = (8, 0),
        driver: int = 13000,
        schema_hash: str = schemas.SCHEMA_HASH,
    ) -> None:
        (tmp_path / "_build.json").write_text(json.dumps(REPORT if report is None else report))
        module = SimpleNamespace(schema_hash=schema_hash, driver_version=lambda: driver)
        monkeypatch.setitem(sys.modules, "fused_lm._C", module)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
        extension.forget()
        records.kernel_id.cache_clear()

    extension.forget()
    yield pretend
    extension.forget()
    records.kernel_id.cache_clear()


def _on_a_gpu() -> str | None:
    return extension.refusal_on("cuda", 0)


def test_a_gpu_with_a_cubin_is_taken(install: Callable[..., None]) -> None:
    for capability in ((8, 0), (8, 6), (9, 0)):
        install(capability=capability)
        assert _on_a_gpu() is None
        assert extension.why_not() is None


def test_a_gpu_without_a_cubin_runs_ptx(install: Callable[..., None]) -> None:
    install(capability=(12, 0))
    assert extension.target_for((12, 0)) == "compute_80" and _on_a_gpu() is None
    install({**REPORT, "archs": ["86"], "ptx": "86"}, capability=(8, 0))
    assert _on_a_gpu() == (
        "the CUDA extension was built for sm_86, this GPU is sm_80; mend: "
        f"FUSED_LM_CUDA_ARCHS=80 {extension.rebuild_command()}"
    )


@pytest.mark.parametrize(
    "driver, capability, refused",
    [
        (13000, (8, 0), False),
        (13010, (12, 0), False),
        (14000, (12, 0), False),
        (12080, (8, 0), True),  # another major version
        (0, (8, 0), True),
    ],
)
def test_an_old_driver(
    install: Callable[..., None], driver: int, capability: tuple[int, int], refused: bool
) -> None:
    install(driver=driver, capability=capability)
    assert (_on_a_gpu() is not None) == refused
    if not driver:
        assert _on_a_gpu() == "no NVIDIA driver is installed"
    elif refused:
        assert f"driver speaks CUDA {driver // 1000}.{driver % 1000 // 10}" in str(_on_a_gpu())
        assert "built with CUDA 13.0: update the driver" in str(_on_a_gpu())


def test_ptx_needs_the_drivers_minor_version(install: Callable[..., None]) -> None:
    newer = {**REPORT, "toolkit": "13.2"}
    install(newer, driver=13000, capability=(8, 0))
    assert _on_a_gpu() is None
    install(newer, driver=13000, capability=(12, 0))
    assert "driver speaks CUDA 13.0" in str(_on_a_gpu())


def test_no_extension(install: Callable[..., None]) -> None:
    install({"format": 1, "why": "nvcc was not found", "mend": "pip install nvcc"})
    assert _on_a_gpu() == (
        "the CUDA extension is not built: nvcc was not found; mend: "
        f"pip install nvcc && {extension.rebuild_command()}"
    )
    with pytest.raises(RuntimeError, match="is not built: nvcc was not found"):
        extension.op("layer_norm_fwd")
    extension._REPORT.unlink()
    extension.forget()
    assert "was never installed" in str(_on_a_gpu())


def test_a_stale_extension(install: Callable[..., None]) -> None:
    install(schema_hash="0123456789abcdef")
    assert "built for another version of this source; mend: FUSED_LM_FORCE_CUDA=1 pip" in str(
        _on_a_gpu()
    )


def test_an_extension_that_does_not_load(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install()

    def refuse(name: str) -> None:
        raise ImportError("libc10.so: undefined symbol: torch_call_dispatcher\nsecond line")

    monkeypatch.setattr(extension.importlib, "import_module", refuse)
    sentence = str(_on_a_gpu())
    assert sentence.startswith("the CUDA extension can't be loaded (libc10.so: undefined symbol")
    assert "\n" not in sentence and "mend: " in sentence


def test_wrong_tensors(install: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    with fused_lm.use_backend("cuda"):
        with pytest.raises(RuntimeError, match="kernels run on NVIDIA GPUs, got a cpu tensor"):
            fused_lm.layer_norm(x)
        for call in ({"x": x.double()}, {"x": x, "residual_dtype": torch.float64}):
            with pytest.raises(RuntimeError, match="float64 runs through the reference"):
                fused_lm.rms_norm(**call)
        with pytest.raises(RuntimeError, match=r"can't run this call of layer_norm\n.*float64"):
            fused_lm.layer_norm(x, torch.ones(8, dtype=torch.float64))
        with pytest.raises(RuntimeError, match="backend 'cuda' can't run this call of attention"):
            fused_lm.attention(*[torch.zeros(1, 1, 2, 4)] * 3)
    monkeypatch.setattr(torch.version, "cuda", None)
    extension.forget()
    with fused_lm.use_backend("cuda"), pytest.raises(RuntimeError, match="is built without CUDA"):
        fused_lm.layer_norm(x)


def test_kernel_ids_are_those_of_what_a_gpu_runs(install: Callable[..., None]) -> None:
    ids = {}
    for capability in ((8, 0), (8, 6), (9, 0), (12, 0)):
        install(capability=capability)
        ids[capability] = records.kernel_id("layer_norm", "cuda", 0)
        assert records.kernel_id("rms_norm", "cuda", 0) == ids[capability]
    assert ids[8, 0] == ids[8, 6]
    assert len(set(ids.values())) == 3
    hopper = {name: {"sm_90": code["sm_90"]} for name, code in REPORT["kernels"].items()}
    install({**REPORT, "archs": ["90"], "kernels": hopper}, capability=(9, 0))
    assert records.kernel_id("layer_norm", "cuda", 0) == ids[9, 0], "other targets don't count"
    install({**REPORT, "host_code": {"layernorm_fwd": "fh", "layernorm_bwd": "other tuning"}})
    assert records.kernel_id("layer_norm", "cuda", 0) != ids[8, 0], "what launches it counts"
    install({**REPORT, "kernels": {"layernorm_fwd": REPORT["kernels"]["layernorm_fwd"]}})
    assert records.kernel_id("layer_norm", "cuda", 0) not in ids.values(), "an older build"


def test_a_failed_allocation_is_out_of_memory(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that who retries by type does, and verify takes it for no wrong kernel."""
    install()

    def failing(text: str) -> SimpleNamespace:
        def call(*arguments: Any) -> None:
            raise RuntimeError(text)

        return SimpleNamespace(default=call)

    texts = {
        "layer_norm_fwd": 'torch_call_dispatcher("aten::new_empty", "") API call failed at ops.h',
        "layer_norm_bwd": "x must be [N, C] with C >= 1",
    }
    stub = SimpleNamespace(**{f"cuda_{name}": failing(text) for name, text in texts.items()})
    monkeypatch.setattr(extension.torch.ops, "fused_lm", stub)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory for the results of layer_norm"):
        extension.op("layer_norm_fwd")(x)
    with pytest.raises(RuntimeError, match=r"x must be \[N, C\]"):
        extension.op("layer_norm_bwd")(x)


def test_doctor_shows_the_extension(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install()
    row = doctor._environment()["CUDA extension"]
    assert row == "CUDA 13.0, sm_80, sm_90, PTX of compute_80"
    install({"format": 1, "why": "nvcc was not found", "mend": "pip install nvcc"})
    monkeypatch.setattr(doctor, "_driver", lambda: "999.1")
    assert "nvcc was not found; mend: pip install nvcc" in str(
        doctor._environment()["CUDA extension"]
    )
    faults = {fault["what"]: fault["mend"] for fault in doctor._faults()}
    what = "the CUDA extension is not built: nvcc was not found"
    assert faults[what] == f"pip install nvcc && {extension.rebuild_command()}"
    install(schema_hash="0123456789abcdef")
    monkeypatch.setattr(doctor, "_driver", lambda: None)
    found = [fault["what"] for fault in doctor._faults()]
    assert "the CUDA extension was built for another version of this source" in found


def test_who_wants_equal_bits_gets_ordered_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, int]] = []
    monkeypatch.setattr(
        extension, "op", lambda name: lambda *arguments: called.append((name, arguments[-1]))
    )
    names = inspect.signature(cuda_attention.attention_backward).parameters
    for asked in (False, True):
        monkeypatch.setattr(
            torch, "are_deterministic_algorithms_enabled", lambda asked=asked: asked
        )
        cuda_attention.attention_backward(*names)  # type: ignore[arg-type]
    orders = (cuda_attention.IN_ANY_ORDER, cuda_attention.IN_ORDER)
    assert called == [("attention_bwd_sm90", order) for order in orders]
