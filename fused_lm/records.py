"""Evidence: which kernel, on which GPU, was right and at least as fast as PyTorch.

A record is one line of a JSON file. Records ship in ``fused_lm/verified.json``, and ``fused-lm
verify`` writes the same on the user's own GPU into :func:`user_file`. Both are read once, at the
first call that asks; a broken user file is reported and left out, never fatal.

A Triton kernel is named by the hash of its source without comments, docstrings and layout, with
Triton's minor version: what changes the compiled kernel changes the hash, what explains it doesn't.
A CUDA kernel is named by the hashes of its machine code and of the C++ that chooses and launches
it, which the build wrote down.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import json
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
_PACKAGE = Path(__file__).parent
SHIPPED = _PACKAGE / "verified.json"
"""Records that come with the package."""

SHAPE_CLASSES: dict[str, Callable[[Any], tuple[str, int]]] = {}
"""Operator -> function of a call that returns (family, size index); filled by ``ops/``."""

KERNEL_SOURCES: dict[tuple[str, str], tuple[str, ...]] = {}
"""(operator, backend) -> the files whose code is the kernel; filled by ``ops/``. Paths below the
package, for ``cuda`` names of what ``csrc/kernels/*.cu`` were compiled to.
"""


TRAINING_SOURCES: dict[tuple[str, str], tuple[str, ...]] = {}
"""More of them that training alone runs, so that a backward can change without the record of the
forward. The others count for both.
"""


@dataclass(frozen=True)
class Record:
    """One measured fact.

    Attributes:
        op, backend, kernel: What ran; ``kernel`` is :func:`kernel_id` of the mode.
        gpu: ``torch.cuda.get_device_name``.
        mode: ``"infer"`` (forward) or ``"train"`` (forward and backward).
        dtype: Like ``"bfloat16"``.
        family, size: The shape class, see :data:`SHAPE_CLASSES`.
        parity: Every output and gradient was within tolerance.
        ratio: Time of PyTorch divided by ours, in the same run; >= 1 is at least as fast.
    """

    op: str
    backend: str
    kernel: str
    gpu: str
    mode: str
    dtype: str
    family: str
    size: int
    parity: bool
    ratio: float


def user_file() -> Path:
    """Where ``fused-lm verify`` writes: ``$XDG_CACHE_HOME/fused_lm/verified.json``."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "fused_lm" / "verified.json"


def shape_class(op: str, call: Any) -> str:
    """The shape class of a call as one word, like ``d64-plain/2``."""
    family, size = SHAPE_CLASSES[op](call)
    return f"{family}/{size}"


def missing(
    op: str, backend: str, device_index: int, dtype: str, family: str, size: int, mode: str
) -> str | None:
    """None if a record lets ``auto`` take the kernel, else a sentence that says why not.

    A size that was not measured takes the verdict of its nearest smaller neighbour.
    """
    return _missing(op, backend, device_index, dtype, family, size, mode)


@functools.lru_cache(maxsize=4096)
def _missing(
    op: str, backend: str, device_index: int, dtype: str, family: str, size: int, mode: str
) -> str | None:
    """Eager users ask once a call, and hear the same until the files are read again."""
    record = _record(op, backend, device_index, dtype, family, size, mode)
    gpu = torch.cuda.get_device_name(device_index)
    if record is None:
        if not any(key[3] == gpu for key in _table()):
            _say_once(
                f"{gpu} has no record yet, so PyTorch's operators run. Run `fused-lm verify` once."
            )
        return (
            f"no record of {op} ({mode}, {dtype}, {family}/{size}) on {gpu}: run `fused-lm verify`"
        )
    if not record.parity:
        return f"the record on {gpu} says that it failed parity ({family}/{record.size})"
    if record.ratio < 1.0:
        speed = f"{record.ratio:.2f} of PyTorch's speed"
        return f"the record on {gpu} says {speed} ({family}/{record.size})"
    return None


def slower(
    op: str,
    backend: str,
    than: str,
    device_index: int,
    dtype: str,
    family: str,
    size: int,
    mode: str,
) -> str | None:
    """Of two kernels that :func:`missing` lets pass: None if ``backend`` has at least the ratio of
    ``than``, else a sentence with both.
    """
    return _slower(op, backend, than, device_index, dtype, family, size, mode)


@functools.lru_cache(maxsize=4096)
def _slower(op: str, backend: str, than: str, *subject: Any) -> str | None:
    one, other = _record(op, backend, *subject), _record(op, than, *subject)
    if one is None or other is None or one.ratio >= other.ratio:
        return None
    ratios = f"{other.ratio:.2f} against {one.ratio:.2f} of PyTorch's speed"
    return f"{than} is faster here by the records: {ratios}"


# torch.compile takes the answers as constants instead of tracing into files and hashes. The
# decorator torch.compiler.assume_constant_result does the same but imports all of torch._dynamo.
missing._dynamo_marked_constant = True  # type: ignore[attr-defined]
slower._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _record(
    op: str, backend: str, device_index: int, dtype: str, family: str, size: int, mode: str
) -> Record | None:
    """That of the largest measured size up to ``size``."""
    gpu = torch.cuda.get_device_name(device_index)
    kernel = kernel_id(op, backend, device_index, mode)
    sizes = _table().get((op, backend, kernel, gpu, mode, dtype, family), {})
    measured = [s for s in sizes if s <= size]
    return sizes[max(measured)] if measured else None


@functools.cache
def kernel_id(op: str, backend: str, device_index: int | None = None, mode: str = "infer") -> str:
    """Hash of the code that a mode runs: of a Triton kernel (comments, docstrings and layout don't
    count) with Triton's minor version, of a CUDA kernel what that GPU runs, of all its targets
    without one.
    """
    if backend == "cuda":
        files = sources_of(op, mode)
        from fused_lm.cuda import extension

        capability = (
            None if device_index is None else torch.cuda.get_device_capability(device_index)
        )
        text = " ".join(extension.kernel_hashes(files, capability))
        return hashlib.sha256(text.encode()).hexdigest()[:16]
    return triton_kernel_id(op, _triton_minor())


def sources_of(op: str, mode: str) -> tuple[str, ...]:
    """The CUDA kernels that a mode runs."""
    more = TRAINING_SOURCES.get((op, "cuda"), ()) if mode == "train" else ()
    return (*KERNEL_SOURCES[op, "cuda"], *more)


def triton_kernel_id(op: str, minor: str) -> str:
    """:func:`kernel_id` of a Triton kernel as the Triton of that version, like "3.6", runs it."""
    digest = hashlib.sha256(minor.encode())
    for name in KERNEL_SOURCES[op, "triton"]:
        digest.update(code_of((_PACKAGE / name).read_text()).encode())
    return digest.hexdigest()[:16]


def load(path: Path) -> list[Record]:
    """The records in a file.

    Raises:
        ValueError: Not a record file of this format, in one sentence.
    """
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}")
        return [Record(**line) for line in content["records"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a record file of format {FORMAT}: {error}") from error


def save(path: Path, records: Iterable[Record]) -> None:
    """Writes records atomically, sorted, one a line."""
    lines = sorted(json.dumps(asdict(record), sort_keys=True) for record in records)
    body = ",\n".join("  " + line for line in lines)
    text = f'{{"format": {FORMAT}, "records": [\n{body}\n]}}\n' if lines else EMPTY
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
    forget()


def forget() -> None:
    """Drops what was read, so that the next question reads the files again."""
    _table.cache_clear()
    _missing.cache_clear()
    _slower.cache_clear()


EMPTY = f'{{"format": {FORMAT}, "records": []}}\n'


def key_of(record: Record) -> tuple[Any, ...]:
    """What a record is about, all but its size, see :func:`_table`."""
    return (
        record.op,
        record.backend,
        record.kernel,
        record.gpu,
        record.mode,
        record.dtype,
        record.family,
    )


def known() -> list[Record]:
    """Every record that dispatch reads."""
    return [record for sizes in _table().values() for record in sizes.values()]


@functools.cache
def _table() -> dict[tuple[str, ...], dict[int, Record]]:
    table: dict[tuple[str, ...], dict[int, Record]] = {}
    found = load(SHIPPED)
    if user_file().is_file():
        try:
            found += load(user_file())
        except ValueError as error:
            warnings.warn(f"fused_lm ignores its own records: {error}", stacklevel=2)
    for record in found:
        table.setdefault(key_of(record), {})[record.size] = record
    return table


def code_of(source: str) -> str:
    """Python without comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            body[:] = [child for child in body if not _is_text(child)] or [ast.Pass()]
    return ast.unparse(tree)


def _is_text(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _triton_minor() -> str:
    try:
        return ".".join(importlib.metadata.version("triton").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return "no triton"


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(f"fused_lm: {message}", stacklevel=2)
