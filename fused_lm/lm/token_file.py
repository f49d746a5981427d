"""A tokenised text as a memory-mapped file, written whole or not at all.

    64 bytes   magic, bytes per token, CRC-32 of what follows, number of tokens, of slices, key
    tokens     uint16 or uint32, little-endian, slice after slice
    lengths    tokens of each slice, uint64

The key says of what text and tokenizer these are the tokens: a file with another one isn't used.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fused_lm.lm.atomic import sweep, temporary_beside

_MAGIC = b"FLMTOKN1"
_HEADER = struct.Struct("<8sIIQQ32s")
_CHUNK = 1 << 24


class TokenFileError(ValueError):
    """The file is missing, cut off, changed or another one's; the message says which."""


@dataclass(frozen=True)
class Tokens:
    """A tokenised text.

    Attributes:
        data: [n] uint16 or uint32, a read-only memory map.
        lengths: [S] int64, tokens of each slice of the text.
    """

    data: np.ndarray
    lengths: np.ndarray


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every token."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def write_tokens(path: Path, key: bytes, slices: Iterable[np.ndarray], dtype: np.dtype) -> None:
    """Writes the tokens of each slice, at the memory of one slice.

    The file appears under its name when it is whole. Several processes may write it at once.

    Args:
        path: The file; its folder is made.
        key: 32 bytes.
        slices: [n_i] tokens each.
        dtype: Of :func:`token_dtype`.
    Raises:
        OSError: If it can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path)
    temporary = temporary_beside(path)
    crc, lengths = 0, []
    try:
        with open(temporary, "xb") as file:
            file.write(bytes(_HEADER.size))
            for tokens in slices:
                content = tokens.astype(dtype).tobytes()
                crc = zlib.crc32(content, crc)
                file.write(content)
                lengths.append(tokens.size)
            footer = np.array(lengths, dtype="<u8").tobytes()
            crc = zlib.crc32(footer, crc)
            file.write(footer)
            file.seek(0)
            count = sum(lengths)
            file.write(_HEADER.pack(_MAGIC, dtype.itemsize, crc, count, len(lengths), key))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def read_tokens(path: Path, key: bytes) -> Tokens:
    """Maps a token file after checking every byte of it.

    Raises:
        TokenFileError: If there is none, or it can't be read, or isn't what ``write_tokens`` wrote
            with this key.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(_HEADER.size)
            if len(start) < _HEADER.size or not start.startswith(_MAGIC):
                raise TokenFileError(f"{path} is no token file")
            _, itemsize, crc, count, num_slices, found = _HEADER.unpack(start)
            if itemsize not in (2, 4):
                raise TokenFileError(f"{path} is no token file")
            if os.fstat(file.fileno()).st_size != _HEADER.size + itemsize * count + 8 * num_slices:
                raise TokenFileError(f"{path} is cut off")
            if found != key:
                raise TokenFileError(f"{path} holds the tokens of another text")
            got = 0
            while chunk := file.read(_CHUNK):
                got = zlib.crc32(chunk, got)
            if got != crc:
                raise TokenFileError(f"{path} is corrupt")
            file.seek(_HEADER.size + itemsize * count)
            lengths = np.frombuffer(file.read(), dtype="<u8").astype(np.int64)
        if not count:
            return Tokens(np.zeros(0, dtype=f"<u{itemsize}"), lengths)
        dtype = np.dtype(f"<u{itemsize}")
        data = np.memmap(path, dtype=dtype, mode="r", offset=_HEADER.size, shape=(count,))
    except OSError as error:
        raise TokenFileError(f"{path} can't be read ({error.strerror or error})") from error
    return Tokens(data, lengths)
