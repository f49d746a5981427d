"""doctor, parity and verify: what they print, their exit codes, and the records of verify."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_lm import cli, dispatch, records
from fused_lm.commands import doctor
from fused_lm.commands.verify import _merge, records_of
from fused_lm.cuda import extension
from fused_lm.lm import GPT, GPTConfig
from fused_lm.lm.checkpoint import save_checkpoint
from fused_lm.ops import checks, registration
from fused_lm.parity import run as parity_run
from fused_lm.parity.cases import SMALL, AttentionCase, NormCase, verify_cases


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["environment"]["torch"] == torch.__version__
    runs = {row["operator"]: row["runs"] for row in report["operators"]}
    assert set(runs) == set(dispatch.TABLE)
    assert all(row["reasons"] for row in report["operators"])
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "attention_weights" in text and torch.__version__ in text


@pytest.fixture
def nothing_remembered() -> Iterator[None]:
    """What a test pretends to be installed must not be what later tests are told."""
    answers = (checks._has_triton.cache_clear, extension.forget)
    for forget in answers:
        forget()
    yield
    for forget in answers:
        forget()


@pytest.mark.usefixtures("nothing_remembered")
def test_doctor_names_the_command_that_mends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor, "_driver", lambda: "999.1")
    monkeypatch.setattr(torch.version, "cuda", None)
    faults = {fault["what"]: fault for fault in doctor.examine()["faults"]}
    assert faults["torch 2.9.1+cpu is older than 2.10"]["breaks"]
    mends = [fault["mend"] for fault in faults.values()]
    assert "pip install 'fused_lm[triton]'" in mends
    assert "pip install --force-reinstall torch" in mends
    assert doctor.examine()["broken"]


def test_doctor_works_without_rich(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("rich", "rich.console", "rich.table"):
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["doctor"]) == 0
    assert "attention_weights" in capsys.readouterr().out


def test_doctor_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--model", "gpt2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["parameters"] == 124_439_808  # Radford et al.'s 117 M, counted
    saved = report["saved_bytes_per_token_and_block"]
    assert saved["ours"] == sum(item["ours"] for item in saved["items"])
    assert saved["ratio"] == pytest.approx(saved["ours"] / saved["stock"], abs=1e-4)
    assert report["saved_bytes_per_sequence"]["ours"] == 12 * 1024 * saved["ours"]
    assert cli.main(["doctor", "--model", "gpt2"]) == 0
    assert f"{saved['ours']:,}" in capsys.readouterr().out


def test_doctor_of_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = GPTConfig(num_layers=1, embed_dim=16, num_heads=2, activation="swiglu")
    save_checkpoint(
        tmp_path / "checkpoint.safetensors", GPT(config), config.to_dict(), step=1, run={}
    )
    assert cli.main(["doctor", "--model", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["config"] == config.to_dict()


@pytest.mark.parametrize("name", ["gpt3", "."])
def test_doctor_of_no_model(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--model", name]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_parity_says_ok(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "parity.jsonl"
    arguments = ["parity", "--device", "cpu", "--backend", "reference", "--dtype", "float32"]
    assert cli.main([*arguments, "--json", str(file)]) == 0
    assert f"{len(SMALL)} of {len(SMALL)} within tolerance" in capsys.readouterr().out
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == len(SMALL) and all(line["problem"] is None for line in lines)


def test_parity_sees_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    from fused_lm.triton_kernels import layernorm

    right = layernorm.rms_norm_backward

    def wrong(*args: Any) -> Any:
        dx, dresidual, dweight = right(*args)
        return dx, dresidual, dweight * 1.001

    case = NormCase("rms_norm")
    assert parity_run.run_case(case, "triton", "float32", device).ok
    monkeypatch.setitem(registration.FUNCTIONS["rms_norm_bwd"], "triton", wrong)
    result = parity_run.run_case(case, "triton", "float32", device)
    assert not result.ok and result.worst == "dweight" and "worst at" in str(result.problem)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_parity_of_the_triton_kernels(dtype: str, device: torch.device) -> None:
    for case in SMALL[::3]:
        result = parity_run.run_case(case, "triton", dtype, device)
        assert result.ok, result.problem


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["parity", "--device", "cuda"], "torch sees no GPU here"),
        (["parity", "--device", "gpu7"], "is not a device: expected cuda, cuda:N or cpu"),
        (["parity", "--device", "cpu", "--backend", "triton", "--dtype", "float64"], "nothing"),
        (["parity", "--device", "cpu", "--backend", "reference", "--dtype", "float32", "--json",
          "/dev/null/x"], "can't write /dev/null/x"),
        (["verify", "--device", "cpu", "--limit", "0"], "nothing to verify"),
        (["verify", "--device", "cpu", "--only", "no such kernel"], "nothing to verify"),
        (["verify", "--device", "cpu", "--limit", "1", "--out", "/dev/null/x"], "can't write to"),
    ],
)  # fmt: skip
def test_errors_are_one_sentence(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and text in error and error.count("\n") == 1


def test_a_lost_job_makes_a_record_that_forbids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its class would take the verdict of a smaller one."""
    from fused_lm.commands import verify
    from fused_lm.parity.worker import Job, labels_of

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "G")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    jobs = [Job(verify_cases()[0], "bfloat16", "triton")]
    lost = {"job": 0, "problem": "no answer in 90 s"}
    gpu = torch.device("cuda", 0)
    labels = verify._labels(jobs, lost, gpu)
    assert labels == {**labels_of(jobs[0], gpu), "parity": False}
    made = records_of([{**labels, **lost}])
    assert [(r.mode, r.parity, r.gpu) for r in made] == [
        ("infer", False, "G"),
        ("train", False, "G"),
    ]
    assert records_of([{"job": 0, "problem": None, **labels, "parity": True}]) == [], "not timed"
    assert records_of([{"worst": "not measured", "problem": "out of memory", **labels}]) == []


