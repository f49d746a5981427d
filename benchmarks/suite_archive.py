"""The one file in which a run of the GPU suite travels from machine to machine."""

from __future__ import annotations

import contextlib
import io
import tarfile
from pathlib import Path
from typing import Any

CACHE = "cache"
"""Folder of what is worth keeping, and can be made again."""
MOST_BYTES = 15 << 20
LOG_KEPT_BYTES = 256 << 10
"""Of a log's end."""


def _only_data() -> dict[str, Any]:
    """Nothing outside of the folder, where Python knows how (3.10.12, 3.11.4)."""
    return {"filter": "data"} if hasattr(tarfile, "data_filter") else {}


def pack(folder: Path, archive: Path) -> None:
    """All results and logs' ends; caches too, if the archive stays small enough to travel.

    Raises:
        OSError: It can't be written, or is too large without caches already.
    """
    own = {archive.resolve(), archive.with_suffix(".tmp").resolve()}
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.resolve() not in own)
    records = folder / CACHE / "fused_lm"
    caches = [
        p for p in files if p.is_relative_to(folder / CACHE) and not p.is_relative_to(records)
    ]
    results = [p for p in files if p not in set(caches)]
    small = sum(p.stat().st_size for p in caches if p.exists()) <= 4 * MOST_BYTES
    for chosen in ([*results, *caches * small], results):
        temporary = archive.with_suffix(".tmp")
        with tarfile.open(temporary, "w:gz", compresslevel=3) as tar:
            for path in chosen:
                with contextlib.suppress(FileNotFoundError):  # a stage's own, gone meanwhile
                    _add(tar, path, str(path.relative_to(folder)))
        if temporary.stat().st_size <= MOST_BYTES:
            temporary.replace(archive)
            return
    temporary.unlink()
    raise OSError(f"the results are more than {MOST_BYTES >> 20} MiB, packed")


def _add(tar: tarfile.TarFile, path: Path, name: str) -> None:
    data = path.read_bytes()
    if path.suffix in (".txt", ".log"):
        data = data[-LOG_KEPT_BYTES:]
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mtime = int(path.stat().st_mtime)
    tar.addfile(info, io.BytesIO(data))


def unpack(archive: Path, folder: Path) -> None:
    """Everything in it, into a folder, and nothing outside of that.

    Raises:
        OSError, tarfile.TarError: It can't be read or written, or is no archive.
    """
    with tarfile.open(archive) as tar:
        tar.extractall(folder, **_only_data())
