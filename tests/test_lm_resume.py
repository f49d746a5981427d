"""A run that was stopped, or killed at any moment, goes on as if it never was: bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_lm.lm.checkpoint import FILE_NAME, CheckpointError, read_checkpoint
from fused_lm.lm.gpt import GPTConfig
from fused_lm.lm.restore import load_model
from fused_lm.lm.runlog import read_log
from fused_lm.lm.settings import TrainConfig, TrainError
from fused_lm.lm.text import Text, load_stdlib
from fused_lm.lm.train import train

MODEL = GPTConfig(context=16, num_layers=1, embed_dim=16, num_heads=2, dropout=0.1)
TEXT = Text("sample", load_stdlib().data[:100_000])


@pytest.fixture(autouse=True)
def _one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """These models are too small for more, and a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(out: Path, **fields: Any) -> TrainConfig:
    small = {"batch": 4, "lr": 1e-2, "eval_tokens": 128, "final_eval_tokens": 256, "plot": False}
    return TrainConfig(out=out, device="cpu", **(small | fields))


def losses(out: Path) -> list[tuple[Any, ...]]:
    """All that a log says of what was learned, in order."""
    names = ("kind", "step", "loss", "bits_per_byte", "grad_norm", "loss_scale", "accuracy")
    entries = [e for e in read_log(out / "log.jsonl") if e["kind"] != "begin"]
    return [tuple(entry.get(name) for name in names) for entry in entries]