def test_verify_has_a_job_for_every_kernel_that_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_lm.cuda import extension
    from fused_lm.parity.worker import jobs_for

    def backends(device: torch.device) -> set[tuple[str, str]]:
        return {(job.case.op, job.backend) for job in jobs_for(device)}

    kernels = {
        (op, i.name) for op, impls in dispatch.TABLE.items() for i in impls if i.needs_record
    }
    triton = {(op, name) for op, name in kernels if name == "triton"}
    assert backends(torch.device("cpu")) == triton
    refusal = "no extension"
    monkeypatch.setattr(extension, "refusal_on", lambda kind, index: refusal)
    assert backends(torch.device("cuda", 0)) == triton
    monkeypatch.setattr(extension, "refusal_on", lambda kind, index: None)
    assert backends(torch.device("cuda", 0)) == kernels


def test_a_broken_record_file_is_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    records.user_file().parent.mkdir(parents=True)
    records.user_file().write_text('{"format": 0}')
    assert _merge([]) == 0
    assert "replaced: " in capsys.readouterr().err
    assert records.load(records.user_file()) == []


def test_records_of_raw_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    raw = {
        "job": 0, "op": "attention", "backend": "triton", "kernel": "k", "gpu": "G",
        "dtype": "bfloat16", "family": "d64-band", "size": 1, "parity": True, "problem": None,
        "times": {"infer": {"ratio": 1.25}, "train": {"ratio": 0.5}},
    }  # fmt: skip
    failed = {**raw, "family": "d128-band", "parity": False, "times": {}}
    lost = {"job": 2, "problem": "exit status -6"}
    made = records_of([raw, failed, lost])
    assert [(r.mode, r.parity, r.ratio) for r in made] == [
        ("infer", True, 1.25), ("train", True, 0.5), ("infer", False, 0.0), ("train", False, 0.0),
    ]  # fmt: skip
    assert _merge(made) == 4
    slower = records.Record(**{**made[0].__dict__, "ratio": 0.9})
    assert _merge([slower, made[0]]) == 1
    stored = {(r.family, r.mode): r.ratio for r in records.load(records.user_file())}
    assert stored["d64-band", "infer"] == 0.9 and stored["d64-band", "train"] == 0.5


def test_verify_cases_build_for_every_class() -> None:
    """Shapes only: every case of a GPU run must build and be classified."""
    from fused_lm.explain import call_of

    classes = set()
    for case in verify_cases():
        problem = case.build(torch.bfloat16, torch.device("meta"))
        classes.add(
            (case.op, *records.SHAPE_CLASSES[case.op](call_of(case.op, **problem.arguments)))
        )
    assert ("attention", "d64-band", 1) in classes and (
        "attention",
        "d128-band-dropout",
        2,
    ) in classes
    for op in ("layer_norm", "rms_norm"):
        for family in ("plain", "add", "add-dropout", "add-mixed"):
            measured = {size for name, kind, size in classes if (name, kind) == (op, family)}
            assert measured == set(range(6)), "a kernel of some width would never be proven"
    assert any(isinstance(case, AttentionCase) and case.S == 16384 for case in verify_cases())
