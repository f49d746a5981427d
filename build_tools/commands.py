"""setuptools' side of the build: when the extension is built, and what an install without it is."""

from __future__ import annotations

import functools
import runpy
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

from build_tools import cuda_build, toolchain
from build_tools.toolchain import Missing, Toolchain

NAME = "fused_lm._C"
BENCHMARKS = (
    *("__init__", "attention", "attention_peers", "block", "command", "contest", "diary", "energy"),
    *("ffn", "harness", "layernorm", "loss", "passes", "plots", "record", "roofs", "train"),
)
"""Of benchmarks/, what an install holds as fused_lm.benchmarks, for ``fused-lm bench``."""


@functools.cache
def found() -> Toolchain | Missing:
    """The toolchain, or why there is none; decides whether the wheel is pure Python."""
    if cuda_build.switched_on("FUSED_LM_SKIP_CUDA"):
        return Missing("FUSED_LM_SKIP_CUDA was set at the install")
    try:
        return toolchain.find()
    except Missing as error:
        return error


def setup_options() -> dict[str, Any]:
    """What ``setup()`` is told: an extension only where one can be built."""
    commands = {"build_ext": BuildExtension, "build_py": BuildPython}
    if isinstance(found(), Missing):
        return {"cmdclass": commands}
    return {
        "cmdclass": commands,
        "ext_modules": [Extension(NAME, sources=[], py_limited_api=True)],
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def schema_hash() -> str:
    """``SCHEMA_HASH`` of fused_lm/ops/schemas.py, which needs torch only to define what it lists;
    a build has no torch to import.
    """
    with mock.patch.dict(sys.modules, torch=mock.MagicMock()):
        return runpy.run_path(str(cuda_build.ROOT / "fused_lm/ops/schemas.py"))["SCHEMA_HASH"]


class BuildPython(build_py):
    """Adds the races, and the report to an install without the extension."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "fused_lm/benchmarks")
            self.mkpath(str(target))
            for name in BENCHMARKS:
                self.copy_file(str(cuda_build.ROOT / f"benchmarks/{name}.py"), str(target))
        reason = found()
        if isinstance(reason, Missing):
            folder = Path("fused_lm" if self.editable_mode else f"{self.build_lib}/fused_lm")
            # An editable install that skips the build leaves what another one built.
            if not self.editable_mode or not list(folder.glob("_C.*")):
                _give_up(folder, reason)


class BuildExtension(build_ext):
    """Builds by ninja what setuptools would build with one compiler and no nvcc."""

    def run(self) -> None:
        tools = found()
        target = Path(self.get_ext_fullpath(NAME))
        if isinstance(tools, Missing):
            return
        # Who works on the kernels installs in place again and again, and compiles what changed.
        folder = cuda_build.ROOT / "build/csrc" if self.inplace else Path(self.build_temp) / "csrc"
        try:
            report = cuda_build.build(tools, target, folder, schema_hash())
        except Missing as error:
            target.unlink(missing_ok=True)
            _give_up(target.parent, error)
        else:
            cuda_build.write_report(target.parent, report)

    def get_outputs(self) -> list[str]:
        target = Path(self.get_ext_fullpath(NAME))
        return [str(target), str(target.parent / cuda_build.REPORT)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def _give_up(folder: Path, reason: Missing) -> None:
    skipped = cuda_build.switched_on("FUSED_LM_SKIP_CUDA")
    if cuda_build.switched_on("FUSED_LM_FORCE_CUDA") and not skipped:
        mend = f" Mend: {reason.mend}" if reason.mend else ""
        raise SystemExit(f"fused_lm: FUSED_LM_FORCE_CUDA=1, but {reason}.{mend}")
    cuda_build.write_report(folder, cuda_build.failure(reason))
    print(f"fused_lm: installed without its CUDA kernels, because {reason}", file=sys.stderr)
