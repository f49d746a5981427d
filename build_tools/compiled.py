"""Every kernel compiled for every architecture, and what the compiler says about the result.

No GPU is needed: ptxas prints registers, shared memory, spills and what it thinks costs speed, the
cubin holds the launch bounds, cuobjdump shows the instructions. A result stays in build/compiled/
under a hash of what it follows from: the code of the source and of what it includes, the flags,
nvcc's version.

The size of dynamic shared memory is known where ``dynamic_smem`` (csrc/ptx/launch.h) leaves the
comment ``// fused_lm_shared_bytes N`` in the PTX, or where a kernel uses none.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from build_tools import cubin, sources, toolchain
from build_tools.cuda_build import DEVICE_FLAGS, RELEASE_ARCHS, ROOT, units_of, virtual_of
from build_tools.toolchain import Toolkit

KERNELS = ROOT / "csrc/kernels"
CACHE = ROOT / "build/compiled"
_REPORTS = ("-Xptxas", "-v,-warn-spills,-warn-lmem-usage")
_LOCAL = re.compile(r"(?:LDL|STL)\b")
_SHARED = re.compile(r"(?:LDS|STS|LDSM|STSM|LDGSTS|ATOMS|SYNCS|U?BLKCP|UTMA\w+)\b")
_EXPECTED = re.compile(
    r"ptxas info\s*: (?:\d+ bytes gmem|Compiling entry function|Function properties for|Used \d+ "
    r"registers|Compile time)|\s*\d+ bytes stack frame, "
)
_RESTATED = re.compile(r"Registers are spilled to local memory|Local memory used for function")
_MARKER = re.compile(r"\.entry (\w+)|// fused_lm_shared_bytes (\d+)")


class CompileError(Exception):
    """nvcc refused a source; holds what it printed."""


@dataclass
class Kernel:
    """One instantiation for one architecture.

    Attributes:
        static_shared: Bytes per block that ptxas knows of.
        dynamic_shared: Bytes that a launch asks for; None: some, but nobody says how many.
        max_threads: Of a block; None without ``__launch_bounds__``.
        sass: Instructions as ``"0040 @P0 EXIT"``; None where no cuobjdump is.
        branch_targets: Of indirect branches, by address.
    """

    name: str
    registers: int = 0
    stack_bytes: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    static_shared: int = 0
    dynamic_shared: int | None = None
    max_threads: int | None = None
    sass: list[str] | None = None
    branch_targets: dict[int, list[int]] | None = None

    @property
    def local_accesses(self) -> int:
        """Loads and stores of local memory among the instructions."""
        return sum(1 for line in self.sass or () if _LOCAL.match(opcode_of(line)))


@dataclass
class Compiled:
    """One source for one architecture; ``remarks`` is all that ptxas need not have said."""

    source: str
    arch: str
    kernels: list[Kernel]
    remarks: list[str]
    seconds: float


def opcode_of(line: str) -> str:
    """``LDG.E.128`` of ``0040 @!P0 LDG.E.128 R4, [R2.64]``."""
    parts = line.split(None, 3)
    return parts[2] if parts[1].startswith("@") else parts[1]


def targets(archs: tuple[str, ...] = RELEASE_ARCHS) -> list[tuple[Path, str]]:
    """Every kernel file with every architecture that it is compiled for."""
    units = units_of(KERNELS, list(archs))
    return [(unit.source, arch) for unit in units for arch in unit.archs]


def compiled(
    toolkit: Toolkit, source: Path, arch: str, cache: Path = CACHE, flags: tuple[str, ...] = ()
) -> Compiled:
    """Compiles, unless ``cache`` has the result.

    Raises:
        CompileError: nvcc's output.
    """
    cuobjdump = cubin.find_cuobjdump(toolkit)
    flags = (*DEVICE_FLAGS, *_REPORTS, *flags)
    parts: list[bytes | str] = [
        sources.code_hash(source),
        arch,
        virtual_of(arch),
        *flags,
        toolkit.release,
        str(cuobjdump is not None),
    ]
    for path in (Path(__file__), Path(cubin.__file__), Path(toolchain.__file__)):
        parts.append(path.read_bytes())
    key = _hash_of(parts)
    folder = cache / f"{source.stem}.sm_{arch}"
    path = folder / f"{key}.json"
    if path.is_file():
        return _loaded(path)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        result = _compile(toolkit, cuobjdump, source, arch, flags, Path(work))
        written = Path(work) / "result.json"
        written.write_text(json.dumps(asdict(result)))
        for old in folder.glob("*.json"):
            old.unlink(missing_ok=True)
        written.replace(path)
    return result


def _hash_of(parts: list[bytes | str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()[:20]


def _loaded(path: Path) -> Compiled:
    values = json.loads(path.read_text())
    kernels = [Kernel(**kernel) for kernel in values.pop("kernels")]
    for kernel in kernels:  # JSON's keys are strings
        found = kernel.branch_targets or {}
        kernel.branch_targets = {int(address): to for address, to in found.items()}
    return Compiled(kernels=kernels, **values)


def _compile(
    toolkit: Toolkit,
    cuobjdump: Path | None,
    source: Path,
    arch: str,
    flags: tuple[str, ...],
    work: Path,
) -> Compiled:
    start = time.perf_counter()
    target = work / "kernels.cubin"
    gencode = f"-gencode=arch=compute_{virtual_of(arch)},code=sm_{arch}"
    command = [str(toolkit.nvcc), *flags, gencode, "-cubin"]
    command += ["--keep", "--keep-dir", str(work), str(source), "-o", str(target)]
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise CompileError(f"{source.name} for sm_{arch}:\n{done.stdout[-4000:]}")
    kernels, remarks = parse_log(done.stdout)
    attributes = cubin.attributes_of(target.read_bytes())
    instructions = cubin.disassemble(cuobjdump, target) if cuobjdump else {}
    dynamic = dynamic_shared_of("".join(path.read_text() for path in work.glob("*.ptx")))
    for symbol, kernel in kernels.items():
        kernel.max_threads = attributes[symbol].max_threads
        kernel.branch_targets = {k: list(v) for k, v in attributes[symbol].branch_targets.items()}
        kernel.sass = instructions[symbol] if cuobjdump else None
        kernel.dynamic_shared = dynamic.get(symbol)
        if symbol not in dynamic and kernel.sass is not None:
            uses_shared = any(_SHARED.match(opcode_of(line)) for line in kernel.sass)
            kernel.dynamic_shared = None if uses_shared and not kernel.static_shared else 0
    seconds = round(time.perf_counter() - start, 2)
    listed = sorted(kernels.values(), key=lambda kernel: kernel.name)
    return Compiled(source.stem, arch, listed, remarks, seconds)


def parse_log(text: str) -> tuple[dict[str, Kernel], list[str]]:
    """Kernels by mangled name, and every line that is no part of the usual report.

    What is expected is listed, not what is suspect: a remark that a later ptxas invents is one.
    """
    kernels: dict[str, Kernel] = {}
    remarks = []
    entry = function = ""
    for line in text.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            entry = found[1]
            kernels[entry] = Kernel(cubin.short_name(entry))
        elif found := re.search(r"Function properties for (\w+)", line):
            function = found[1]
        elif found := re.match(
            r"\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            # A function that was not inlined counts for the kernel that ptxas is at.
            kernel = kernels.get(function) or kernels.setdefault(entry, Kernel(entry))
            kernel.stack_bytes += int(found[1])
            kernel.spill_stores += int(found[2])
            kernel.spill_loads += int(found[3])
        elif found := re.search(r"Used (\d+) registers", line):
            kernels[entry].registers = int(found[1])
            shared = re.search(r"(\d+) bytes smem", line)
            kernels[entry].static_shared = int(shared[1]) if shared else 0
        if line.strip() and not _EXPECTED.match(line):
            remarks.append(re.sub(r"\b_Z\w+", lambda m: cubin.short_name(m[0]), line.strip()))
    return kernels, remarks


def dynamic_shared_of(ptx: str) -> dict[str, int]:
    """Bytes by mangled name, of the kernels that say so; the most of several structures."""
    found: dict[str, int] = {}
    entry = ""
    for match in _MARKER.finditer(ptx):
        if match[1]:
            entry = match[1]
        else:
            found[entry] = max(found.get(entry, 0), int(match[2]))
    return found


def problems_of(result: Compiled) -> list[str]:
    """What the gate refuses whatever the golden file says: local memory, and any remark."""
    place = f"{result.source} sm_{result.arch}"
    found = [] if result.kernels else [f"{place}: no kernel"]
    for kernel in result.kernels:
        spilled = kernel.spill_stores + kernel.spill_loads
        if spilled or kernel.stack_bytes or kernel.local_accesses:
            found.append(
                f"{place} {kernel.name}: {kernel.registers} registers, {kernel.spill_stores} bytes "
                f"of spill stores, {kernel.spill_loads} of spill loads, {kernel.stack_bytes} of "
                f"stack, {kernel.local_accesses} LDL and STL"
            )
    # Of local memory the numbers above speak.
    found += [f"{place}: {line}" for line in result.remarks if not _RESTATED.search(line)]
    return found


def golden_of(result: Compiled) -> dict[str, str]:
    """One line per kernel, of what a change must not move unseen."""
    lines = {}
    for kernel in result.kernels:
        shared = "unknown" if kernel.dynamic_shared is None else kernel.dynamic_shared
        lines[f"sm_{result.arch} {result.source} {kernel.name}"] = (
            f"registers={kernel.registers} static_shared={kernel.static_shared} "
            f"dynamic_shared={shared}"
        )
    return lines
