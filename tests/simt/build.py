"""Builds the harness with the project's CUDA sources by g++: once per build and content.

``python -m tests.simt.build`` builds all three. Results lie under ``build/simt``, named by the hash
of what they are made of, so an unchanged tree builds nothing and an edited kernel itself only.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OUTPUT = ROOT / "build" / "simt"
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
KEPT = 6
"""Builds of one kind that stay on disk."""


@dataclass(frozen=True)
class Build:
    """One way to compile: ``kernel`` flags for what nvcc compiles too, ``host`` for the rest."""

    name: str
    kernel: str
    host: str
    link: str = ""


BUILDS = {
    build.name: build
    for build in (
        Build("plain", "-O1", "-O2"),
        Build(
            "asan",
            "-O0 -fsanitize=address,undefined -fno-sanitize=alignment,vptr "
            "-fno-sanitize-recover=undefined -fno-omit-frame-pointer",
            "-O1 -fsanitize=address -fno-omit-frame-pointer",
            "-fsanitize=address,undefined",
        ),
        # Without -fno-tree-sra g++ takes a 16-byte access for four of 4 bytes.
        Build(
            "race",
            "-O1 -fno-tree-sra -fsanitize=thread -DSIMT_RACE "
            "-fno-builtin-memcpy -fno-builtin-memmove -fno-builtin-memset -DSIMT_REDIRECT",
            "-O2 -DSIMT_RACE",
        ),
    )
}
PREFIXES = {"kernel": "harness/prefix.h", "harness": "harness/state.h", "csrc": "heads.h"}
"""What a kind's sources include first, compiled once: half of the time of a small one. Of host code
the kind is its folder.
"""
COMMON = (
    "-std=c++20 -g1 -fPIC -fvisibility=hidden -fno-gnu-unique -ffp-contract=off -Wall -Wextra "
    "-Wno-unused-parameter -Wno-unknown-pragmas -Wno-psabi -Wno-attributes -Wno-class-memaccess"
)


def unavailable() -> str | None:
    """Why the harness can't be built here, None if it can."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return "the harness switches fibers in x86-64 assembly on Linux"
    if shutil.which("g++") is None:
        return "g++ is not installed"
    if importlib.util.find_spec("pybind11") is None or importlib.util.find_spec("ninja") is None:
        return "pybind11 and ninja are not installed: pip install -e '.[test]'"
    if cuda_include() is None:
        return "CUDA's headers are not installed: pip install -e '.[test]'"
    return None


