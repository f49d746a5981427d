"""Tokens: bytes as they are, or frequent runs of bytes, by byte-pair encoding (BPE).

Both read any bytes and give them back unchanged. To the ``tokenizers`` library, which reads
characters, byte b is the character of that number: every text is valid then, UTF-8 or not, and the
first 256 tokens are the bytes themselves. A token never crosses the border of a word, and every
byte above 0x7f counts as a letter, so that the letters of other scripts stay whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

BYTES, BPE = "bytes", "bpe"
KINDS = (BYTES, BPE)
NUM_BYTES = 256
DEFAULT_VOCAB_SIZE = 4096
TRAINING = "bpe-1"
"""Names the rules below; a change of what they learn from a text needs another name."""

_MIN_FREQUENCY = 2
_SPACE = r" \t\n\r\x0b\x0c"
_LETTER = "A-Za-z_\u0080-\u00ff"
_WORDS = "|".join(
    (
        f" ?[{_LETTER}]+",
        " ?[0-9]{1,3}",
        f" ?[^{_LETTER}0-9{_SPACE}]+",
        f"[{_SPACE}]+(?![^{_SPACE}])",
        f"[{_SPACE}]+",
    )
)


class ByteTokenizer:
    """Token b is byte b."""

    kind = BYTES
    vocab_size = NUM_BYTES

    def encode(self, content: bytes) -> np.ndarray:
        """Tokens of a text, [n] int64."""
        return np.frombuffer(content, dtype=np.uint8).astype(np.int64)

    def decode(self, tokens: Sequence[int]) -> bytes:
        """The text of tokens of 0 .. 255."""
        return bytes(tokens)

    def byte_lengths(self) -> np.ndarray:
        """Bytes of each token, [V] int64."""
        return np.ones(self.vocab_size, dtype=np.int64)


class BPETokenizer:
    """Byte-pair encoding by the ``tokenizers`` library.

    Args:
        document: What :attr:`document` was of a tokenizer of this class.
    Raises:
        ValueError: If it isn't one. ImportError: without the ``tokenizers`` package.
    """

    kind = BPE

    def __init__(self, document: str) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_str(document)
            vocabulary = self._tokenizer.get_vocab()
            by_id = {index: token.encode("latin-1") for token, index in vocabulary.items()}
            self._bytes = [by_id[index] for index in range(len(by_id))]
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"it holds no tokenizer of fused-lm train ({error})") from error
        if self._bytes[:NUM_BYTES] != [bytes([b]) for b in range(NUM_BYTES)]:
            raise ValueError("the first 256 tokens of its tokenizer are not the bytes")
        self.document = document
        self.vocab_size = len(self._bytes)

    def encode(self, content: bytes) -> np.ndarray:
        """Tokens of a text, [n] int64."""
        return next(self.encode_all([content]))

    def encode_all(self, contents: Iterable[bytes]) -> Iterator[np.ndarray]:
        """Tokens of each text, [n] int64, on all cores."""
        found = self._tokenizer.encode_batch_fast([c.decode("latin-1") for c in contents])
        return (np.array(encoding.ids, dtype=np.int64) for encoding in found)

    def decode(self, tokens: Sequence[int]) -> bytes:
        """The text of tokens of 0 .. V-1."""
        return b"".join(self._bytes[token] for token in tokens)

    def byte_lengths(self) -> np.ndarray:
        """Bytes of each token, [V] int64."""
        return np.array([len(content) for content in self._bytes], dtype=np.int64)


AnyTokenizer = ByteTokenizer | BPETokenizer


def train_bpe(pieces: Iterable[bytes], vocab_size: int) -> BPETokenizer:
    """Learns a vocabulary from pieces of text; the same pieces give the same vocabulary.

    Args:
        pieces: Texts; no token is learned across their borders.
        vocab_size: Tokens at most, 256 or more; fewer if no pair is left that occurs twice.
    Raises:
        ImportError: Without the ``tokenizers`` package.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=_MIN_FREQUENCY,
        show_progress=False,
        initial_alphabet=[chr(b) for b in range(NUM_BYTES)],
    )
    tokenizer.train_from_iterator((piece.decode("latin-1") for piece in pieces), trainer)
    return BPETokenizer(tokenizer.to_str())