OPTIONS = [
    pytest.param({}, id="bytes"),
    pytest.param({"tokenizer": "bpe", "vocab_size": 300}, id="bpe"),
    pytest.param({"accumulate": 2, "grad_clip": 0.1}, id="accumulate and clip"),
    pytest.param({"precision": "bf16"}, id="bf16"),
    pytest.param({"precision": "fp16", "accumulate": 2}, id="fp16 with its loss scale"),
    pytest.param({"compile": True}, id="compile", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    every = {"steps": 12, "log_every": 3, "eval_every": 4}
    train(config(tmp_path / "whole", **every, **options), MODEL, TEXT)
    half = config(tmp_path / "half", **every, **options)
    for stop_at, resume in ((3, False), (5, True), (10, True)):
        steps: list[dict[str, Any]] = []
        stopped = train(
            replace(half, resume=resume),
            None if resume else MODEL,
            TEXT,
            lambda event, steps=steps: steps.append(event) if event["event"] == "step" else None,
            lambda steps=steps, stop_at=stop_at: bool(steps) and steps[-1]["step"] >= stop_at,
        )
        assert stopped.interrupted and stopped.step == stop_at
        torch.manual_seed(99)
        random.seed(99)
    train(replace(half, resume=True), None, TEXT)
    assert losses(tmp_path / "half") == losses(tmp_path / "whole")
    expected, got = (
        read_checkpoint(tmp_path / name, training_state=True) for name in ("whole", "half")
    )
    for part in ("weights", "optimizer", "generators"):
        tensors = getattr(expected, part)
        assert tensors.keys() == getattr(got, part).keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, getattr(got, part)[name]), (part, name)
    assert expected.tokenizer == got.tokenizer
    assert expected.run.get("scaler") == got.run.get("scaler")


def test_resuming_needs_nothing_but_checkpoint_and_text(tmp_path: Path) -> None:
    run = config(tmp_path / "run", steps=2, tokenizer="bpe", vocab_size=300)
    train(run, MODEL, TEXT)
    for path in (tmp_path / "cache" / "fused_lm" / "tokens").iterdir():
        path.unlink()
    resumed = TrainConfig(tmp_path / "run", steps=3, resume=True, device="cpu", plot=False)
    assert train(resumed, None, TEXT).step == 3
    model, checkpoint = load_model(tmp_path / "run")
    assert model.config.vocab_size == 300 and checkpoint.tokenizer is not None


def test_a_run_killed_after_its_last_step_is_evaluated_and_finished(tmp_path: Path) -> None:
    def die_at(event: dict[str, Any]) -> None:
        if event["event"] == "validation" and event["final"]:
            raise KeyboardInterrupt

    every = {"steps": 4, "log_every": 1, "save_every": 2}
    train(config(tmp_path / "whole", **every), MODEL, TEXT)
    cut = config(tmp_path / "cut", **every)
    with pytest.raises(KeyboardInterrupt):
        train(cut, MODEL, TEXT, die_at)
    result = train(replace(cut, resume=True), None, TEXT)
    assert result.step == 4 and not result.interrupted
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    with pytest.raises(TrainError, match="is complete after 4 steps"):
        train(replace(cut, resume=True), None, TEXT)


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "bf16"},
        {"accumulate": 4},
        {"compile": True},
        {"tokenizer": "bpe"},
        {"vocab_size": 300},
        {"grad_clip": 2.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_resumed_run_keeps_its_settings(tmp_path: Path, change: dict[str, Any]) -> None:
    train(config(tmp_path / "run", steps=1), MODEL, TEXT)
    with pytest.raises(TrainError, match=r"which a resumed run keeps; got"):
        train(config(tmp_path / "run", steps=2, resume=True, **change), None, TEXT)


def test_checkpoint_of_before_these_settings_is_resumed(tmp_path: Path) -> None:
    """Version 1 as it was first written: no precision, no tokenizer, one random state of torch."""
    from tests.test_lm_checkpoint import rewrite

    train(config(tmp_path / "run", steps=2), MODEL, TEXT)
    file = tmp_path / "run" / FILE_NAME
    run = read_checkpoint(file).run
    del run["since_log"]
    for name in ("tokenizer", "vocab_size", "accumulate", "precision", "compile"):
        del run["settings"][name]
    rewrite(file, run=run, drop=["generator/python"])
    result = train(config(tmp_path / "run", steps=3, resume=True), None, TEXT)
    assert result.step == 3
    rewrite(file, drop=["generator/torch"])
    with pytest.raises(CheckpointError, match="lacks the state of its run"):
        train(config(tmp_path / "run", steps=4, resume=True), None, TEXT)


KILLED = """
import sys
from pathlib import Path
import torch
from tests.test_lm_resume import MODEL, TEXT, killed_config
from fused_lm.lm.train import train
torch.set_num_threads(1)
resume = (Path(sys.argv[1]) / "checkpoint.safetensors").is_file()
train(killed_config(Path(sys.argv[1]), int(sys.argv[2]), resume), None if resume else MODEL, TEXT)
"""


def killed_config(out: Path, steps: int, resume: bool = False) -> TrainConfig:
    """Saves so often that most moments are moments of saving."""
    options = {"tokenizer": "bpe", "vocab_size": 300, "precision": "bf16", "accumulate": 2}
    every = {"steps": steps, "log_every": 1, "eval_every": 25, "save_every": 2}
    return config(out, resume=resume, overwrite=not resume, **options, **every)


def run_and_kill(out: Path, steps: int, after_s: float | None, from_start: bool = False) -> bool:
    """Runs or goes on; kills the process some time after its start or first step, or never.

    Returns:
        Whether it ended by itself.
    """
    before = len(read_log(out / "log.jsonl"))
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(out), str(steps)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[1],
    )
    try:
        deadline = time.monotonic() + 120
        while after_s is not None and process.poll() is None:
            assert time.monotonic() < deadline
            stepped = len(read_log(out / "log.jsonl")) > before
            if from_start or (stepped and (out / FILE_NAME).is_file()):
                time.sleep(after_s)
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.02)
        return process.wait(120) == 0
    finally:
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "steps"), [(1, 120), (20, 2000)])
def test_killed_at_random_moments(tmp_path: Path, kills: int, steps: int) -> None:
    moments = random.Random(kills)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(killed_config(whole, steps), MODEL, TEXT)
    saved = []
    for kill in range(kills):
        if kill % 4 == 3:  # while it starts, reads its checkpoint and cuts its log
            assert not run_and_kill(cut, steps, moments.uniform(0.5, 3.0), from_start=True)
            load_model(cut)
            continue
        assert not run_and_kill(cut, steps, moments.uniform(0.0, 0.15)), "it ended unkilled"
        model, checkpoint = load_model(cut)
        assert all(torch.isfinite(p).all() for p in model.parameters())
        saved.append(checkpoint.step)
    assert saved == sorted(saved) and saved[0] > 0
    assert run_and_kill(cut, steps, None)
    assert losses(cut) == losses(whole)
    expected, got = read_checkpoint(whole).weights, read_checkpoint(cut).weights
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    left = {path.name for path in cut.iterdir()}
    assert left == {FILE_NAME, "log.jsonl"}
