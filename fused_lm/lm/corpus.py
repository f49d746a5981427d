"""A text with its tokens: what a run, an evaluation or a timing reads its windows from.

Bytes need no preparation. For BPE, the text is first cut into training and held-out slices exactly
as for bytes; the vocabulary is learned from the training slices only, each slice is tokenised by
itself, and the result is kept in the cache folder under a name made of the content of text, slices
and tokenizer: the next run on the same text begins at once. A slice whose tokens are fewer than a
window is left out.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from fused_lm.lm.atomic import write_atomically
from fused_lm.lm.data import Windows, split_ranges, split_text
from fused_lm.lm.text import DataError, Text
from fused_lm.lm.token_file import TokenFileError, Tokens, read_tokens, token_dtype, write_tokens
from fused_lm.lm.tokenizer import (
    BPE,
    DEFAULT_VOCAB_SIZE,
    KINDS,
    NUM_BYTES,
    TRAINING,
    AnyTokenizer,
    BPETokenizer,
    ByteTokenizer,
    train_bpe,
)

BYTES_PER_TOKEN = 4
"""About; a slice is made so long that it holds a window of this many bytes for each token."""

_SLICES_AT_ONCE = 64
Note = Callable[[str], None]


def cache_folder() -> Path:
    """Where tokenised texts are kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "fused_lm" / "tokens"


@dataclass(frozen=True)
class Corpus:
    """A text with a tokenizer.

    Attributes:
        text: As bytes.
        tokenizer: What made ``tokens``.
        tokens: Of the training and held-out slices by turns; None where tokens are bytes.
    """

    text: Text
    tokenizer: AnyTokenizer
    tokens: Tokens | None = None

    def split(self, context: int) -> tuple[Windows, Windows]:
        """Training and held-out windows of ``context`` tokens.

        Raises:
            DataError: If the text is too short for one window of each.
        """
        if self.tokens is None:
            return split_text(self.text, context)
        ends = np.cumsum(self.tokens.lengths)
        ranges = np.stack([ends - self.tokens.lengths, ends], axis=1)
        long_enough = self.tokens.lengths > context
        train, held_out = ranges[0::2][long_enough[0::2]], ranges[1::2][long_enough[1::2]]
        if not len(train) or not len(held_out):
            raise DataError(
                f"{self.text.name} has {int(ends[-1])} tokens, too few for a context of {context}: "
                "one window to learn from and one held out; give a longer text, a smaller "
                "--context or a smaller --vocab-size."
            )
        data = self.tokens.data
        return Windows(data, train, context), Windows(data, held_out, context)

    def whole(self, context: int) -> Windows:
        """Windows over all of the text, for an evaluation of a model that never saw it.

        Raises:
            DataError: If the text is shorter than one window.
        """
        data = self.text.data if self.tokens is None else self.tokens.data
        if data.size <= context:
            raise DataError(
                f"{self.text.name} has {data.size} tokens; a window of the model is {context + 1}."
            )
        return Windows(data, np.array([[0, data.size]]), context)


def check_choice(kind: str, vocab_size: int | None) -> None:
    """Refuses a tokenizer that can't be.

    Raises:
        DataError: In one sentence.
    """
    if kind not in KINDS:
        raise DataError(f"the tokenizer is one of {', '.join(KINDS)}; got {kind!r}.")
    if vocab_size is None:
        return
    if kind != BPE:
        raise DataError(
            f"a vocabulary of {kind} is always {NUM_BYTES}; give --vocab-size with --tokenizer bpe."
        )
    if vocab_size <= NUM_BYTES:
        raise DataError(
            f"a bpe vocabulary begins with the {NUM_BYTES} bytes; "
            f"expected --vocab-size of at least {NUM_BYTES + 1}, got {vocab_size}."
        )


