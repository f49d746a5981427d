"""``fused_lm._C``: whether it is there, whether it fits, and what to run where it doesn't.

Nothing here happens at ``import fused_lm``: the extension is loaded when dispatch first asks about
a tensor on a GPU, or doctor asks.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fused_lm.ops.schemas import SCHEMA_HASH

_PACKAGE = Path(__file__).parents[1]
_REPORT = _PACKAGE / "_build.json"


@functools.cache
def build_report() -> dict[str, Any]:
    """What the install wrote: ``toolkit``, ``archs``, ``ptx`` and ``kernels``, or ``why`` there is
    no extension and what to run first (``mend``).
    """
    try:
        return json.loads(_REPORT.read_text())
    except (OSError, ValueError):
        return {"why": "this is a source tree that was never installed", "mend": ""}


def rebuild_command() -> str:
    """What builds the extension, in an editable install or in the folder of the source."""
    source = _PACKAGE.parent
    editable = (source / "setup.py").is_file() and (source / "csrc").is_dir()
    what = f"-e {source}" if editable else "."
    return f"FUSED_LM_FORCE_CUDA=1 pip install --force-reinstall --no-deps {what}"


def mending_command() -> str:
    """What to install and then to run so that the extension is there."""
    first = build_report().get("mend")
    return f"{first} && {rebuild_command()}" if first else rebuild_command()


_ALLOCATES = ("new_empty", "new_zeros", "contiguous")


@functools.cache
def _load() -> ModuleType | str:
    """The extension, or one sentence that says why there is none."""
    why = build_report().get("why")
    if why is not None:
        return f"the CUDA extension is not built: {why}; mend: {mending_command()}"
    try:
        module = importlib.import_module("fused_lm._C")
    except ImportError as error:
        reason = str(error).split("\n")[0]
        return f"the CUDA extension can't be loaded ({reason}); mend: {mending_command()}"
    if module.schema_hash != SCHEMA_HASH:
        return (
            "the CUDA extension was built for another version of this source; "
            f"mend: {mending_command()}"
        )
    return module


def why_not() -> str | None:
    """None if the extension is there and fits this source, else why not and what mends it."""
    found = _load()
    return found if isinstance(found, str) else None


def refusal(t: Tensor) -> str | None:
    """Why no CUDA kernel can run on the device of ``t``, None if one can."""
    return refusal_on(t.device.type, t.device.index)


def refusal_on(kind: str, index: int | None) -> str | None:
    """The same without a tensor, which would bring a context to a GPU."""
    return _cached_refusal(kind, index)


# torch.compile takes the answer as a constant.
refusal_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_hopper(t: Tensor) -> bool:
    """Whether the GPU of ``t`` runs what is built for sm_90a."""
    index = t.device.index
    return _runs_sm90(torch.cuda.current_device() if index is None else index)


def _runs_sm90(index: int) -> bool:
    return _target_of(index) == "sm_90"


# torch.compile takes the answer as a constant.
_runs_sm90._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _target_of(index: int) -> str | None:
    return target_for(torch.cuda.get_device_capability(index))


@functools.cache
def _cached_refusal(kind: str, index: int | None) -> str | None:
    if torch.version.hip is not None:
        return "the CUDA kernels run on NVIDIA GPUs, this torch is built for ROCm"
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is built without CUDA; "
            "mend: pip install --force-reinstall torch"
        )
    if kind != "cuda":
        return f"the CUDA kernels run on NVIDIA GPUs, got a {kind} tensor"
    found = _load()
    if isinstance(found, str):
        return found
    capability = torch.cuda.get_device_capability(index)
    target = target_for(capability)
    if target is None:
        cubins = ", ".join(f"sm_{arch}" for arch in build_report()["archs"])
        return (
            f"the CUDA extension was built for {cubins}, this GPU is sm_{_joined(capability)}; "
            f"mend: FUSED_LM_CUDA_ARCHS={_joined(capability)} {rebuild_command()}"
        )
    return _driver_refusal(found.driver_version(), target)


def _driver_refusal(version: int, target: str) -> str | None:
    """Cubins run on any driver of the toolkit's major version; PTX needs the minor version too."""
    toolkit = build_report()["toolkit"]
    if version == 0:
        return "no NVIDIA driver is installed"
    major, minor = (int(part) for part in toolkit.split("."))
    driver = version // 1000, version % 1000 // 10
    if driver[0] > major or (driver[0] == major and (driver[1] >= minor or "sm_" in target)):
        return None
    return (
        f"the NVIDIA driver speaks CUDA {driver[0]}.{driver[1]}, the extension was built with "
        f"CUDA {toolkit}: update the driver, or rebuild with a CUDA {driver[0]} toolkit"
    )


def target_for(capability: tuple[int, int]) -> str | None:
    """The code that a GPU runs, like ``"sm_80"``, or ``"compute_80"`` which the driver compiles.

    A cubin runs on its own major version from its minor version on, PTX on everything newer.
    """
    report = build_report()
    same = [a for a in report["archs"] if int(a) // 10 == capability[0]]
    cubins = [a for a in same if int(a) % 10 <= capability[1]]
    if cubins:
        return f"sm_{max(cubins, key=int)}"
    ptx = report.get("ptx")
    if ptx is not None and int(ptx) <= int(_joined(capability)):
        return f"compute_{ptx}"
    return None


def _joined(capability: tuple[int, int]) -> str:
    return f"{capability[0]}{capability[1]}"


def kernel_hashes(units: tuple[str, ...], capability: tuple[int, int] | None) -> list[str]:
    """Hashes of the code that a GPU runs, or of all targets' where there is no GPU, and of what
    chooses and launches it; empty without an extension.
    """
    report = build_report()
    if "kernels" not in report:
        return []
    target = None if capability is None else target_for(capability)
    found = []
    for unit in units:  # an older build may not have it
        found += code_hashes(report["kernels"].get(unit, {}), target)
        found.append(report.get("host_code", {}).get(unit, ""))
    return found


def code_hashes(hashes: dict[str, str], target: str | None) -> list[str]:
    """Of one unit's ``{"sm_80": hash, ...}`` those of what a GPU runs: code for the target, or for
    it alone ("sm_90a"), or else what the driver may compile; of everything without a target.
    """
    if target is None:
        return [hashes[name] for name in sorted(hashes)]
    exact = [hashes[name] for name in (target, f"{target}a") if name in hashes]
    return exact or [hashes[name] for name in sorted(hashes) if not name.endswith("a")]


@functools.cache
def op(name: str) -> Callable[..., Any]:
    """``torch.ops.fused_lm.cuda_<name>`` with its implementation loaded.

    Raises:
        RuntimeError: There is no extension, with what mends it.
    """
    why = why_not()
    if why is not None:
        raise RuntimeError(why)
    function = getattr(torch.ops.fused_lm, f"cuda_{name}").default

    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # The stable ABI of torch 2.10 says only which call failed, and users retry by type.
            if any(f"aten::{allocates}" in str(error) for allocates in _ALLOCATES):
                message = f"CUDA out of memory for the results of {name}"
                raise torch.OutOfMemoryError(message) from error
            raise

    return call


def forget() -> None:
    """Drops what was found, so that the next question looks again."""
    for cached in (build_report, _load, _cached_refusal, op):
        cached.cache_clear()
