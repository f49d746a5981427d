"""Two processes over gloo train as one does, and end together: a mistake, Ctrl-C, a lost peer."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_lm.lm.checkpoint import read_checkpoint
from fused_lm.lm.gpt import GPT, GPTConfig
from fused_lm.lm.parallel import join
from fused_lm.lm.restore import load_model
from fused_lm.lm.runlog import read_log
from fused_lm.lm.settings import TrainConfig
from fused_lm.lm.step import LossModule, make_optimizer
from fused_lm.lm.text import Text, load_stdlib
from fused_lm.lm.train import train

MODEL = GPTConfig(context=16, num_layers=2, embed_dim=20, num_heads=2, ffn_dim=37)
"""An odd width: the shares of two processes differ."""

TEXT = Text("sample", load_stdlib().data[:100_000])
STEPS = 8
ROOT = Path(__file__).parents[1]

RUN_JOBS = """
import json, os, sys
from pathlib import Path
import torch, torch.distributed as dist
from dataclasses import replace
from fused_lm.lm.train import train
from tests.test_lm_parallel import MODEL, TEXT, config, overflow_in_one_share, stop_after
torch.set_num_threads(1)
dist.init_process_group("gloo")
for job in json.loads(sys.argv[1]):
    out, stop, dropout = Path(job.pop("out")), job.pop("stop", None), job.pop("dropout", 0.0)
    model = None if job.get("resume") else replace(MODEL, dropout=dropout)
    train(config(out, **job), model, TEXT, None, stop_after(stop))
