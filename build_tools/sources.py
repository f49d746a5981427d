"""What a C++ file is made of: its own code and that of everything it includes from csrc, without
comments and layout. What can't change a result of the compiler doesn't change this.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc"
_TEXT_OR_COMMENT = re.compile(r'("(?:\\.|[^"\\\n])*")|//[^\n]*')


def code_hash(source: Path) -> str:
    """Of a source with what it includes."""
    code = code_of([source], lambda text: _TEXT_OR_COMMENT.sub(lambda m: m[1] or "", text))
    digest = hashlib.sha256()
    for path in sorted(code):
        digest.update(code[path].encode())
    return digest.hexdigest()[:16]


def code_of(
    files: Iterable[Path],
    without_comments: Callable[[str], str],
    passes_over: Callable[[Path], bool] = lambda path: False,
    csrc: Path = CSRC,
) -> dict[Path, str]:
    """The code of files, and of what they include and so on but ``passes_over`` refuses, in one
    line each.
    """
    waiting = list(files)
    found: dict[Path, str] = {}
    while waiting:
        path = waiting.pop()
        if path in found or passes_over(path):
            continue
        code = without_comments(path.read_text())
        found[path] = " ".join(code.split())
        named = (csrc / name for name in re.findall(r'#include "([^"]+)"', code))
        waiting += [header for header in named if header.is_file()]
    return found
