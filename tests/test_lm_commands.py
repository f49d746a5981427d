"""``fused-lm train`` and ``generate``: what they print, their errors, and Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fused_lm import cli
from fused_lm.lm.checkpoint import FILE_NAME, read_checkpoint
from fused_lm.lm.pycheck import count_tokenizable, tokenizes
from fused_lm.lm.restore import load_model
from fused_lm.lm.runlog import read_log
from fused_lm.lm.text import Text

TEXT = Text("rhyme", np.frombuffer(b"how much wood would a woodchuck chuck\n" * 60, dtype=np.uint8))


@pytest.fixture(autouse=True)
def _one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """These models are too small for more, and threads that wait for busy cores take minutes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "rhyme.txt"
    path.write_bytes(TEXT.data.tobytes())
    return path


SMALL = ["--layers", "1", "--width", "16", "--heads", "2", "--context", "16", "--batch", "2"]


def test_command_trains_and_generates(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    common = ["train", "--data", str(text_file), "--out", out, *SMALL]
    assert cli.main([*common, "--steps", "3", "--no-plot"]) == 0
    printed = capsys.readouterr().out
    for words in ("validation ", "unigram entropy", "ratio", f"{FILE_NAME}", "log.jsonl"):
        assert words in printed
    assert cli.main([*common, "--steps", "3"]) == 2
    assert "already holds a run; expected --resume" in capsys.readouterr().err
    resume = ["train", "--data", str(text_file), "--out", out, "--resume"]
    assert cli.main([*resume]) == 2
    assert "is complete after 3 steps; give a larger --steps" in capsys.readouterr().err
    assert cli.main([*resume, "--steps", "5", "--width", "32"]) == 2
    assert "begun with embed_dim 16" in capsys.readouterr().err
    assert cli.main(["train", "--out", out, "--resume", "--steps", "5"]) == 2
    assert "trained on another text than python-stdlib" in capsys.readouterr().err
    assert cli.main([*resume, "--steps", "5", "--no-plot"]) == 0
    assert read_checkpoint(out).step == 5
    assert cli.main([*common, "--steps", "2", "--overwrite", "--no-plot"]) == 0
    assert read_checkpoint(out).step == 2
    capsys.readouterr()

    sample = ["generate", "--checkpoint", out, "--bytes", "40"]
    assert cli.main([*sample, "--prompt", "how é", "--check-python"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("how é") and "tokenize accepts" in first
    assert cli.main([*sample, "--prompt", "how é", "--check-python"]) == 0
    assert capsys.readouterr().out == first
    assert cli.main([*sample, "--seed", "1", "--top-k", "5", "--top-p", "0.9"]) == 0
    assert cli.main([*sample, "--temperature", "0"]) == 0


BPE = ["--tokenizer", "bpe", "--vocab-size", "270"]


@pytest.mark.parametrize("tokenizer", [[], BPE], ids=["bytes", "bpe"])
def test_eval_scores_the_held_out_text(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer: list[str]
) -> None:
    out = str(tmp_path / "run")
    train = ["train", "--data", str(text_file), "--out", out, *SMALL, *tokenizer, "--steps", "40"]
    assert cli.main([*train, "--no-plot", "--lr", "0.01"]) == 0
    last = read_log(tmp_path / "run" / "log.jsonl")[-1]
    assert f"perplexity {last['perplexity']:.2f}, {100 * last['accuracy']:.1f} % right" in (
        capsys.readouterr().out
    )
    assert cli.main(["eval", out, "--data", str(text_file)]) == 0
    printed = capsys.readouterr().out
    assert "held out from training" in printed
    assert f"{last['tokens']} tokens, {last['bytes']} bytes" in printed
    for name, value in (
        ("loss", f"{last['loss']:.4f} nats"),
        ("perplexity", f"{last['perplexity']:.3f}"),
        ("bits per byte", f"{last['bits_per_byte']:.4f}"),
        ("accuracy", f"{100 * last['accuracy']:.2f} %"),
    ):
        assert re.search(rf"^{name} +{re.escape(value)}", printed, re.MULTILINE), (name, printed)
    other = tmp_path / "other.txt"
    other.write_text("how much wood would a woodchuck chuck\n" * 20)
    assert cli.main(["eval", out, "--data", str(other), "--tokens", "64"]) == 0
    assert "trained on another text" in capsys.readouterr().out

    sample = ["generate", "--checkpoint", out, "--prompt", "how é", "--temperature", "0"]
    assert cli.main([*sample, "--bytes", "40"]) == 0
    written = capsys.readouterr().out.encode()
    assert written.startswith("how é".encode())
    assert len(written) >= len("how é".encode()) + 40 + 1, "what is no UTF-8 is shown longer"
    assert cli.main([*sample, "--tokens", "7"]) == 0
    assert capsys.readouterr().out.startswith("how é")


def test_missing_packages_are_named(
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    common = ["train", "--data", str(text_file), *SMALL, "--steps", "1", "--no-plot"]
    assert cli.main([*common, "--out", str(tmp_path / "a"), *BPE]) == 0
    capsys.readouterr()
    for package, arguments in (
        ("tokenizers", [*common, "--out", str(tmp_path / "b"), *BPE]),
        ("tokenizers", ["eval", str(tmp_path / "a"), "--data", str(text_file)]),
        ("tokenizers", ["generate", "--checkpoint", str(tmp_path / "a")]),
        ("tensorboard", [*common, "--out", str(tmp_path / "c"), "--tensorboard"]),
    ):
        with monkeypatch.context() as patch:
            for name in (package, "torch.utils.tensorboard"):
                patch.setitem(sys.modules, name, None)
            assert cli.main(arguments) == 2, arguments
        err = capsys.readouterr().err
        assert f"needs the package {package}" in err and "fused_lm[train]" in err, err
        assert err.count("\n") == 1


def test_tensorboard_shows_the_log(text_file: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    common = ["train", "--data", str(text_file), "--out", str(out), "--tensorboard", "--no-plot"]
    small = [*SMALL, "--log-every", "1", "--eval-every", "2"]
    assert cli.main([*common, *small, "--steps", "4"]) == 0
    assert cli.main([*common, "--resume", "--steps", "6"]) == 0
    shown = EventAccumulator(str(out / "tensorboard"))
    shown.Reload()
    log = read_log(out / "log.jsonl")
    for kind, name in (("train", "loss"), ("train", "lr"), ("validation", "accuracy")):
        expected = [(e["step"], e[name]) for e in log if e["kind"] == kind]
        got = [(e.step, e.value) for e in shown.Scalars(f"{kind}/{name}")]
        assert got == [(step, pytest.approx(value)) for step, value in expected]


def test_command_errors_are_one_sentence(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    pickled = tmp_path / "model.pt"
    torch.save({"x": torch.ones(1)}, pickled)
    data = ["train", "--data", str(text_file), "--steps", "1"]
    for arguments, words in (
        (["train", "--data", str(tmp_path / "no")], "does not exist"),
        (["train", "--data", str(short), "--out", str(tmp_path / "o")], "needs 258"),
        ([*data, "--out", str(text_file / "run")], "can't be written"),
        ([*data, "--out", str(tmp_path / "new"), "--resume"], "no checkpoint to resume"),
        ([*data, "--resume", "--overwrite"], "either resumed or overwritten"),
        ([*data, "--out", str(tmp_path / "o"), "--device", "tpu9"], "can't be used here"),
        ([*data, "--out", str(tmp_path / "o"), "--width", "33", "--heads", "2"], "embed_dim"),
        ([*data, "--out", str(tmp_path / "o"), "--positions", "guessed"], "positions"),
        ([*data, "--out", str(tmp_path / "o"), "--tokenizer", "words"], "one of bytes, bpe"),
        ([*data, "--out", str(tmp_path / "o"), "--vocab-size", "300"], "with --tokenizer bpe"),
        ([*data, "--out", str(tmp_path / "o"), "--precision", "fp8"], "one of auto, fp32"),
        ([*data, "--out", str(tmp_path / "o"), "--parallel", "ddp"], "torchrun"),
        ([*data, "--out", str(tmp_path / "o"), "--parallel", "tp"], "one of auto, none, ddp"),
        ([*data, "--out", str(tmp_path / "o"), "--batch", "3", "--accumulate", "2"], "2 divides"),
        (["eval", str(tmp_path / "no")], "does not exist"),
        (["eval", str(pickled)], "pickles are never loaded"),
        (["generate", "--checkpoint", str(tmp_path / "no")], "does not exist"),
        (["generate", "--checkpoint", str(pickled)], "pickles are never loaded"),
        (["generate", "--checkpoint", str(text_file)], "corrupt"),
        (["generate", "--checkpoint", str(tmp_path), "--top-p", "2"], "at most 1"),
    ):
        assert cli.main(arguments) == 2, arguments
        err = capsys.readouterr().err
        assert words in err and err.startswith("error: ") and err.count("\n") == 1, err
        assert "Traceback" not in err
    huge = str(10**20)
    for arguments in (
        ["--steps", "0"],
        ["--minutes", "x"],
        ["--minutes", "inf"],
        ["--lr", "-1"],
        ["--lr", "nan"],
        ["--batch", "1.5"],
        ["--seed", huge],
        ["--vocab-size", huge],
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(["train", *arguments])
        assert caught.value.code == 2
        assert "expected a" in capsys.readouterr().err, arguments


def test_ctrl_c_saves_and_loses_nothing(text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "fused_lm.cli", "train", "--data", str(text_file)]
    command += ["--out", str(out), *SMALL, "--steps", "1000000", "--log-every", "1"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 60
        while not any(e.get("step", 0) >= 2 for e in read_log(out / "log.jsonl")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "nothing lost" in err and "Traceback" not in err
    _, checkpoint = load_model(out)
    assert checkpoint.step == max(e["step"] for e in read_log(out / "log.jsonl"))
    assert f"stopped at step {checkpoint.step}" in err


def test_lines_that_tokenize() -> None:
    for line in ("x = 1", "    return f(a, b)", "# words", "for x in y:", "pass"):
        assert tokenizes(line), line
    for line in ("x = (", "'open", '"""', "a $ b", "it's"):
        assert not tokenizes(line), line
    content = b"prompt (\ncontinued\n\nx = (\ny = 2\ncut off ("
    assert count_tokenizable(content) == (2, 4)
    assert count_tokenizable(content, begin=len(b"prompt (\ncon")) == (2, 3)
    assert count_tokenizable(b"no line end") == (0, 0)
