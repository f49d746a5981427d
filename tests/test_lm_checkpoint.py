"""Checkpoints: exact, written whole or not at all, and every wrong file refused in one sentence."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fused_lm.lm.checkpoint import (
    FILE_NAME,
    CheckpointError,
    optimizer_tensors,
    read_checkpoint,
    save_checkpoint,
)
from fused_lm.lm.gpt import GPT, GPTConfig
from fused_lm.lm.restore import load_model, load_optimizer

CONFIG = GPTConfig(context=16, num_layers=1, embed_dim=16, num_heads=2)
RUN = {"settings": {"lr": 0.1}, "seconds": 1.5}


def trained_model(**fields: Any) -> tuple[GPT, torch.optim.AdamW]:
    config = GPTConfig(**(CONFIG.to_dict() | fields))
    model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(0, 256, (2, 16))
    model.loss(tokens, tokens.roll(-1, 1)).backward()
    optimizer.step()
    return model, optimizer


def save(path: Path, model: GPT, **kwargs: Any) -> int:
    return save_checkpoint(path, model, model.config.to_dict(), step=7, run=RUN, **kwargs)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model, optimizer = trained_model()
    save(
        tmp_path / FILE_NAME,
        model,
        optimizer=optimizer,
        generators={"torch": torch.get_rng_state()},
    )
    return tmp_path / FILE_NAME


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize("tie_head", [True, False])
def test_round_trip_is_exact(tmp_path: Path, tie_head: bool) -> None:
    model, optimizer = trained_model(tie_head=tie_head)
    rng = torch.get_rng_state()
    size = save(tmp_path / FILE_NAME, model, optimizer=optimizer, generators={"torch": rng})
    assert size == (tmp_path / FILE_NAME).stat().st_size
    loaded, checkpoint = load_model(tmp_path)
    assert checkpoint.step == 7
    assert checkpoint.run == RUN
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert not checkpoint.optimizer

    fresh = torch.optim.AdamW(loaded.parameters(), fused=True)
    checkpoint = read_checkpoint(tmp_path, training_state=True)
    load_optimizer(fresh, loaded, checkpoint)
    expected, got = optimizer_tensors(optimizer, model), optimizer_tensors(fresh, loaded)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert torch.equal(checkpoint.generators["torch"], rng)


class Tied(torch.nn.Module):
    """A model whose state dict names one tensor twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(5, 3)
        self.head = torch.nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model = Tied()
    save_checkpoint(tmp_path / FILE_NAME, model, {}, step=0, run={})
    with safe_open(str(tmp_path / FILE_NAME), framework="pt") as stored:
        assert list(stored.keys()) == ["model/embedding.weight"]
    weights = read_checkpoint(tmp_path).weights
    assert weights.keys() == model.state_dict().keys()
    model.load_state_dict(weights)


def test_only_safetensors_is_written(saved: Path) -> None:
    assert [path.name for path in saved.parent.iterdir()] == [FILE_NAME]
    with safe_open(str(saved), framework="pt") as stored:
        header = stored.metadata()
    assert header["format"] == "fused_lm.checkpoint"
    assert json.loads(header["fused_lm"])["vocabulary"] == "bytes"


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.1, 0.5, 0.9, 0.9999])
def test_truncated_file_is_refused(saved: Path, share: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(len(content) * share)])
    assert "corrupt or cut off" in refusal(saved)


def test_changed_byte_is_refused(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    data_start = 8 + int.from_bytes(content[:8], "little")
    first_byte, _ = json.loads(content[8:data_start])["model/tokens.weight"]["data_offsets"]
    content[data_start + first_byte] ^= 1
    saved.write_bytes(content)
    assert "the checksum of model/tokens.weight differs" in refusal(saved)


def test_garbage_is_refused(saved: Path) -> None:
    for content in (b"hello", b"\0" * 1000, b"{}" * 50, os.urandom(500)):
        saved.write_bytes(content)
        assert "expected a whole checkpoint" in refusal(saved) or content[:1] == b"\x80"


@pytest.mark.parametrize("how", ["torch.save", "old torch.save", "pickle"])
def test_pickles_are_refused_unopened(tmp_path: Path, how: str) -> None:
    path = tmp_path / "model.pt"
    trap = tmp_path / "trap"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (trap,))

    if how == "pickle":
        path.write_bytes(pickle.dumps(Trap()))
    else:
        torch.save({"x": Trap()}, path, _use_new_zipfile_serialization=how == "torch.save")
    message = refusal(path)
    assert "pickles are never loaded" in message
    assert f"expected a {FILE_NAME}" in message
    assert not trap.exists()


def rewrite(path: Path, **changes: Any) -> None:
    """Writes a checkpoint again with another header or document."""
    with safe_open(str(path), framework="pt") as stored:
        header = stored.metadata()
        tensors = {name: stored.get_tensor(name) for name in list(stored.keys())}
    document = json.loads(header["fused_lm"])
    for name in changes.pop("drop", ()):
        del tensors[name]
    tensors |= changes.pop("add", {})
    for name, value in changes.items():
        if name in header:
            header[name] = value
        else:
            document[name] = value
    header["fused_lm"] = changes.get("fused_lm", json.dumps(document))
    save_file(tensors, path, metadata=header)


