"""Training: the loop, its log and curve, resuming bit for bit, and what can go wrong on the way."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fused_lm.lm import sizing
from fused_lm.lm.checkpoint import FILE_NAME, CheckpointError, read_checkpoint
from fused_lm.lm.gpt import GPTConfig
from fused_lm.lm.plot import draw_curve, smooth
from fused_lm.lm.restore import load_model
from fused_lm.lm.runlog import RunLog, read_log
from fused_lm.lm.settings import TrainConfig, TrainError
from fused_lm.lm.text import Text
from fused_lm.lm.train import train

MODEL = GPTConfig(context=16, num_layers=1, embed_dim=16, num_heads=2, dropout=0.1)
TEXT = Text("rhyme", np.frombuffer(b"how much wood would a woodchuck chuck\n" * 60, dtype=np.uint8))


OTHER_PROGRAMS = 1.5
"""Slack of the one test that holds a run to the wall clock, on machines that do other work too."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These models are too small for more, and threads that wait for busy cores take minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(out: Path, **fields: Any) -> TrainConfig:
    small = {"batch": 4, "lr": 1e-2, "eval_tokens": 128, "final_eval_tokens": 256, "plot": False}
    small |= {"device": "cpu"}  # a GPU repeats its bits only where asked to
    return TrainConfig(out=out, **(small | fields))