@functools.cache
def cuda_include() -> Path | None:
    """CUDA's headers: those of the wheels, or of the toolkit whose nvcc is on PATH."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        for include in sorted(Path(folder).glob("cu*/include")):
            if (include / "cuda_bf16.h").is_file() and (include / "vector_types.h").is_file():
                return include
    if shutil.which("nvcc") is None:
        return None
    asked = subprocess.run(
        ["nvcc", "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True, check=False
    )
    found = re.search(r'INCLUDES="-I([^"\s]+)"', asked.stderr)
    return Path(found[1]).resolve() if found else None


def kernel_sources() -> list[Path]:
    """What nvcc compiles, and the planted mistakes."""
    return sorted((ROOT / "csrc/kernels").glob("*.cu")) + sorted((HERE / "planted").glob("*.cu"))


def host_sources() -> list[Path]:
    """Harness, its Python face, and the torch side of every operator."""
    product = [p for p in (ROOT / "csrc").glob("*.cpp") if p.stem not in ("bindings", "device")]
    harness = [*(HERE / "harness").glob("*.cpp"), *(HERE / "host").glob("*.cpp")]
    return sorted(product) + sorted(harness)


def build(name: str, scratch: Path | None = None) -> Path:
    """The extension module of a build, made now if it isn't there; with one more file of kernels if
    ``scratch`` is given.

    Raises:
        RuntimeError: The compiler's words.
    """
    folder = OUTPUT / name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if scratch is not None:
            target = folder / "scratch" / f"{module_name(name)}.so"
            _run_ninja(BUILDS[name], folder, target, scratch)
            return target
        target = folder / f"{module_name(name)}.{_content_hash(name)}.so"
        if not target.is_file():
            _run_ninja(BUILDS[name], folder, target)
            _remove_old(folder, target)
        return target


def module_name(name: str) -> str:
    return f"simt_{name}"


def _content_hash(name: str) -> str:
    digest = hashlib.sha256(repr((BUILDS[name], COMMON, torch.__version__)).encode())
    digest.update(f"{cuda_include()} {sys.version} {_compiler()}".encode())
    for path in _inputs():
        digest.update(f"{path.relative_to(ROOT)} ".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _inputs() -> Iterator[Path]:
    for folder in (ROOT / "csrc", HERE):
        yield from sorted(p for p in folder.rglob("*") if p.suffix in (".h", ".cpp", ".cu"))


@functools.cache
def _compiler() -> str:
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout


def _run_ninja(build: Build, folder: Path, target: Path, scratch: Path | None = None) -> None:
    extra = [] if scratch is None else [scratch]
    for of, header in PREFIXES.items():
        _write_if_other(folder / f"{of}.h", f'#include "{header}"\n')
    (folder / "build.ninja").write_text(
        _ninja_file(build, str(target.relative_to(folder)), kernel_sources() + extra)
    )
    done = subprocess.run(
        [sys.executable, "-m", "ninja", "-C", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"simt {build.name} build failed:\n{done.stdout}{done.stderr}")


def _write_if_other(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def _ninja_file(build: Build, target: str, kernels: list[Path]) -> str:
    import pybind11

    torch_root = Path(torch.__file__).parent
    includes = [
        *(HERE, ROOT / "csrc"),
        *(pybind11.get_include(), sysconfig.get_path("include")),
    ]
    system = [cuda_include(), torch_root / "include"]
    flags = " ".join(
        [
            COMMON,
            TORCH_TARGET,
            f"-DSIMT_LIBRARY={module_name(build.name)}",
            *(f"-I{path}" for path in includes),
            *(f"-isystem {path}" for path in system),
        ]
    )
    lines = [
        f"flags = {flags}",
        "rule compile",
        "  command = g++ $flags $kind -MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule prefix",
        "  command = g++ $flags $kind -MMD -MF $out.d -x c++-header $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = g++ -shared -Wl,-Bsymbolic {build.link} $in -o $out -L{torch_root}/lib"
        " -Wl,--no-as-needed -lc10 -ltorch_cpu -ltorch -ldl",
    ]
    for name in PREFIXES:
        kind = build.kernel if name == "kernel" else build.host
        lines += [f"build {name}.h.gch: prefix {name}.h", f"  kind = {kind}"]
    objects = []
    for sources, kind in ((kernels, build.kernel), (host_sources(), build.host)):
        for source in sources:
            inside = source.relative_to(ROOT) if source.is_relative_to(ROOT) else source
            objects.append(str(inside).replace("/", "_") + ".o")
            of = "kernel" if sources is kernels else source.parent.name
            given = f" | {of}.h.gch" if of in PREFIXES else ""
            kind_here = f"{kind} -include {of}.h" if given else kind
            # torch's allocator interface is no part of its stable ABI
            kind_here += " -UTORCH_TARGET_VERSION -O1" if source.stem == "module" else ""
            lines += [f"build {objects[-1]}: compile {source}{given}", f"  kind = {kind_here}"]
    lines.append(f"build {target}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def _remove_old(folder: Path, newest: Path) -> None:
    found = sorted(folder.glob("*.so"), key=lambda path: path.stat().st_mtime)
    for path in found[:-KEPT]:
        if path != newest:
            path.unlink()


def main() -> None:
    """Builds everything and says how long it took."""
    problem = unavailable()
    if problem is not None:
        raise SystemExit(problem)
    for name in BUILDS:
        begin = time.perf_counter()
        print(f"{name}: {build(name)} ({time.perf_counter() - begin:.1f} s)")


if __name__ == "__main__":
    main()