overflow_in_one_share()
dist.destroy_process_group()
os._exit(0)  # threads of gloo can abort a Python that is being torn down
"""


def overflow_in_one_share() -> None:
    """fp16 under "fsdp": what overflows in one process' share, no process may step on."""
    device = torch.device("cpu")
    with join("fsdp", device) as team:
        torch.manual_seed(0)
        model = GPT(MODEL)
        module = team.wrap(LossModule(model), list(model.blocks))
        optimizer = make_optimizer(model, 1e-2, 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        tokens = torch.randint(0, 256, (2, 16))
        scaler.scale(module(tokens, tokens)).backward()
        before = [parameter.to_local().clone() for parameter in model.parameters()]
        if not team.is_first:
            model.tokens.weight.grad.to_local().fill_(float("inf"))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 512.0
        after = [parameter.to_local() for parameter in model.parameters()]
        assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def config(out: Path, **fields: Any) -> TrainConfig:
    small = {"batch": 8, "lr": 3e-3, "log_every": 1, "eval_every": 6, "plot": False}
    small |= {"eval_tokens": 16 * 11, "final_eval_tokens": 16 * 11}  # windows: no multiple of two
    return TrainConfig(out=out, device="cpu", **(small | fields))


def stop_after(step: int | None) -> Callable[[], bool]:
    """Asked once a step while no evaluation comes before it."""
    asked = iter(range(1, 10**6))
    return lambda: step is not None and next(asked) >= step


@pytest.fixture(autouse=True)
def _one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start_two(arguments: list[str]) -> list[subprocess.Popen[str]]:
    """Two processes as torchrun would start them, but with nobody who watches over them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=os.environ | address | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """(exit code, stderr) of each; none outlives the call."""
    try:
        errors = [process.communicate(timeout=90)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, error) for p, error in zip(processes, errors, strict=True)]


def states(out: Path) -> dict[str, torch.Tensor]:
    found = read_checkpoint(out, training_state=True)
    moments = {f"optimizer/{name}": tensor for name, tensor in found.optimizer.items()}
    return found.weights | moments


def logged(out: Path, name: str) -> list[float]:
    return [e[name] for e in read_log(out / "log.jsonl") if e.get(name) is not None]


def distance(first: Path, second: Path) -> float:
    """Largest relative difference of any tensor and of any logged loss or norm."""
    ours, theirs = states(first), states(second)
    assert ours.keys() == theirs.keys()
    far = [float((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp_min(1e-30)) for n in ours]
    for name in ("loss", "grad_norm", "accuracy"):
        pairs = list(zip(logged(first, name), logged(second, name), strict=True))
        far += [abs(a - b) / abs(b) for a, b in pairs if b]
    return max(far)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Yardstick: what another order of summing makes of it in one process, by accumulation."""
    bpe = {"tokenizer": "bpe", "vocab_size": 301}
    train(config(tmp_path / "one", steps=STEPS, **bpe), MODEL, TEXT)
    train(config(tmp_path / "parts", steps=STEPS, accumulate=2, **bpe), MODEL, TEXT)
    begun = config(tmp_path / "fsdp", steps=STEPS, **bpe)
    train(begun, MODEL, TEXT, should_stop=stop_after(3))

    def job(name: str, kind: str, **more: Any) -> dict[str, Any]:
        return {"out": str(tmp_path / name), "parallel": kind} | more

    random = {"steps": STEPS, "dropout": 0.2, "precision": "fp16"}
    jobs = [
        job("ddp", "ddp", steps=STEPS, accumulate=2, **bpe),
        job("fsdp", "fsdp", resume=True, stop=2),
        job("parts fsdp", "fsdp", steps=STEPS, accumulate=2, **bpe),
        *(job(f"whole {kind}", kind, **random) for kind in ("ddp", "fsdp")),
        *(job(f"cut {kind}", kind, stop=3, **random) for kind in ("ddp", "fsdp")),
        *(job(f"cut {kind}", kind, resume=True) for kind in ("ddp", "fsdp")),
    ]
    for code, error in ended(start_two(["-c", RUN_JOBS, json.dumps(jobs)])):
        assert code == 0, error
    train(config(tmp_path / "fsdp", resume=True), None, TEXT)

    yardstick = distance(tmp_path / "parts", tmp_path / "one")
    assert 0 < yardstick < 1e-4
    for name in ("ddp", "fsdp", "parts fsdp"):
        assert distance(tmp_path / name, tmp_path / "one") <= 8 * yardstick, name
    for kind in ("ddp", "fsdp"):
        whole, cut = tmp_path / f"whole {kind}", tmp_path / f"cut {kind}"
        assert distance(whole, cut) == 0.0, "as many processes go on bit for bit, with dropout"
        assert "torch.1" in read_checkpoint(cut, training_state=True).generators
        load_model(cut)


SMALL = ["--layers", "1", "--width", "16", "--heads", "2", "--context", "16", "--batch", "2"]


def command(out: Path, *more: str) -> list[str]:
    text = out.with_suffix(".txt")
    text.write_bytes(TEXT.data[:20_000].tobytes())
    start = ["-m", "fused_lm", "train", "--data", str(text), "--out", str(out), *SMALL]
    return [*start, "--log-every", "1", *more]


def wait_for_step(out: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while not any(e.get("step", 0) >= step for e in read_log(out / "log.jsonl")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_mistake_is_one_sentence_of_one_process(tmp_path: Path) -> None:
    first, second = ended(start_two(command(tmp_path / "run", "--steps", "5", "--batch", "3")))
    assert first[0] == second[0] == 2
    assert first[1].startswith("error: a batch of 3 windows can't be dealt out evenly to 2 proc")
    assert first[1].count("\n") == 1 and second[1] == ""


IMPATIENT = """
import runpy
from datetime import timedelta
from fused_lm.lm import parallel
parallel.TIMEOUT = timedelta(seconds=20)
runpy.run_module("fused_lm", run_name="__main__")
"""


@pytest.mark.parametrize(
    "blow", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)]
)
def test_a_lost_or_hanging_process_ends_the_other(tmp_path: Path, blow: signal.Signals) -> None:
    out = tmp_path / "run"
    _, _, *arguments = command(out, "--steps", "1000000", "--save-every", "1")
    first, second = processes = start_two(["-c", IMPATIENT, *arguments])
    try:
        wait_for_step(out, 2, first)
        os.kill(second.pid, blow)
        _, error = first.communicate(timeout=90)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert first.returncode == 2 and "Traceback" not in error, error
    assert "another process of the run has ended or hangs" in error and error.count("\n") == 1
    load_model(out)


@pytest.mark.slow
def test_ctrl_c_under_torchrun_ends_all_and_loses_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    process = subprocess.Popen(
        [*launch, "--nproc-per-node", "2", *command(out, "--steps", "1000000")],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        wait_for_step(out, 2, process)
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    assert error.count("nothing lost") == 1, error
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    _, checkpoint = load_model(out)
    assert checkpoint.step == max(e["step"] for e in read_log(out / "log.jsonl"))