def open_corpus(
    text: Text,
    kind: str = "bytes",
    vocab_size: int | None = None,
    *,
    context: int,
    folder: Path | None = None,
    note: Note = lambda message: None,
) -> Corpus:
    """A text with a tokenizer that is learned from its training slices.

    Args:
        text: The text.
        kind: "bytes" or "bpe".
        vocab_size: Tokens at most; only for "bpe".
        context: Tokens of a window; a long one makes the slices longer.
        folder: Of the tokenised text; default: :func:`cache_folder`.
        note: Told in a sentence that something in the folder was broken and is made anew.
    Raises:
        DataError: If the choice is impossible, or the folder can't be written.
        ImportError: Without the ``tokenizers`` package, for "bpe".
    """
    check_choice(kind, vocab_size)
    if kind != BPE:
        return Corpus(text, ByteTokenizer())
    ranges = _slices(text, context)
    folder = folder or cache_folder()
    wanted = vocab_size or DEFAULT_VOCAB_SIZE
    path = folder / f"{_key(text, ranges, TRAINING, str(wanted)).hex()[:32]}.json"
    tokenizer = _stored_tokenizer(path, note)
    if tokenizer is None:
        tokenizer = train_bpe(_contents(text, ranges[0::2]), wanted)
        try:
            write_atomically(path, tokenizer.document.encode())
        except OSError as error:
            raise _unwritable(path, error) from error
    return with_tokenizer(text, tokenizer, context=context, folder=folder, note=note)


def with_tokenizer(
    text: Text,
    tokenizer: AnyTokenizer,
    *,
    context: int,
    folder: Path | None = None,
    note: Note = lambda message: None,
) -> Corpus:
    """A text with a given tokenizer; arguments and errors as of :func:`open_corpus`."""
    if isinstance(tokenizer, ByteTokenizer):
        return Corpus(text, tokenizer)
    ranges = _slices(text, context)
    key = _key(text, ranges, tokenizer.document)
    path = (folder or cache_folder()) / f"{key.hex()[:32]}.bin"
    try:
        return Corpus(text, tokenizer, read_tokens(path, key))
    except TokenFileError as error:
        if path.exists():
            note(f"{error}; it is made anew.")
    try:
        slices = _encoded(tokenizer, text, ranges)
        write_tokens(path, key, slices, token_dtype(tokenizer.vocab_size))
        return Corpus(text, tokenizer, read_tokens(path, key))
    except (OSError, TokenFileError) as error:
        raise _unwritable(path, error) from error


def _slices(text: Text, context: int) -> np.ndarray:
    """[S, 2] int64: training and held-out slices of the text in bytes, by turns."""
    window = BYTES_PER_TOKEN * (context + 1)
    window = max(1, min(window, text.data.size // 2))
    return np.stack(split_ranges(text.data.size, window), axis=1).reshape(-1, 2)


def _contents(text: Text, ranges: np.ndarray) -> Iterator[bytes]:
    return (text.data[start:end].tobytes() for start, end in ranges)


def _encoded(tokenizer: BPETokenizer, text: Text, ranges: np.ndarray) -> Iterator[np.ndarray]:
    contents = _contents(text, ranges)
    while some := list(islice(contents, _SLICES_AT_ONCE)):
        yield from tokenizer.encode_all(some)


def _key(text: Text, ranges: np.ndarray, *more: str) -> bytes:
    """32 bytes that change with the text, its slices or anything else given."""
    key = hashlib.sha256(np.ascontiguousarray(ranges, dtype="<i8").tobytes())
    key.update(text.digest())
    for part in more:
        key.update(hashlib.sha256(part.encode()).digest())
    return key.digest()


def _stored_tokenizer(path: Path, note: Note) -> BPETokenizer | None:
    try:
        return BPETokenizer(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        note(f"{path} can't be used ({error}); it is made anew.")
        return None


def _unwritable(path: Path, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or error
    return DataError(
        f"{path} can't be written ({reason}); "
        "expected a writable cache folder, which XDG_CACHE_HOME names."
    )