def weights(out: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(out).weights


def test_training_learns_logs_and_saves(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    result = train(
        config(tmp_path / "run", steps=60, eval_every=20, log_every=5, save_every=30, plot=True),
        MODEL,
        TEXT,
        events.append,
    )
    assert not result.interrupted and result.step == 60
    assert result.ratio is not None and result.ratio < 1.0, "it knows no more than frequencies"
    log = read_log(result.log)
    train_lines = [e for e in log if e["kind"] == "train"]
    assert [e["step"] for e in train_lines] == list(range(5, 61, 5))
    assert train_lines[-1]["bits_per_byte"] < train_lines[0]["bits_per_byte"]
    assert {"loss", "lr", "tokens_per_s", "grad_norm", "elapsed_s"} <= train_lines[0].keys()
    assert [e["step"] for e in log if e["kind"] == "validation"] == [20, 40, 60, 60]
    assert log[-1]["bits_per_byte"] == result.validation_bits
    assert [e["step"] for e in events if e["event"] == "saved"] == [30, 60, 60]
    assert [e["event"] for e in events].count("step") == 60
    assert result.curve is not None
    assert result.curve.read_bytes().startswith(b"\x89PNG")
    model, checkpoint = load_model(tmp_path / "run")
    assert checkpoint.step == 60 and model.config == MODEL
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {FILE_NAME, "log.jsonl", "curve.png"}


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, positions: str) -> None:
    model = replace(MODEL, positions=positions)
    train(config(tmp_path / "whole", steps=12, log_every=1), model, TEXT)
    stop_at = iter(range(1, 100))
    half = config(tmp_path / "half", steps=12, log_every=1)
    first = train(half, model, TEXT, should_stop=lambda: next(stop_at) >= 5)
    assert first.interrupted and first.step == 5
    torch.manual_seed(99)
    second = train(replace(half, resume=True), None, TEXT)
    assert second.step == 12
    expected, got = weights(tmp_path / "whole"), weights(tmp_path / "half")
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    losses = [
        {
            (e["step"], e["loss"])
            for e in read_log(tmp_path / name / "log.jsonl")
            if e["kind"] == "train"
        }
        for name in ("whole", "half")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 12


def test_log_of_a_killed_run_loses_the_steps_taken_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(config(out, steps=4, log_every=1), MODEL, TEXT)
    with open(out / "log.jsonl", "a") as log:
        log.write(json.dumps({"kind": "train", "step": 9}) + '\n{"cut')
    train(config(out, steps=6, log_every=1, resume=True), None, TEXT)
    assert max(e["step"] for e in read_log(out / "log.jsonl")) == 6


def test_timed_run_ends_in_time_and_decays(tmp_path: Path) -> None:
    started = time.perf_counter()
    timed = config(tmp_path / "run", minutes=0.12, log_every=1)
    events: list[dict[str, Any]] = []
    result = train(timed, MODEL, TEXT, events.append)
    assert time.perf_counter() - started < OTHER_PROGRAMS * 60 * 0.12
    rates = [e["lr"] for e in read_log(result.log) if e["kind"] == "train"]
    assert rates[-1] < 0.2 * max(rates)
    measured = [e["measured"] for e in events if e["event"] == "measured"]
    assert len(measured) == 1, "a given model is measured, not chosen"
    with pytest.raises(TrainError, match=r"is complete after .* minutes"):
        train(replace(timed, resume=True, log_every=None), None, TEXT)


def test_timed_run_chooses_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ladder = tuple(replace(r, context=16, batch=2) for r in sizing.LADDER[:2])
    monkeypatch.setattr(sizing, "LADDER", ladder)
    monkeypatch.setattr(sizing, "LEAST_STEPS", 1)
    monkeypatch.setattr(sizing, "TOKENS_PER_PARAMETER", 1e-6)
    monkeypatch.setattr(sizing, "PARAMETERS_PER_BYTE", 1e9)
    monkeypatch.setattr(sizing, "MEASURING_SHARE", 1.0)
    ticks = iter(range(10**9))
    result = train(
        config(tmp_path / "run", minutes=1.0, model_fields={"norm": "rms_norm"}),
        None,
        TEXT,
        clock=lambda: float(next(ticks)),
    )
    model, _ = load_model(result.checkpoint)
    assert model.config.embed_dim == ladder[1].width
    assert model.config.norm == "rms_norm"


def test_diverged_run_stops_before_it_saves(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"no longer finite .* smaller --lr"):
        train(config(tmp_path / "run", steps=50, lr=1e30, log_every=1), MODEL, TEXT)
    assert not (tmp_path / "run" / FILE_NAME).exists()


def test_diverged_run_is_noticed_by_an_evaluation_too(tmp_path: Path) -> None:
    """The first update ruins the weights; no log line stands between it and the evaluation."""
    for more in ({"steps": 50, "eval_every": 2, "log_every": 50}, {"steps": 1}):
        with pytest.raises(TrainError, match=r"no longer finite at step .* start again with a sm"):
            train(config(tmp_path / "run", lr=1e30, **more), MODEL, TEXT)
        assert not (tmp_path / "run" / FILE_NAME).exists()


def test_one_run_at_a_time_in_a_folder(tmp_path: Path) -> None:
    refused = []

    def second(event: dict[str, Any]) -> None:
        if event["event"] == "step" and not refused:
            with pytest.raises(TrainError, match="another run is going on in") as caught:
                train(config(tmp_path / "run", steps=1, overwrite=True), MODEL, TEXT)
            refused.append(caught)

    train(config(tmp_path / "run", steps=2), MODEL, TEXT, second)
    assert refused
    train(config(tmp_path / "run", steps=3, resume=True), None, TEXT)


def test_a_new_run_replaces_the_old_one_only_when_it_stands(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(config(out, steps=1), MODEL, TEXT)
    with pytest.raises(ValueError, match="Overflow"):
        train(config(out, steps=1, overwrite=True, seed=2**70), MODEL, TEXT)
    assert read_checkpoint(out).step == 1


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "log.jsonl").write_text('{"kind": "begin", "step": 0}\n')
    assert train(config(out, steps=1), MODEL, TEXT).step == 1


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Whole contents of one of them at every instant, and none of them fails."""
    program = (
        "import sys; from pathlib import Path; from fused_lm.lm.atomic import write_atomically\n"
        "for _ in range(100): write_atomically(Path(sys.argv[1]), sys.argv[2].encode() * 10000)"
    )
    path = tmp_path / "file"
    writers = [
        subprocess.Popen([sys.executable, "-c", program, str(path), letter]) for letter in "ab"
    ]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            seen.add(path.read_bytes())
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen <= {b"a" * 10000, b"b" * 10000} and seen
    assert [left.name for left in tmp_path.iterdir()] == ["file"]


def test_full_disk_on_the_way_is_a_warning_and_at_the_end_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync
    failures = iter([True, False, False, False, False, False])

    def sometimes_full(handle: int) -> None:
        if next(failures, False):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    events: list[dict[str, Any]] = []
    run = config(tmp_path / "run", steps=4, save_every=2)

    def on_event(event: dict[str, Any]) -> None:
        events.append(event)
        if event["event"] == "begin":
            monkeypatch.setattr(os, "fsync", sometimes_full)

    train(run, MODEL, TEXT, on_event)
    warnings = [e["message"] for e in events if e["event"] == "warning"]
    assert len(warnings) == 1 and "No space left" in warnings[0]
    before = (tmp_path / "run" / FILE_NAME).read_bytes()
    failures = iter([True] * 100)
    monkeypatch.setattr(os, "fsync", real)
    with pytest.raises(CheckpointError, match="untouched"):
        train(replace(run, steps=6, resume=True), None, TEXT, on_event)
    assert (tmp_path / "run" / FILE_NAME).read_bytes() == before


def test_log_on_a_full_disk_drops_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunLog(tmp_path / "log.jsonl") as log:
        log.write({"step": 1})

        class Full:
            def write(self, line: str) -> None:
                raise OSError(errno.ENOSPC, "No space left on device")

        real, log._file = log._file, Full()  # type: ignore[assignment]
        log.write({"step": 2})
        assert log.problem is not None and "No space left" in log.problem
        log._file = real
        log.write({"step": 3})
        assert log.problem is None
    assert [e["step"] for e in read_log(tmp_path / "log.jsonl")] == [1, 3]
    assert read_log(tmp_path / "none") == []


def test_curve_of_little_and_of_strange_data(tmp_path: Path) -> None:
    for name, entries in {
        "empty": [],
        "one": [{"kind": "train", "step": 1, "bits_per_byte": 8.0, "lr": 0.1}],
        "flat": [{"kind": "validation", "step": 1, "bits_per_byte": 0.0}],
    }.items():
        for unigram_bits in (0.0, 4.5):
            path = draw_curve(
                entries,
                tmp_path / f"{name}.png",
                title="a\nb",
                unigram_bits=unigram_bits,
                bigram_bits=unigram_bits,
            )
            assert path.stat().st_size > 1000
    assert smooth([1.0, 2.0, 6.0], 1) == [1.0, 3.0, 6.0]
