"""The limits of the house: sizes of files, functions and lines, and what a comment may not be."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE_LINES, FUNCTION_LINES, KERNEL_LINES, COLUMNS = 450, 60, 120, 100
CODE = (".py", ".cu", ".cuh", ".h", ".hpp", ".cpp")
TEXT = (*CODE, ".toml", ".yaml", ".sh")
BANNED = {
    "a TODO without a condition": re.compile(r"\b(TODO|FIXME|XXX)\b(?!\(when )"),
    "a banner": re.compile(r"^\s*(#|//)\s*[-=*#]{5,}"),
    "an import of everything": re.compile(r"^\s*from \S+ import \*"),
    "an author tag": re.compile(r"@author|\bAuthor:"),
}


def _files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    names = listed.stdout.split("\n") if listed.returncode == 0 else []
    found = [ROOT / name for name in names if name] or list(ROOT.rglob("*"))
    return [path for path in found if path.suffix in TEXT and path.is_file()]


FILES = _files()


def test_finds_the_code() -> None:
    assert {"fused_lm/dispatch.py", "tests/test_style.py"} <= {
        str(path.relative_to(ROOT)) for path in FILES
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sizes_and_comments(path: Path) -> None:
    lines = path.read_text().splitlines()
    problems = []
    if path.suffix in CODE and len(lines) > FILE_LINES:
        problems.append(f"{len(lines)} lines, at most {FILE_LINES}")
    for number, line in enumerate(lines, 1):
        if path.suffix in CODE and len(line) > COLUMNS and "http" not in line:
            problems.append(f"line {number}: {len(line)} columns, at most {COLUMNS}")
        if path != Path(__file__):
            problems += [
                f"line {number}: {what}" for what, is_it in BANNED.items() if is_it.search(line)
            ]
    if path.suffix == ".py":
        problems += _long_functions(path)
    assert not problems, "\n".join(problems)


def _long_functions(path: Path) -> list[str]:
    problems = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
        limit = KERNEL_LINES if kernel else FUNCTION_LINES
        first = node.body[0]
        documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        docstring = first.end_lineno - first.lineno + 1 if documented else 0
        length = node.end_lineno - node.lineno + 1 - docstring
        if length > limit:
            problems.append(f"{node.name}: {length} lines without its docstring, at most {limit}")
    return problems
