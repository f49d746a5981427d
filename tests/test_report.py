"""Records of the GPU suite, and what is generated from them: it follows, and only from a GPU's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import keep, plots, record, report, status
from benchmarks.gpu_suite import STATE
from benchmarks.record import Record
from benchmarks.suite_archive import pack
from build_tools import cuda_build
from fused_lm.cuda import extension
from tests.golden import compiled_kernels

GPU = "NVIDIA Imaginary 1"
MEND = "python -m benchmarks.report"


def test_texts_follow_from_the_records() -> None:
    for name, text in report.written(record.records()).items():
        assert (report.ROOT / name).read_text() == text, f"{name} is not of the records: {MEND}"


def test_plots_follow_from_the_records() -> None:
    """matplotlib's versions draw differently: what was drawn is compared."""
    drawn = {path.name for path in (report.ROOT / plots.FOLDER).iterdir()}
    wanted = list(plots.plots(record.records()))
    assert drawn == {f"{plot.name}.{kind}" for plot in wanted for kind in ("svg", "png")}, MEND
    for plot in wanted:
        svg = report.ROOT / plots.FOLDER / f"{plot.name}.svg"
        assert plots.digest_in(svg) == plot.digest(), f"{svg.name} is not of the records: {MEND}"


def _archive(folder: Path, device: str = "cuda", **about: Any) -> Path:
    """Of a suite in which a race, two pieces of verify and a sanitizer have run."""
    suite = folder / "suite"
    state = {"device": device, "gpu": GPU, "commit": "abc", "pieces": ["2026-01-02T03:04:05"]}
    stages = {"memcheck": {"status": "done", "said": "ERROR SUMMARY: 0 errors"}}
    doctor = {"environment": {"triton": "3.6.0", "records": "/home/me"}, "gpus": []}
    doctor["environment"]["platform"] = "Linux-6.1-of-somebody"
    line = {"op": "layer_norm", "case": "plain", "dtype": "bfloat16", "backend": "cuda"}
    line |= {"kernel": "k", "gpu": GPU, "parity": True}
    raced = {"case": "causal d64 t512 bfloat16", "contestant": "cuda", "pass": "fwd", "us": 2.0}
    called = {"call": "tests/test_gpu_kernels.py::test_norms[a]", "outcome": "passed", "said": ""}
    for name, text in {
        STATE: json.dumps({**state, **about, "stages": stages}),
        "environment/log.txt": json.dumps(doctor),
        "record/results.jsonl": json.dumps({**line, "times": {}}),
        "record of others/results.jsonl": json.dumps(line),
        "attention/attention.jsonl": json.dumps({"case": "x", "event": "done"})
        + "\n"
        + json.dumps({**raced, "tflops": 3.0}),
        "memcheck/calls.jsonl": json.dumps(called),
        "memcheck/reports.jsonl": json.dumps({"reports": {"Invalid read": 2}}),
        "kernels/calls.jsonl": json.dumps(called),
        "wrappers/log.txt": "...\n3 passed",
        "cache/triton/kernel": "binary",
    }.items():
        (suite / name).parent.mkdir(parents=True, exist_ok=True)
        (suite / name).write_text(text + "\n")
    pack(suite, folder / "suite.tar.gz")
    return folder / "suite.tar.gz"


def test_a_record_is_kept_without_what_belongs_to_the_machine(tmp_path: Path) -> None:
    folder = keep.keep(_archive(tmp_path), tmp_path / "results")
    assert folder == tmp_path / "results/nvidia-imaginary-1/2026-01-02-abc"
    about = json.loads((folder / "environment.json").read_text())
    assert (
        about["environment"] == {"triton": "3.6.0", "platform": "Linux"} and "stages" not in about
    )
    (kept,) = record.records(tmp_path / "results")
    assert [("times" in line) for line in kept.lines("results")] == [True], "once, with times"
    assert [line["us"] for line in kept.lines("attention")] == [2.0], "events are none"
    assert kept.lines("layernorm") == [] and kept.stages()["memcheck"]["status"] == "done"
    proofs = (folder / "proofs.txt").read_text().splitlines()
    assert proofs == [
        *("== kernels", "1 passed", "== wrappers", "3 passed"),
        *("== memcheck", "2 times Invalid read", "1 passed"),
    ]
    assert kept.kernels() == set(), "CUPTI saw none, so none counts"
    assert not [path for path in folder.rglob("*") if "cache" in path.name or "log" in path.name]


def test_a_record_is_replaced_whole(tmp_path: Path) -> None:
    archive = _archive(tmp_path)
    folder = keep.keep(archive, tmp_path / "results")
    (folder / "loss.jsonl").write_text("of an older run\n")
    assert keep.keep(archive, tmp_path / "results") == folder
    assert not (folder / "loss.jsonl").exists() and (folder / "attention.jsonl").is_file()


