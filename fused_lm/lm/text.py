"""Text as bytes: where it comes from, and what is known of it before any model.

``load_text`` reads one file (memory-mapped), a folder (its text files, sorted), or, by default, the
source of Python's standard library on this machine.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

VOCAB_SIZE = 256
_COUNT_CHUNK = 1 << 22

STDLIB_NAME = "python-stdlib"
STDLIB_SKIPPED_FOLDERS = frozenset(
    # Not the library, or its tests.
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    # Programs with large grammars and their pickles.
    | {"idlelib", "lib2to3", "turtledemo"}
    # Tables printed by tools (code pages, help topics): a tenth of the bytes, none of the language.
    | {"encodings", "pydoc_data"}
)


class DataError(ValueError):
    """The text can't be trained on; the message is one sentence with what was expected."""


@dataclass(frozen=True)
class Text:
    """A text as bytes.

    Attributes:
        name: Short name for titles and folders.
        data: [n] uint8; a read-only memory map when the text is one file.
        files: Number of files joined.
        skipped: Reason -> number of files of the folder left out.
    """

    name: str
    data: np.ndarray
    files: int = 1
    skipped: dict[str, int] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """Length and CRC-32 of the bytes: tells whether a resumed run still reads the same text."""
        crc = 0
        for chunk in _chunks(self.data):
            crc = zlib.crc32(np.ascontiguousarray(chunk).data, crc)
        return f"{self.data.size}:{crc:08x}"

    def digest(self) -> bytes:
        """SHA-256 of the bytes: names what was made of this text and no other."""
        found = hashlib.sha256()
        for chunk in _chunks(self.data):
            found.update(np.ascontiguousarray(chunk).data)
        return found.digest()


def load_text(path: str | os.PathLike[str] | None = None) -> Text:
    """Reads a text file, the text files of a folder, or (None) the source of the standard library.

    Raises:
        DataError: If the path is missing or unreadable, or holds no text.
    """
    if path is None:
        return load_stdlib()
    path = Path(path)
    try:
        if path.is_dir():
            return _load_folder(path)
        if not path.exists():
            raise DataError(
                f"{path} does not exist; expected a text file or a folder that holds text files."
            )
        if not path.is_file():
            raise DataError(f"{path} is neither a file nor a folder; expected text to read.")
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty; expected a text of at least two windows.")
        return Text(path.stem, np.memmap(path, dtype=np.uint8, mode="r"))
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{path} can't be read ({reason}); expected a readable text.") from error


def load_stdlib(root: str | os.PathLike[str] | None = None) -> Text:
    """Source of the standard library without tests, generated tables and installed packages.

    Args:
        root: Its folder; default: that of the running Python.
    Raises:
        DataError: If this Python comes without its source.
    """
    folder = Path(root if root is not None else sysconfig.get_paths()["stdlib"])
    files = [path for path in _walk(folder, STDLIB_SKIPPED_FOLDERS) if path.suffix == ".py"]
    text = _join(STDLIB_NAME, files)
    if text.data.size == 0:
        raise DataError(
            f"{folder} holds no source of Python's standard library; "
            "give a text file or a folder with --data."
        )
    return text


def _load_folder(folder: Path) -> Text:
    next(os.scandir(folder), None)  # os.walk is silent about a folder that it may not list
    text = _join(folder.resolve().name or "text", _walk(folder, frozenset()))
    if text.data.size == 0:
        raise DataError(
            f"{folder} holds no text ({_describe_skipped(text.skipped)}); "
            "expected at least one file that is not empty, hidden or binary."
        )
    return text


def _walk(folder: Path, skipped_folders: frozenset[str]) -> Iterator[Path]:
    """Files below ``folder``, sorted by relative path; hidden folders are not entered."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [n for n in folders if not n.startswith(".") and n not in skipped_folders]
        found += [Path(parent, name) for name in names]
    return iter(sorted(found, key=lambda path: path.relative_to(folder).as_posix()))


def _join(name: str, paths: Iterable[Path]) -> Text:
    """Joins the text files among ``paths``, each ending in a newline."""
    joined = bytearray()
    files = 0
    skipped: Counter[str] = Counter()
    for path in paths:
        if path.name.startswith("."):
            skipped["hidden"] += 1
            continue
        if path.is_symlink() or not path.is_file():
            skipped["not a plain file"] += 1
            continue
        try:
            content = path.read_bytes()
        except OSError:
            skipped["unreadable"] += 1
            continue
        if not content or b"\0" in content:
            skipped["binary" if content else "empty"] += 1
            continue
        files += 1
        joined += content if content.endswith(b"\n") else content + b"\n"
    return Text(name, np.frombuffer(bytes(joined), dtype=np.uint8), files, dict(skipped))


def _describe_skipped(skipped: dict[str, int]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.items())) or "no files"


def describe(text: Text) -> str:
    """One line: name, size, files, and what was left out."""
    line = f"{text.name}: {text.data.size / 1e6:.2f} MB from {text.files} file"
    line += "s" if text.files != 1 else ""
    return line + (f" (left out: {_describe_skipped(text.skipped)})" if text.skipped else "")


def _chunks(data: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, data.size, _COUNT_CHUNK):
        yield data[start : start + _COUNT_CHUNK]


def unigram_entropy(data: np.ndarray) -> float:
    """Entropy of single bytes, in bits: what a model scores that knows frequencies only."""
    counts = np.zeros(VOCAB_SIZE, dtype=np.int64)
    for chunk in _chunks(data):
        counts += np.bincount(chunk, minlength=VOCAB_SIZE)
    return _entropy(counts)


def bigram_entropy(data: np.ndarray) -> float:
    """Entropy of a byte given the one before, in bits per byte: a table of pairs scores this."""
    counts = np.zeros(VOCAB_SIZE * VOCAB_SIZE, dtype=np.int64)
    for start in range(0, data.size - 1, _COUNT_CHUNK):
        chunk = data[start : start + _COUNT_CHUNK + 1].astype(np.int64)
        counts += np.bincount(chunk[:-1] * VOCAB_SIZE + chunk[1:], minlength=counts.size)
    first = counts.reshape(VOCAB_SIZE, VOCAB_SIZE).sum(1)
    return _entropy(counts) - _entropy(first)


def _entropy(counts: np.ndarray) -> float:
    total = int(counts.sum())
    if total == 0:
        return 0.0
    p = counts[counts > 0] / total
    return float(-(p * np.log2(p)).sum()) + 0.0  # + 0.0: no "-0.0" for a text of one letter
