"""What a cubin holds besides instructions, and how to read those: names, launch bounds, SASS.

NVIDIA's binary tools are not in the compiler's wheel. Names are demangled by the C++ runtime, the
attributes are read from the ELF sections, and cuobjdump is Triton's where the toolkit has none.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from build_tools import sass
from build_tools.toolchain import Toolkit

_INFO = ".nv.info."
_MAX_THREADS, _REQUIRED_THREADS, _INDIRECT_BRANCHES = 0x05, 0x10, 0x34
_SIZED = 4
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_FUNCTION = re.compile(r"^\s+Function : (\S+)")


@dataclass
class Attributes:
    """Of one kernel.

    Attributes:
        max_threads: Of a block, from ``__launch_bounds__``; None without them.
        branch_targets: Of each indirect branch (a jump table), by its address.
    """

    max_threads: int | None = None
    branch_targets: dict[int, tuple[int, ...]] = field(default_factory=dict)


def attributes_of(cubin: bytes) -> dict[str, Attributes]:
    """By the kernels' mangled names."""
    found = {}
    for name, content in sass.sections_of(cubin):
        if name.startswith(_INFO):
            found[name.removeprefix(_INFO)] = _attributes(content)
    return found


def _attributes(content: bytes) -> Attributes:
    found = Attributes()
    at = 0
    while at < len(content):
        kind, attribute, size = struct.unpack_from("<BBH", content, at)
        at += 4
        if kind != _SIZED:
            continue
        words = struct.unpack_from(f"<{size // 4}I", content, at)
        at += size
        if attribute in (_MAX_THREADS, _REQUIRED_THREADS):
            found.max_threads = words[0] * words[1] * words[2]
        elif attribute == _INDIRECT_BRANCHES:
            while words:
                targets = words[3 : 3 + words[2]]
                found.branch_targets[words[0]] = targets
                words = words[3 + words[2] :]
    return found


def find_cuobjdump(toolkit: Toolkit) -> Path | None:
    """The toolkit's, or the one in Triton's wheel."""
    folders = [toolkit.root / "bin", toolkit.nvcc.parent]
    triton = importlib.util.find_spec("triton")
    if triton is not None:
        folders += [
            Path(place) / "backends/nvidia/bin" for place in triton.submodule_search_locations or ()
        ]
    paths = (folder / "cuobjdump" for folder in folders)
    return next((path for path in paths if path.is_file()), None)


def disassemble(cuobjdump: Path, cubin: Path) -> dict[str, list[str]]:
    """Instructions by mangled name of the kernel, each as ``"0040 @P0 EXIT"``."""
    done = subprocess.run(
        [str(cuobjdump), "-sass", str(cubin)], capture_output=True, text=True, check=True
    )
    functions: dict[str, list[str]] = {}
    current: list[str] = []
    for line in done.stdout.splitlines():
        instruction = _INSTRUCTION.match(line)
        if instruction:
            current.append(f"{instruction[1]} {instruction[2]}")
        elif function := _FUNCTION.match(line):
            current = functions.setdefault(function[1], [])
    return functions


def demangle(symbol: str) -> str:
    """What c++filt says, by the function that it calls."""
    runtime = ctypes.CDLL("libstdc++.so.6")
    runtime.__cxa_demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    text = runtime.__cxa_demangle(symbol.encode(), None, None, ctypes.byref(status))
    if not text:
        return symbol
    try:
        return ctypes.string_at(text).decode()
    finally:
        runtime.free(ctypes.c_void_p(text))


def short_name(symbol: str) -> str:
    """Demangled, without this project's namespaces, the return type and the parameters."""
    name = re.sub(r"fused_lm::|\(anonymous namespace\)::", "", demangle(symbol))
    name = name.removeprefix("void ")
    if name.endswith(")"):
        depth = 0
        for at in range(len(name) - 1, -1, -1):
            depth += (name[at] == ")") - (name[at] == "(")
            if depth == 0:
                return name[:at]
    return name
