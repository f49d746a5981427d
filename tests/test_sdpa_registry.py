"""When our kernels are behind torch's flash attention: torch's registry of implementations."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import attention as torch_attention

from fused_lm.integrations import sdpa

Current = Callable[[], str | None]
pytestmark = pytest.mark.skipif(
    not hasattr(torch_attention, "restore_flash_attention_impl"),
    reason="torch 2.10 can't say that none is active any more; a test below plays it",
)


def _has_kernels(key: str) -> bool:
    names = (f"aten::{op}" for op in (sdpa._FORWARD, sdpa._BACKWARD))
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for name in names)


TORCH_HAS_KERNELS = _has_kernels("CUDA")
"""Builds of torch for CPUs know the operators, and have no kernel for CUDA tensors."""


class Dummy:
    """Another implementation in torch's registry, which knows whether it is active."""

    def __init__(self) -> None:
        self.active = False
        torch_attention.register_flash_attention_impl("dummy", register_fn=self.install)

    def install(self) -> Dummy:
        self.active = True
        return self

    def remove(self) -> None:
        self.active = False


@pytest.fixture
def current() -> Iterator[Current]:
    """The active implementation's name; none is active before and after."""
    assert torch_attention.current_flash_attention_impl() is None
    yield torch_attention.current_flash_attention_impl
    sdpa.deactivate_sdpa()
    if torch_attention.current_flash_attention_impl() is not None:
        torch_attention.restore_flash_attention_impl()
    assert _has_kernels("CUDA") == TORCH_HAS_KERNELS


def test_activate_and_deactivate(current: Current) -> None:
    sdpa.deactivate_sdpa()
    sdpa.activate_sdpa()
    assert current() == "fused_lm" and _has_kernels("CUDA")
    installed = sdpa._installed
    sdpa.activate_sdpa()
    assert current() == "fused_lm" and sdpa._installed is installed
    sdpa.deactivate_sdpa()
    assert current() is None and _has_kernels("CUDA") == TORCH_HAS_KERNELS
    sdpa.deactivate_sdpa()
    sdpa.activate_sdpa()
    assert current() == "fused_lm" and _has_kernels("CUDA")


def test_contexts_restore_what_was_active(current: Current) -> None:
    dummy = Dummy()
    with sdpa.sdpa_activated():
        with sdpa.sdpa_activated():
            assert current() == "fused_lm"
        assert current() == "fused_lm" and _has_kernels("CUDA")
    assert current() is None
    torch_attention.activate_flash_attention_impl("dummy")
    with pytest.raises(ZeroDivisionError), sdpa.sdpa_activated():
        assert current() == "fused_lm" and not dummy.active
        _ = 1 // 0
    assert current() == "dummy" and dummy.active and _has_kernels("CUDA") == TORCH_HAS_KERNELS
    with sdpa.sdpa_activated():
        sdpa.deactivate_sdpa()
        assert current() is None
    assert current() == "dummy" and dummy.active
    torch_attention.restore_flash_attention_impl()
    with sdpa.sdpa_activated():
        torch_attention.activate_flash_attention_impl("dummy")
    assert current() is None and not dummy.active


def test_deactivate_leaves_another_implementation(current: Current) -> None:
    dummy = Dummy()
    sdpa.activate_sdpa()
    torch_attention.activate_flash_attention_impl("dummy")
    assert _has_kernels("CUDA") == TORCH_HAS_KERNELS
    sdpa.deactivate_sdpa()
    assert current() == "dummy" and dummy.active
    sdpa.activate_sdpa()
    assert current() == "fused_lm" and not dummy.active


def test_registry_that_can_not_restore(current: Current, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.10 has no ``restore_flash_attention_impl``, and doesn't activate a name twice."""
    names: list[str] = []
    registered: dict[str, Callable[[], Any]] = {}

    def activate(name: str) -> None:
        if names[-1:] != [name]:
            registered[name]()
            names.append(name)

    old = {
        "register_flash_attention_impl": lambda name, register_fn: registered.update(
            {name: register_fn}
        ),
        "activate_flash_attention_impl": activate,
        "current_flash_attention_impl": lambda: names[-1] if names else None,
    }
    with monkeypatch.context() as patch:
        patch.delattr(torch_attention, "restore_flash_attention_impl")
        for name, function in old.items():
            patch.setattr(torch_attention, name, function)
        for _ in range(2):
            with sdpa.sdpa_activated():
                assert _has_kernels("CUDA") and sdpa._current() == "fused_lm"
            assert _has_kernels("CUDA") == TORCH_HAS_KERNELS and sdpa._current() is None
        sdpa.activate_sdpa()
        other = Dummy()
        assert registered["dummy"] == other.install
        torch_attention.activate_flash_attention_impl("dummy")
        sdpa.activate_sdpa()
        first = sdpa._installed
        activate("dummy")
        sdpa.activate_sdpa()
        assert first is not None and first.forward is None
        activate("dummy")
        sdpa.deactivate_sdpa()
        assert other.active and _has_kernels("CUDA") == TORCH_HAS_KERNELS


SCRIPT = """
from torch.library import Library
from torch.nn import attention
import fused_lm
from fused_lm.integrations import sdpa
assert attention.current_flash_attention_impl() is None
assert "fused_lm" not in attention.list_flash_attention_impls()
before = Library("aten", "IMPL", "CPU")
before.impl(sdpa._FORWARD, lambda *args, **options: None)
sdpa._Overrides("CPU")
"""


def test_import_activates_nothing_and_no_warning_comes() -> None:
    """torch warns once in a process that an operator is overridden."""
    ran = subprocess.run(
        [sys.executable, "-W", "error:Warning only once", "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