def test_a_dry_run_makes_no_record(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dry run on a CPU"):
        keep.keep(_archive(tmp_path, "cpu", gpu=None), tmp_path / "results")
    assert not (tmp_path / "results").exists()


def _record(folder: Path, when: str, **files: list[dict[str, Any]]) -> Record:
    folder.mkdir(parents=True)
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    gpus = [{"capability": "9.0"}]
    about = {"gpu": GPU, "commit": folder.name, "pieces": [when], "gpus": gpus}
    about["environment"] = {"triton": "3.6.0"}
    (folder / "environment.json").write_text(json.dumps(about))
    return Record(folder, about)


def _time(contestant: str, us: float, case: str = "causal d64 t512 bfloat16") -> dict[str, Any]:
    way = {"case": case, "pass": "fwd", "contestant": contestant}
    return {**way, "us": us, "tflops": 1000.0 / us, "host_us": 1.0, "step_mib": 7.0}


def test_the_newest_time_counts_and_none_that_was_withdrawn(tmp_path: Path) -> None:
    old = [_time("cuda", 9.0), _time("sdpa-flash", 8.0), _time("eager", 99.0)]
    wrong = {"case": "x", "contestant": "flex", "problem": "error 0.3, allowed 0.02"}
    roofs = [{"roof": "matmul bf16", "value": 500.0}]
    first = _record(tmp_path / "r/g/a", "2026-01-01", attention=[*old, wrong], roofs=roofs)
    newer = [_time("cuda", 4.0), _time("sdpa-flash", 8.0)]
    second = _record(tmp_path / "r/g/b", "2026-01-02", attention=newer)
    _record(tmp_path / "r/g/c", "2026-01-03", attention=[_time("sdpa-flash", 1.0)])
    gone = {"race": "attention", "contestant": "eager", "pass": "fwd", "reason": "it ran half"}
    (first.folder / "withdrawn.json").write_text(json.dumps([gone]))
    assert [r.folder for r in record.records(tmp_path / "r")][:2] == [first.folder, second.folder]
    found = record.records(tmp_path / "r")
    text = report.race_tables("attention", found)
    assert text.splitlines()[2:] == [
        "| case | pass | cuda | sdpa-flash | ours, % of the roof |",
        "| --- | --- | ---: | ---: | ---: |",
        "| causal d64 t512 bfloat16 | fwd | **250** | 125 | 50 |",
        "",
        report.BESIDE,
        "",
        "| case | cuda | sdpa-flash |",
        "| --- | ---: | ---: |",
        "| causal d64 t512 bfloat16 | 7, 1 | 7, 1 |",
    ]
    assert "2026-01-02, b" in text, "all of one run, the newest with one of ours"
    assert "2026-01-01" not in text and "2026-01-03" not in text
    alone = report.race_tables("attention", found[:1])
    assert "sdpa-flash" in alone and "eager" not in alone and "flex" not in alone
    assert list(status.ratios(GPU, found)) == [
        ("attention", "fwd", "sdpa-flash", "1", "2.00", "2.00", "2.00")
    ]
    assert report.race_tables("loss", found) == report.NOT_YET


KERNEL = {"op": "rotary", "backend": "triton", "case": "x", "dtype": "bfloat16", "kernel": "k"}
PASSED: dict[str, Any] = {**KERNEL, "parity": True}
FAILED: dict[str, Any] = {**KERNEL, "parity": False}
TIMED: dict[str, Any] = {**PASSED, "times": {way: {"ratio": 2.0} for way in ("infer", "train")}}


@pytest.mark.parametrize(
    ("lines", "standing"),
    [
        ([TIMED, PASSED], TIMED),
        ([PASSED, TIMED], TIMED),
        ([TIMED, FAILED], FAILED),
        ([TIMED, FAILED, PASSED], PASSED),
    ],
)
def test_a_failure_stands_until_it_is_mended(
    lines: list[dict[str, Any]], standing: dict[str, Any], tmp_path: Path
) -> None:
    found = [_record(tmp_path / f"{i}", f"{i}", results=[line]) for i, line in enumerate(lines)]
    assert [line for _, line in record.verified(GPU, found)] == [standing]


def test_without_a_record_everything_says_so(tmp_path: Path) -> None:
    assert record.records(tmp_path) == []
    assert report.race_tables("attention", []) == report.front_table([]) == report.NOT_YET
    assert report.roof_table([]) == report.NOT_YET and report.NOT_YET in status.status([])
    assert list(plots.plots([])) == []
    alone = [{**_time("eager", 1.0, "gpt2-350M b16"), "pass": "train", "tokens_per_s": 5}]
    of = _record(tmp_path / "r/g/a", "2026-01-01", train=alone)
    assert list(plots.plots([of])) == [], "none of ours: no message"


def test_a_kernel_that_changed_is_stale(tmp_path: Path) -> None:
    """A Triton kernel by its source, a CUDA kernel by what it was built of."""
    units = status.evidence.KERNEL_SOURCES["layer_norm", "cuda"]
    line: dict[str, Any] = {"case": "plain", "dtype": "bfloat16", "parity": True, "gpu": GPU}
    triton = status.evidence.triton_kernel_id("layer_norm", "3.6")
    assert triton != status.evidence.triton_kernel_id("layer_norm", "3.7")
    lines = [
        {**line, "op": "layer_norm", "backend": "triton", "kernel": triton},
        {**line, "op": "rms_norm", "backend": "triton", "kernel": "of another source"},
    ]
    of = _record(tmp_path / "r/g/a", "2026-01-01", results=lines)
    build = {
        "kernels": {unit: {"sm_90": f"code of {unit}"} for unit in units},
        "host_code": {unit: cuda_build.host_code_of(unit) for unit in units},
    }
    (of.folder / "build.json").write_text(json.dumps(build))
    (of.folder / "stages.json").write_text(json.dumps({"kernels": {"status": "done"}}))
    now = {(row[0], row[1]): row[5] for row in status.operators(GPU, [of])}
    assert now == {("layer_norm", "triton"): "current", ("rms_norm", "triton"): "stale"}
    assert status._built_id(of, "layer_norm") in status.current_ids([of])
    build["host_code"][units[0]] = "of another source"
    (of.folder / "build.json").write_text(json.dumps(build))
    assert status._built_id(of, "layer_norm") is None
    ran, others = list(status.sources([of]))[:2], list(status.sources([of]))[2:]
    assert [row[3:] for row in ran] == [("not counted", "stale"), ("not counted", "current")]
    assert others and {row[3:] for row in others} == {("", status.NEVER_RUN)}


def test_a_source_has_run_where_one_of_its_kernels_has(tmp_path: Path) -> None:
    """That it was built does not count, nor a run of the tests that was cut."""
    units = ("layernorm_fwd", "gemm_sm80_bf16", "attention_fwd_sm90_bf16")
    built = {
        "kernels": {unit: {"sm_90": f"code of {unit}"} for unit in units},
        "host_code": {unit: cuda_build.host_code_of(unit) for unit in units},
    }
    norms = sorted(compiled_kernels("layernorm_fwd", ("sm_90",)))
    hopper = compiled_kernels("attention_fwd_sm90_bf16", ("sm_90a",))
    found = []
    for day, how, ran in (
        ("01", "done", {*norms[:3], *hopper, "a_kernel_that_is_gone"}),
        ("02", "unfinished", {*norms}),
        ("03", "failed", {*norms[:5]}),
    ):
        of = _record(tmp_path / f"r/g/{day}", f"2026-01-{day}")
        (of.folder / "build.json").write_text(json.dumps(built))
        (of.folder / "stages.json").write_text(json.dumps({"kernels": {"status": how}}))
        (of.folder / "kernels.txt").write_text("\n".join(ran))
        found.append(of)
    rows = {row[0].removesuffix(".cu"): row[2:] for row in status.sources(found)}
    assert rows["layernorm_fwd"] == (found[2].label, f"5 of {len(norms)}", "current")
    assert rows["attention_fwd_sm90_bf16"] == (
        *(found[0].label, f"{len(hopper)} of {len(hopper)}", "current"),
    )
    assert rows["gemm_sm80_bf16"] == ("none", "", status.NEVER_RUN)


def test_code_for_one_target_alone_counts_on_its_gpus() -> None:
    """On a Hopper what is compiled for sm_90a, on others not."""
    hashes = {"sm_80": "a", "compute_80": "b"}, {"sm_90a": "c"}
    assert [extension.code_hashes(h, "sm_80") for h in hashes] == [["a"], []]
    assert [extension.code_hashes(h, "sm_90") for h in hashes] == [["b", "a"], ["c"]]
    assert [extension.code_hashes(h, None) for h in hashes] == [["b", "a"], ["c"]]
    assert extension.code_hashes({}, "sm_90") == []


def test_a_text_keeps_what_is_not_generated() -> None:
    text = "one\n<!-- a -->\nold\n<!-- end -->\ntwo\n<!-- b -->\n<!-- end -->\n"
    new = report.filled(text, {"a": "A \\1", "b": "B"})
    assert new == "one\n<!-- a -->\nA \\1\n<!-- end -->\ntwo\n<!-- b -->\nB\n<!-- end -->\n"
    assert report.filled(new, {"a": "A \\1", "b": "B"}) == new
    with pytest.raises(ValueError, match="places for"):
        report.filled(text, {"a": "A"})
    with pytest.raises(ValueError, match="has no end"):
        report.filled("<!-- a -->\nold\n", {"a": "A"})


def test_a_plot_of_sample_data_is_drawn_and_named(tmp_path: Path) -> None:
    line = {"cuda": [(512.0, 200.0), (1024.0, 300.0)], "flash": [(512.0, 150.0), (1024.0, 299.0)]}
    plot = plots.Plot("sample", "Sample", "tokens", "TFLOP/s", line, (700.0, "roof"))
    svg, png = plots.draw(plot, tmp_path)
    text = svg.read_text()
    assert plots.digest_in(svg) == plot.digest() and png.stat().st_size > 5000
    for word in ("Sample", "cuda", "flash", "roof", "1,024"):
        assert word in text, f"no {word} in the drawing"
    assert plot.message() == "At 1,024: cuda 300 TFLOP/s, 1.00 times the fastest other, flash"
    assert plots._apart([1.0, 1.1, 5.0], 0.5) == [1.0, 1.5, 5.0]
