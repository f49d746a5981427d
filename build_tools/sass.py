"""The identity of a compiled kernel: a hash of its machine code.

Only instructions count. Names don't: those of an unnamed namespace hold a hash of the file's path,
so two builds of one source would differ.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterator
from pathlib import Path

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_NO_BITS = 8  # a section without contents
_PATH_HASH = re.compile(rb"(_GLOBAL__N__|_INTERNAL_)[0-9a-f]{8}")


def sections_of(cubin: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and contents of an ELF file's sections.

    Raises:
        ValueError: It is none.
    """
    header = _HEADER.unpack_from(cubin)
    if header[0][:5] != b"\x7fELF\x02":
        raise ValueError("not a 64-bit ELF file")
    offset, entry, count, names_at = header[6], header[11], header[12], header[13]
    sections = [_SECTION.unpack_from(cubin, offset + i * entry) for i in range(count)]
    names = sections[names_at][4]
    for section in sections:
        start = names + section[0]
        name = cubin[start : cubin.index(b"\0", start)].decode()
        size = 0 if section[1] == _NO_BITS else section[5]
        yield name, cubin[section[4] : section[4] + size]


def hash_of_cubin(cubin: bytes) -> str:
    """Of all its functions' instructions, in whatever order the linker left them."""
    code = [content for name, content in sections_of(cubin) if name.startswith(".text.")]
    functions = sorted(hashlib.sha256(content).digest() for content in code)
    return hashlib.sha256(b"".join(functions)).hexdigest()[:16]


def hash_of_ptx(ptx: bytes) -> str:
    """Of the text without comments, which name the compiler's build."""
    code = re.sub(rb"//[^\n]*", b"", _PATH_HASH.sub(rb"\1", ptx))
    return hashlib.sha256(code).hexdigest()[:16]


def hashes_of(folder: Path, archs: list[str], ptx: str | None) -> dict[str, str]:
    """``{"sm_80": ..., "compute_80": ...}`` of what nvcc kept of one source file.

    nvcc names files by the target only where there are several.
    """
    found = {}
    for path in sorted(folder.glob("*.cubin")):
        named = re.search(r"(?:sm|compute)_(\d+[af]?)\.cubin$", path.name)
        found["sm_" + (named[1] if named else archs[0])] = hash_of_cubin(path.read_bytes())
    if sorted(found) != sorted(f"sm_{arch}" for arch in archs):
        raise ValueError(f"{folder} holds {sorted(found)}, expected cubins for {archs}")
    if ptx is not None:
        named_ptx = sorted(folder.glob(f"*compute_{ptx}.ptx")) or sorted(folder.glob("*.ptx"))
        found[f"compute_{ptx}"] = hash_of_ptx(named_ptx[0].read_bytes())
    return found