def test_foreign_safetensors_are_refused(tmp_path: Path) -> None:
    for metadata in (None, {"format": "pt"}):
        save_file({"x": torch.ones(3)}, tmp_path / "a.safetensors", metadata=metadata)
        assert "of another program" in refusal(tmp_path / "a.safetensors")


def test_other_versions_and_headers_are_refused(saved: Path) -> None:
    content = saved.read_bytes()
    for changes, words in (
        ({"format_version": "2"}, "has format version 2; this fused_lm reads version 1"),
        ({"vocabulary": "words"}, "has the vocabulary 'words'; this fused_lm reads bytes and bpe"),
        ({"vocabulary": "bpe"}, "has the vocabulary 'bpe' and no tokenizer"),
        ({"fused_lm": "no json"}, "corrupt or cut off"),
        ({"fused_lm": "[]"}, "no valid 'config'"),
        ({"step": "seven"}, "no valid 'step'"),
        ({"config": {}}, "can't be built"),
        ({"config": CONFIG.to_dict() | {"num_heads": 3}}, "can't be built"),
        ({"config": CONFIG.to_dict() | {"wings": 2}}, "can't be built"),
    ):
        saved.write_bytes(content)
        rewrite(saved, **changes)
        assert words in refusal(saved), changes


def test_weights_must_fit_their_own_configuration(saved: Path) -> None:
    content = saved.read_bytes()
    name = "model/tokens.weight"
    rewrite(saved, drop=[name])
    assert "lacks tokens.weight" in refusal(saved)
    saved.write_bytes(content)
    rewrite(saved, config=CONFIG.to_dict() | {"embed_dim": 32})
    message = refusal(saved)
    assert "[256, 16]" in message or "expects" in message
    saved.write_bytes(content)
    rewrite(saved, config=CONFIG.to_dict() | {"num_layers": 2})
    assert "lacks blocks.1" in refusal(saved)


def test_optimizer_state_must_fit(saved: Path) -> None:
    other = GPT(GPTConfig(**(CONFIG.to_dict() | {"ffn_dim": 32})))
    same, _ = load_model(saved)
    for model, dropped in ((other, []), (same, ["optimizer/exp_avg/tokens.weight"])):
        rewrite(saved, drop=dropped)
        checkpoint = read_checkpoint(saved, training_state=True)
        with pytest.raises(CheckpointError, match="no optimizer state that fits"):
            load_optimizer(torch.optim.AdamW(model.parameters()), model, checkpoint)


def test_missing_paths(tmp_path: Path) -> None:
    assert "does not exist; expected the folder of a training run" in refusal(tmp_path / "no")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_model(tmp_path)


@pytest.mark.parametrize("broken", ["write", "fsync", "replace"])
def test_full_disk_leaves_the_old_checkpoint(
    saved: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    before = saved.read_bytes()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    class FullFile:
        def __init__(self, path: Path, mode: str) -> None:
            self.file = open(path, mode)  # noqa: SIM115 - closed in __exit__

        def __enter__(self) -> FullFile:
            return self

        def __exit__(self, *exception: object) -> None:
            self.file.close()

        def write(self, content: bytes) -> None:
            self.file.write(content[: len(content) // 2])
            full()

    if broken == "write":
        monkeypatch.setattr("fused_lm.lm.atomic.open", FullFile, raising=False)
    else:
        monkeypatch.setattr(os, broken, full)
    model, optimizer = trained_model()
    with pytest.raises(CheckpointError, match=r"\(No space left on device\); expected") as caught:
        save(saved, model, optimizer=optimizer)
    assert "untouched" in str(caught.value)
    monkeypatch.undo()
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [FILE_NAME]
    load_model(saved)


def test_interrupted_write_leaves_the_old_checkpoint(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    before = saved.read_bytes()
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(saved, trained_model()[0])
    monkeypatch.undo()
    assert saved.read_bytes() == before
    assert len(list(saved.parent.iterdir())) == 1


LIMITED = """
import resource, sys
from pathlib import Path
from fused_lm.lm.atomic import write_atomically
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_atomically(Path(sys.argv[1]), b"new" * 1000)
except OSError as error:
    sys.exit(3)
"""


def test_a_real_limit_on_file_size_leaves_the_old_file(tmp_path: Path) -> None:
    if not hasattr(resource, "RLIMIT_FSIZE"):
        pytest.skip("this system has no limit on file size")
    path = tmp_path / "file"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", LIMITED, str(path)], check=False)
    assert done.returncode == 3
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_unwritable_folder_gets_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match=r"can't be written .*expected a writable") as caught:
        save(tmp_path / "file" / FILE_NAME, trained_model()[0])
    assert "\n" not in str(caught.value)
    assert "untouched" not in str(caught.value)
