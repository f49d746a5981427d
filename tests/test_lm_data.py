"""Text: where it comes from, what is skipped, and that split and batches are what they say."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fused_lm.lm.data import BLOCK_BYTES, BatchSampler, Windows, split_text
from fused_lm.lm.text import (
    DataError,
    Text,
    bigram_entropy,
    describe,
    load_stdlib,
    load_text,
    unigram_entropy,
)


def text_of(content: bytes) -> Text:
    return Text("sample", np.frombuffer(content, dtype=np.uint8))


def random_text(size: int, seed: int = 0) -> Text:
    return Text("random", np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8))


def test_standard_library_is_text_without_tests_and_tables() -> None:
    text = load_stdlib()
    assert text.data.size > 1_000_000
    assert text.files > 100
    assert 0 not in text.data
    assert b"def dataclass(" in text.data.tobytes()
    assert text.fingerprint() == load_stdlib().fingerprint()


def test_standard_library_leaves_out_folders(tmp_path: Path) -> None:
    for name in ("a.py", "test/b.py", "site-packages/c.py", "json/d.py", "encodings/e.py", "f.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# {name}\n")
    assert load_stdlib(tmp_path).data.tobytes() == b"# a.py\n# json/d.py\n"


def test_folder_is_joined_in_order_and_counts_what_it_skips(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.txt").write_text("first\n")
    (tmp_path / "binary").write_bytes(b"x\0y")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("no")
    (tmp_path / "link").symlink_to(tmp_path / "b.txt")
    text = load_text(tmp_path)
    assert text.data.tobytes() == b"first\nsecond\n"
    assert text.files == 2
    assert text.skipped == {"binary": 1, "empty": 1, "hidden": 1, "not a plain file": 1}
    assert "1 binary" in describe(text)


def test_file_is_mapped_not_read(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(b"hello\0world")
    text = load_text(path)
    assert isinstance(text.data, np.memmap)
    assert text.data.tobytes() == b"hello\0world"


def test_bad_paths_get_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "none").mkdir()
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "x").write_bytes(b"\0")
    for path, words in (
        (tmp_path / "missing", "does not exist; expected a text file or a folder"),
        (tmp_path / "empty.txt", "is empty; expected"),
        (tmp_path / "none", r"holds no text \(no files\); expected"),
        (tmp_path / "binary", r"holds no text \(1 binary\); expected"),
        (Path("/dev/null"), "neither a file nor a folder"),
    ):
        with pytest.raises(DataError, match=words) as caught:
            load_text(path)
        assert "\n" not in str(caught.value)


def test_unreadable_paths_get_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "t.txt"
    path.write_text("x" * 100)
    monkeypatch.setattr(np, "memmap", denied)
    with pytest.raises(DataError, match=r"can't be read \(Permission denied\)"):
        load_text(path)
    monkeypatch.setattr("os.scandir", denied)
    with pytest.raises(DataError, match=r"can't be read \(Permission denied\)"):
        load_text(tmp_path)
    with pytest.raises(DataError, match="holds no source of Python's standard library"):
        load_stdlib(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("size", "context"),
    [
        pytest.param(2 * 17, 16, id="shortest"),
        pytest.param(1000, 16, id="one block"),
        pytest.param(5 * BLOCK_BYTES + 123, 128, id="several blocks and a rest"),
        pytest.param(BLOCK_BYTES, 20000, id="context of a third of a block"),
    ],
)
def test_split_is_disjoint_complete_and_even(size: int, context: int) -> None:
    train, validation = split_text(random_text(size), context)
    owner = np.zeros(size, dtype=int)
    for start, end in train.ranges:
        owner[start:end] += 1
        assert end - start >= context + 1
    for start, end in validation.ranges:
        owner[start:end] += 10
        assert end - start >= context + 1
    assert set(owner) == {1, 10}
    if size > BLOCK_BYTES * 2:
        assert validation.num_tokens / size == pytest.approx(0.1, abs=0.005)
        assert len(validation.ranges) == size // BLOCK_BYTES


def test_windows_stay_in_their_slices() -> None:
    data = np.zeros(3 * BLOCK_BYTES, dtype=np.uint8)
    train, validation = split_text(Text("marked", data), 32)
    for start, end in validation.ranges:
        data[start:end] = 1
    sampler = BatchSampler(train, 64, seed=0)
    for _ in range(50):
        tokens, targets = sampler.next()
        assert not tokens.any() and not targets.any()
    starts = validation.evenly_spaced(10**9)
    tokens, targets = validation.gather(starts)
    assert tokens.all() and targets.all()
    targets_read = (starts[:, None] + 1 + np.arange(32)).ravel()
    assert len(set(targets_read.tolist())) == targets_read.size


def test_every_window_can_be_drawn() -> None:
    windows = Windows(np.arange(20, dtype=np.uint8), np.array([[0, 5], [10, 16]]), context=3)
    generator = torch.Generator().manual_seed(0)
    assert set(windows.random(500, generator).tolist()) == {0, 1, 10, 11, 12}
    assert windows.evenly_spaced(100).tolist() == [0, 10]


def test_targets_are_the_next_bytes() -> None:
    text = text_of(bytes(range(200)))
    train, _ = split_text(text, 8)
    tokens, targets = BatchSampler(train, 5, seed=1).next()
    assert tokens.dtype == targets.dtype == torch.int64
    assert tokens.shape == targets.shape == (5, 8)
    assert torch.equal(targets, tokens + 1)


def test_evenly_spaced_windows_reach_every_block() -> None:
    _, validation = split_text(random_text(10 * BLOCK_BYTES), 64)
    starts = validation.evenly_spaced(40)
    assert len(starts) == 40
    assert np.array_equal(starts, validation.evenly_spaced(40))
    assert sorted(set((starts // BLOCK_BYTES).tolist())) == list(range(10))


def test_sampler_repeats_and_resumes() -> None:
    train, _ = split_text(random_text(5000), 16)
    first, second = BatchSampler(train, 4, seed=3), BatchSampler(train, 4, seed=3)
    for _ in range(3):
        torch.rand(7)  # torch's own generator has no say
        assert torch.equal(first.next()[0], second.next()[0])
    state = first.state()
    expected = [first.next()[0] for _ in range(3)]
    resumed = BatchSampler(train, 4, seed=99)
    resumed.set_state(state)
    assert all(torch.equal(resumed.next()[0], batch) for batch in expected)
    assert not torch.equal(expected[0], BatchSampler(train, 4, seed=4).next()[0])


def test_text_shorter_than_two_windows_is_refused() -> None:
    with pytest.raises(DataError, match=r"has 33 bytes, but a context of 16 needs 34") as caught:
        split_text(random_text(33), 16)
    assert "\n" not in str(caught.value)


def test_entropies() -> None:
    assert unigram_entropy(text_of(b"aaaa").data) == 0.0
    assert unigram_entropy(text_of(b"abab").data) == 1.0
    assert unigram_entropy(text_of(bytes(range(256))).data) == 8.0
    assert bigram_entropy(text_of(b"ab" * 500).data) == pytest.approx(0.0, abs=1e-12)
    noise = random_text(1_000_000).data
    assert unigram_entropy(noise) == pytest.approx(8.0, abs=1e-3)
    assert bigram_entropy(noise) <= unigram_entropy(noise)
    counts = {ord("a"): 3, ord("b"): 1}
    exact = -sum(n / 4 * math.log2(n / 4) for n in counts.values())
    assert unigram_entropy(text_of(b"aaab").data) == pytest.approx(exact)


def test_entropies_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    data = random_text(10_007).data
    whole = unigram_entropy(data), bigram_entropy(data), Text("t", data).fingerprint()
    monkeypatch.setattr("fused_lm.lm.text._COUNT_CHUNK", 100)
    assert whole == (unigram_entropy(data), bigram_entropy(data), Text("t", data).fingerprint())
