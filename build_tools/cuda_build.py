"""The build of ``fused_lm/_C.abi3.so``: which targets, by which commands, and what it reports.

Three variables steer it:

- ``FUSED_LM_CUDA_ARCHS="80;90;100;120"``: compute capabilities to compile for. Default: those of
  the GPUs that nvidia-smi lists, without a GPU all of the release.
- ``FUSED_LM_FORCE_CUDA=1``: what keeps the extension from being built is an error.
- ``FUSED_LM_SKIP_CUDA=1``: a pure Python install.

``fused_lm/_build.json`` says what was built, or why nothing was; ``fused-lm doctor`` reads it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build_tools import sass, sources, toolchain
from build_tools.toolchain import Missing, Toolchain

ROOT = Path(__file__).resolve().parents[1]
RELEASE_ARCHS = ("80", "90", "100", "120")
MINIMUM_ARCH = 80
REPORT = "_build.json"
FORMAT = 1
TORCH_TARGET = "0x020a000000000000"
"""torch 2.10: the oldest whose stable ABI this code speaks."""

DEVICE_FLAGS = ("-std=c++17", "-O3", "-Icsrc")
"""What reaches the machine code of kernels."""

COMPRESSION, COMPRESSED_SINCE = "--compress-mode=size", 13
"""A fourth of the default size. Drivers before CUDA 12.4 can't read it; those of 13 all can."""

LIMITED_API = "0x030A0000"
"""Python 3.10."""


def switched_on(name: str) -> bool:
    """Whether a variable is set, to anything but 0."""
    return os.environ.get(name, "0") not in ("", "0")


def chosen_archs(known: tuple[str, ...]) -> list[str]:
    """The targets: the user's, the GPUs', or the release's.

    Raises:
        Missing: A target that the kernels or the compiler don't have.
    """
    given = os.environ.get("FUSED_LM_CUDA_ARCHS", "")
    if given:
        archs = [arch.replace(".", "") for arch in re.split(r"[;,\s]+", given) if arch]
        for arch in archs:
            if not arch.isdigit() or int(arch) < MINIMUM_ARCH or arch not in known:
                have = ", ".join(a for a in known if a.isdigit() and int(a) >= MINIMUM_ARCH)
                raise Missing(
                    f"FUSED_LM_CUDA_ARCHS={given!r} names {arch!r}, this nvcc compiles for: {have}"
                )
    else:
        here = toolchain.gpu_archs()
        archs = [a for a in here if int(a) >= MINIMUM_ARCH and a in known]
        if not archs or len(archs) < len(here):
            archs = [arch for arch in RELEASE_ARCHS if arch in known]
    return sorted(set(archs), key=int)


@dataclass(frozen=True)
class Unit:
    """One kernel file and its targets; ``ptx`` is what GPUs without a cubin compile from."""

    source: Path
    archs: list[str]
    ptx: str | None

    @property
    def name(self) -> str:
        return self.source.stem

    @property
    def gencode(self) -> list[str]:
        made: dict[str, list[str]] = {}
        for arch in self.archs:
            made.setdefault(virtual_of(arch), []).append(f"sm_{arch}")
        if self.ptx is not None:
            made[self.ptx].append(f"compute_{self.ptx}")
        return [
            f"-gencode=arch=compute_{virtual},code=[{','.join(codes)}]"
            for virtual, codes in made.items()
        ]


def virtual_of(arch: str) -> str:
    """What PTX a target's machine code is made from. C++ to PTX takes longer than PTX to a GPU, and
    nvcc 13.0 writes two kinds of these kernels: one for 80 and 90, one for 100 and 120. Within a
    kind the machine code is the same.
    """
    if arch.endswith("a"):
        return arch
    return "80" if int(arch) < 100 else "100"


def hopper_alone(unit: str) -> bool:
    """Whether a unit's name, like ``attention_fwd_sm90_bf16``, says that it is for Hopper."""
    return "sm90" in unit.split("_")


def units_of(folder: Path, archs: list[str]) -> list[Unit]:
    """What is :func:`hopper_alone` is compiled for 90a, whose code no other GPU can run."""
    units = []
    for source in sorted(folder.glob("*.cu")):
        if hopper_alone(source.stem):
            if "90" in archs:
                units.append(Unit(source, ["90a"], None))
        else:
            units.append(Unit(source, archs, virtual_of(archs[0])))
    return units


