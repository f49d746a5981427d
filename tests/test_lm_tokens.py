"""Tokenizers, the token file and the corpus: round trips, reuse, and what a broken file becomes."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fused_lm.lm.corpus import Corpus, open_corpus, with_tokenizer
from fused_lm.lm.data import BLOCK_BYTES, split_text
from fused_lm.lm.text import DataError, Text, load_stdlib
from fused_lm.lm.token_file import TokenFileError, read_tokens, token_dtype, write_tokens
from fused_lm.lm.tokenizer import BPETokenizer, ByteTokenizer, train_bpe

SAMPLE = load_stdlib().data[: 5 * BLOCK_BYTES]
KEY = bytes(range(32))


def text_of(content: bytes) -> Text:
    return Text("sample", np.frombuffer(content, dtype=np.uint8))


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return train_bpe([SAMPLE.tobytes()], 600)


ANY_BYTES = [
    pytest.param(b"", id="empty"),
    pytest.param(bytes(range(256)) * 3, id="every byte"),
    pytest.param(np.random.default_rng(0).bytes(5000), id="noise, no UTF-8"),
    pytest.param("ä ö 中文 русский 🙂\u2028\u0085\u00a0é".encode() * 5, id="other scripts"),
    pytest.param(b"  \t\n\r\n\x0b\x0c   def f(x):\n    return 1234567\0", id="white space"),
]


@pytest.mark.parametrize("content", ANY_BYTES)
def test_any_bytes_round_trip(bpe: BPETokenizer, content: bytes) -> None:
    for tokenizer in (ByteTokenizer(), bpe):
        tokens = tokenizer.encode(content)
        assert tokenizer.decode(tokens.tolist()) == content
        assert tokenizer.byte_lengths()[tokens].sum() == len(content)


def test_bpe_learns_words_and_begins_with_the_bytes(bpe: BPETokenizer) -> None:
    assert bpe.vocab_size == 600
    assert [bpe.decode([b]) for b in range(256)] == [bytes([b]) for b in range(256)]
    text = SAMPLE.tobytes()
    assert len(bpe.encode(text)) < 0.5 * len(text)
    learned = [bpe.decode([token]) for token in range(256, 600)]
    assert b" self" in learned and len(set(learned)) == len(learned)
    words = (b"a b", b"1234", b"x=", b"\nx", b"x\n")
    assert not any(part in token for token in learned for part in words)


def test_bpe_repeats_and_survives_its_document(bpe: BPETokenizer) -> None:
    again = train_bpe([SAMPLE.tobytes()], 600)
    assert again.document == bpe.document
    stored = BPETokenizer(bpe.document)
    text = SAMPLE[:5000].tobytes()
    assert np.array_equal(stored.encode(text), bpe.encode(text))
    assert train_bpe([b"ab ab"], 5000).vocab_size == 257, "no more pairs occur twice"


def test_wrong_documents_are_refused(bpe: BPETokenizer) -> None:
    for document in ("", "{}", "no json", bpe.document.replace('"a":97', '"a":98')):
        with pytest.raises(ValueError, match="tokenizer"):
            BPETokenizer(document)


@pytest.mark.parametrize("vocab_size", [300, 65536, 65537])
def test_token_file_round_trip(tmp_path: Path, vocab_size: int) -> None:
    rng = np.random.default_rng(1)
    slices = [rng.integers(0, vocab_size, n) for n in (5, 0, 1000)]
    slices[0][0] = vocab_size - 1
    path = tmp_path / "deep" / "t.bin"
    write_tokens(path, KEY, iter(slices), token_dtype(vocab_size))
    got = read_tokens(path, KEY)
    assert got.data.dtype.itemsize == (2 if vocab_size <= 65536 else 4)
    assert np.array_equal(got.data, np.concatenate(slices))
    assert got.lengths.tolist() == [5, 0, 1000]
    assert isinstance(got.data, np.memmap) and not got.data.flags.writeable
    assert [p.name for p in path.parent.iterdir()] == ["t.bin"]


def test_what_killed_writers_left_goes_after_an_hour(tmp_path: Path) -> None:
    for name, age in ((".t.bin.1.tmp", 7200), (".t.bin.2.tmp", 60), (".other.bin.1.tmp", 7200)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    write_tokens(tmp_path / "t.bin", KEY, [np.arange(3)], token_dtype(300))
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"t.bin", ".t.bin.2.tmp", ".other.bin.1.tmp"}


def test_broken_token_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.bin"
    write_tokens(path, KEY, [np.arange(100)], token_dtype(300))
    content = path.read_bytes()
    for share in (0.0, 0.1, 0.5, 0.999):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(TokenFileError, match=r"cut off|no token file"):
            read_tokens(path, KEY)
    for place, words in ((3, "no token file"), (8, "no token file|cut off"), (100, "corrupt")):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(TokenFileError, match=words):
            read_tokens(path, KEY)
    path.write_bytes(content)
    with pytest.raises(TokenFileError, match="another text"):
        read_tokens(path, bytes(32))
    with pytest.raises(TokenFileError, match="can't be read"):
        read_tokens(tmp_path / "none", KEY)


def bpe_corpus(folder: Path, notes: list[str], size: int = SAMPLE.size) -> Corpus:
    text = Text("sample", SAMPLE[:size])
    return open_corpus(text, "bpe", 400, context=16, folder=folder, note=notes.append)


def test_corpus_holds_out_the_same_bytes_as_without_tokenizer(tmp_path: Path) -> None:
    corpus = bpe_corpus(tmp_path, [])
    for windows, expected in zip(corpus.split(16), split_text(corpus.text, 16), strict=True):
        tokens = np.concatenate([windows.data[a:b] for a, b in windows.ranges])
        content = np.concatenate([corpus.text.data[a:b] for a, b in expected.ranges])
        assert corpus.tokenizer.decode(tokens.tolist()) == content.tobytes()


def test_vocabulary_is_learned_from_the_training_slices_only(tmp_path: Path) -> None:
    data = SAMPLE.copy()
    _, held_out = split_text(Text("sample", data), 16)
    for start, end in held_out.ranges:
        data[start:end] = np.frombuffer(b"zqzqzq ", dtype=np.uint8).repeat(end - start)[
            : end - start
        ]
    changed = open_corpus(Text("changed", data), "bpe", 400, context=16, folder=tmp_path)
    kept = bpe_corpus(tmp_path, [])
    assert isinstance(kept.tokenizer, BPETokenizer) and isinstance(changed.tokenizer, BPETokenizer)
    assert kept.tokenizer.document == changed.tokenizer.document


def test_tokenised_text_is_kept_and_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    first = bpe_corpus(tmp_path, notes)
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names) == 2, "a tokenizer and its tokens"
    with monkeypatch.context() as patch:
        patch.setattr("fused_lm.lm.corpus.train_bpe", None)
        patch.setattr("fused_lm.lm.corpus.write_tokens", None)
        again = bpe_corpus(tmp_path, notes)
    assert first.tokens is not None and again.tokens is not None
    assert np.array_equal(first.tokens.data, again.tokens.data)
    assert not notes
    bpe_corpus(tmp_path, notes, SAMPLE.size - 1)
    assert len(list(tmp_path.iterdir())) == 4, "another text has other files"


@pytest.mark.parametrize("suffix", [".bin", ".json"])
def test_broken_files_in_the_cache_are_made_anew(tmp_path: Path, suffix: str) -> None:
    notes: list[str] = []
    first = bpe_corpus(tmp_path, notes).tokens
    assert first is not None
    expected = first.data.copy()  # what is mapped must not be touched once its file is cut
    (path,) = tmp_path.glob(f"*{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    again = bpe_corpus(tmp_path, notes)
    assert len(notes) == 1 and "made anew" in notes[0]
    assert again.tokens is not None
    assert np.array_equal(expected, again.tokens.data)
    assert path.read_bytes() == content


def test_cache_folder_that_cannot_be_written(tmp_path: Path, bpe: BPETokenizer) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match="expected a writable cache folder") as caught:
        bpe_corpus(tmp_path / "file", [])
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="expected a writable cache folder"):
        with_tokenizer(Text("t", SAMPLE), bpe, context=16, folder=tmp_path / "file" / "x")


def test_impossible_choices_get_one_sentence(tmp_path: Path) -> None:
    text = text_of(b"how much wood " * 400)
    for arguments, words in (
        (("words", None), "one of bytes, bpe; got 'words'"),
        (("bytes", 300), "give --vocab-size with --tokenizer bpe"),
        (("bpe", 256), "at least 257, got 256"),
    ):
        with pytest.raises(DataError, match=words):
            open_corpus(text, *arguments, context=16, folder=tmp_path)
    for content in (b"x", b"a few words", b"how much wood " * 10):
        corpus = open_corpus(text_of(content), "bpe", 300, context=64, folder=tmp_path)
        with pytest.raises(DataError, match="too few for a context of 64"):
            corpus.split(64)


def test_missing_tokenizers_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError) as caught:
        bpe_corpus(tmp_path, [])
    assert caught.value.name == "tokenizers"
    assert not os.listdir(tmp_path)
