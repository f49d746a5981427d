"""Files that are written whole or not at all."""

from __future__ import annotations

import glob
import os
import secrets
import time
from contextlib import suppress
from pathlib import Path

ABANDONED_SECONDS = 3600.0


def write_atomically(path: Path, content: bytes) -> None:
    """Writes beside ``path``, syncs, renames over it, and syncs the folder.

    At every instant ``path`` shows its old content or the new one, whole. On failure or Ctrl-C the
    old one stays, and nothing is left beside it.

    Raises:
        OSError: If it can't be written.
    """
    temporary = temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


def temporary_beside(path: Path) -> Path:
    """A name in the same folder that no other process writes to, on whatever machine."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def sweep(path: Path) -> None:
    """Removes what killed writers of this file left; a living one has written within the hour."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                left.unlink()


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself durable, where the system can open a folder."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