def ninja_file(tools: Toolchain, units: list[Unit], folder: Path, target: Path, schema: str) -> str:
    """The build as text. Paths of sources are relative, so that no machine's are compiled in."""
    torch = tools.torch / "include"
    fpic = "-fPIC -fvisibility=hidden"
    cuda = f"-isystem {tools.toolkit.include}"
    lines = [
        f"ninja_required_version = 1.5\nbuilddir = {folder}",
        f"nvcc_flags = {' '.join(DEVICE_FLAGS)} -cudart static -Xcompiler {fpic.replace(' ', ',')}"
        + f" {COMPRESSION}" * (int(tools.toolkit.version.split(".")[0]) >= COMPRESSED_SINCE),
        f"cxx_flags = -std=c++17 -O2 -Wall {fpic} -Icsrc -isystem {torch} {cuda}"
        f" -DTORCH_TARGET_VERSION={TORCH_TARGET} -ffile-prefix-map={torch}=torch",
        f"c_flags = -O2 -Wall {fpic} -isystem {tools.python_include}"
        f' -DPy_LIMITED_API={LIMITED_API} -DFUSED_LM_SCHEMA_HASH=\\"{schema}\\"',
        # libtorch must be NEEDED although no symbol of it is: on a CUDA build of torch it brings
        # the stream getter into scope, on a CPU build it brings nothing, and both load.
        f"libraries = -Wl,--no-as-needed -L{tools.torch / 'lib'} -lc10 -ltorch_cpu -ltorch"
        f" -Wl,--as-needed -L{tools.toolkit.library} -lcudart_static -ldl -lrt -lpthread"
        " -Wl,--exclude-libs,ALL -s",
        _rule("nvcc", f"{tools.toolkit.nvcc} $nvcc_flags $gencode --keep --keep-dir $keep", True),
        _rule("cxx", f"{tools.cxx} $cxx_flags", True),
        _rule("cc", f"{tools.cc} $c_flags", True),
        f"rule link\n  command = {tools.cxx} -shared -o $out $in $libraries\n"
        "  description = link _C.abi3.so",
    ]
    objects = []
    for unit in units:
        objects.append(folder / f"{unit.name}.cu.o")
        lines.append(
            f"build {objects[-1]}: nvcc {unit.source.relative_to(ROOT)}\n"
            f"  gencode = {' '.join(unit.gencode)}\n  keep = {folder / unit.name}"
        )
    for source in sorted((ROOT / "csrc").glob("*.c*")):
        rule = "cc" if source.suffix == ".c" else "cxx"
        objects.append(folder / f"{source.name}.o")
        lines.append(f"build {objects[-1]}: {rule} {source.relative_to(ROOT)}")
    lines.append(f"build {target}: link {' '.join(map(str, objects))}\ndefault {target}\n")
    return "\n".join(lines)


def _rule(name: str, command: str, depfile: bool) -> str:
    depends = " -MD -MF $out.d" if depfile else ""
    return (
        f"rule {name}\n  command = {command}{depends} -c $in -o $out\n  depfile = $out.d\n"
        f"  deps = gcc\n  description = {name} $in"
    )


def build(tools: Toolchain, target: Path, folder: Path, schema: str) -> dict[str, Any]:
    """Compiles and links ``target``; returns the report.

    Raises:
        Missing: No kernels for the chosen targets, or the compiler failed.
    """
    archs = chosen_archs(tools.toolkit.archs)
    units = units_of(ROOT / "csrc/kernels", archs)
    if not units:
        raise Missing("csrc/kernels holds no kernel to compile")
    target, folder = target.resolve(), folder.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    for unit in units:  # of another build's targets nothing may stay
        if _gencode_changed(folder / unit.name, unit):
            (folder / f"{unit.name}.cu.o").unlink(missing_ok=True)
    (folder / "build.ninja").write_text(ninja_file(tools, units, folder, target, schema))
    jobs = toolchain.jobs()
    print(f"fused_lm: CUDA {tools.toolkit.version}, sm_{', sm_'.join(archs)}, {jobs} jobs")
    command = [tools.ninja, "-f", str(folder / "build.ninja"), "-j", str(jobs)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(done.stdout.decode(errors="replace"), flush=True)
    if done.returncode:
        raise Missing("the compiler failed, see its output above")
    return {
        "format": FORMAT,
        "toolkit": tools.toolkit.version,
        "torch_headers": tools.torch_version,
        "archs": archs,
        "ptx": virtual_of(archs[0]),
        "schema_hash": schema,
        "kernels": {u.name: sass.hashes_of(folder / u.name, u.archs, u.ptx) for u in units},
        "host_code": {u.name: host_code_of(u.name) for u in units},
    }


def host_code_of(unit: str) -> str:
    """Hash of what chooses and launches a unit's kernels: its tuning is no part of a cubin, but of
    what a record speaks for. Of its own source, its operator's torch side and what they include;
    of ``ptx/``, which is machine code, the launch alone. Comments and layout don't count, nor does
    ``device.cpp``, which asks the driver.
    """
    csrc = ROOT / "csrc"
    operator = _operator_of(unit)
    sides = [path for path in csrc.glob("*.cpp") if _operator_of(path.stem) == operator]
    seen = sources.code_of(
        [csrc / f"kernels/{unit}.cu", *sides],
        lambda text: re.sub(r"//[^\n]*", "", text),
        lambda path: path.parent.name == "ptx" and path.name != "launch.h",
        csrc,
    )
    digest = hashlib.sha256()
    for path in sorted(seen):
        digest.update(seen[path].encode())
    return digest.hexdigest()[:16]


def _operator_of(name: str) -> str:
    """``attention_decode`` of ``attention_decode_sm80_bf16``: the longest beginning that has an
    ``_ops.h`` of its own, or else the first word.
    """
    own = (path.name.removesuffix("_ops.h") for path in (ROOT / "csrc").glob("*_ops.h"))
    found = [operator for operator in own if f"{name}_".startswith(f"{operator}_")]
    return max(found, key=len, default=name.split("_")[0])


def _gencode_changed(keep: Path, unit: Unit) -> bool:
    """Starts an empty folder for what nvcc keeps, unless its targets are those of this build."""
    stamp, flags = keep / "gencode", " ".join(unit.gencode)
    if stamp.is_file() and stamp.read_text() == flags:
        return False
    shutil.rmtree(keep, ignore_errors=True)
    keep.mkdir(parents=True)
    stamp.write_text(flags)
    return True


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """What was built, or ``{"format", "why", "mend"}``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")


def failure(error: Missing) -> dict[str, Any]:
    """The report of an install without the extension."""
    return {"format": FORMAT, "why": str(error), "mend": error.mend}
