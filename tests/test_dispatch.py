"""Dispatch: who runs, who refuses in which words, and the records that let auto take a kernel."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_lm
from fused_lm import dispatch, explain, records
from fused_lm.cuda import extension
from fused_lm.explain import call_of
from fused_lm.ops import registration

GPU = "Test GPU 9000"
q = torch.zeros(1, 2, 8, 16)


def _chosen(op: str, *args: Any, **kwargs: Any) -> str:
    return dispatch.choose(op, call_of(op, *args, **kwargs))


def test_auto_on_a_cpu_is_pytorch() -> None:
    assert _chosen("attention", q, q, q, causal=True) == "pytorch"
    assert _chosen("layer_norm", q) == "pytorch"


def test_auto_falls_back_to_the_reference() -> None:
    assert _chosen("attention", q, q, q, softcap=1.0) == "reference"
    assert _chosen("attention", q, q, q, return_lse=True) == "reference"
    assert _chosen("layer_norm", q.bfloat16(), out_dtype=torch.float32) == "reference"
    assert _chosen("layer_norm", q, out_dtype=torch.bfloat16) == "pytorch"
    assert (
        _chosen("rms_norm", q, residual=q.bfloat16(), residual_dtype=torch.bfloat16) == "reference"
    )


def test_forced_and_refused_lists_every_reason() -> None:
    with fused_lm.use_backend("triton"), pytest.raises(RuntimeError) as caught:
        fused_lm.attention(q.double(), q.double(), q.double())
    text = str(caught.value)
    assert "backend 'triton' can't run this call of attention" in text
    assert "float64 runs through the reference" in text
    assert "pytorch" in text and "reference" in text and "q [1, 2, 8, 16] float64" in text
    with fused_lm.use_backend("pytorch"), pytest.raises(RuntimeError, match="has no softcap"):
        fused_lm.attention(q, q, q, softcap=2.0)


def test_backends_nest_and_come_back() -> None:
    with fused_lm.use_backend("reference"):
        with fused_lm.use_backend("triton"):
            assert dispatch.current_backend() == "triton"
        assert dispatch.current_backend() == "reference"
        with pytest.raises(ZeroDivisionError), fused_lm.use_backend("auto"):
            _ = 1 // 0
        assert dispatch.current_backend() == "reference"
    with pytest.raises(
        ValueError, match="no backend 'cudnn'; expected one of: cuda, triton, pytorch"
    ):
        fused_lm.use_backend("cudnn").__enter__()


def test_why_says_what_runs_and_what_not() -> None:
    explanation = fused_lm.why("attention", q, q, q, softcap=1.0)
    assert explanation.backend == "reference"
    assert [verdict.runs for verdict in explanation.verdicts] == [False, False, False, True]
    assert "-> reference" in str(explanation) and "no softcap" in str(explanation)
    assert fused_lm.why("rms_norm", q).backend == "pytorch"
    with pytest.raises(ValueError, match="no operator 'softmax'"):
        fused_lm.why("softmax", q)


def test_every_operator_is_in_the_table() -> None:
    assert set(dispatch.TABLE) == set(explain._OPERATORS) <= set(fused_lm.__all__)
    for op, impls in dispatch.TABLE.items():
        assert impls[-1].name == "reference", op
        ours = [impl.needs_record for impl in impls]
        assert ours == sorted(ours, reverse=True), f"{op}: kernels of ours come first"
        assert {impl.name for impl in impls} <= set(dispatch.BACKENDS)
        assert records.SHAPE_CLASSES[op] is not None
        for impl in impls:
            assert impl.needs_record == ((op, impl.name) in records.KERNEL_SOURCES)


def test_backends_have_one_signature_per_operator() -> None:
    for op, (file, function) in registration._SOURCES.items():
        backends = {impl.name for impl in dispatch.TABLE[_public_of(op)]} - {"pytorch"}
        signatures = {
            name: list(
                inspect.signature(
                    getattr(registration.backend_module(name, file), function)
                ).parameters
            )
            for name in backends
        }
        assert {"reference", "triton"} <= backends
        assert all(found == signatures["reference"] for found in signatures.values()), op


def _public_of(op: str) -> str:
    """``layer_norm`` for ``layer_norm_fwd``: the name in dispatch's table."""
    return max((name for name in dispatch.TABLE if op.startswith(name)), key=len)


@pytest.fixture
def gpu_records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A machine with a GPU named GPU and an empty cache folder; returns a function that adds
    records.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    monkeypatch.setattr(extension, "kernel_hashes", lambda files, capability=None: list(files))
    records.kernel_id.cache_clear()
    records.forget()
    records._say_once.cache_clear()

    def add(backend: str = "triton", **changes: Any) -> None:
        record = {
            "op": "attention", "backend": backend,
            "kernel": records.kernel_id("attention", backend, 0, changes.get("mode", "infer")),
            "gpu": GPU, "mode": "infer", "dtype": "bfloat16", "family": "d64-band", "size": 1,
            "parity": True, "ratio": 1.5, **changes,
        }  # fmt: skip
        path = records.user_file()
        old = records.load(path) if path.is_file() else []
        records.save(path, [*old, records.Record(**record)])

    yield add
    records.kernel_id.cache_clear()
    records.forget()


def _missing(size: int = 1, family: str = "d64-band", mode: str = "infer") -> str | None:
    return records.missing("attention", "triton", 0, "bfloat16", family, size, mode)


def test_a_record_lets_auto_take_the_kernel(gpu_records: Any) -> None:
    with pytest.warns(UserWarning, match="Run `fused-lm verify` once"):
        assert "no record of attention" in str(_missing())
    gpu_records()
    assert _missing(size=1) is None
    assert _missing(size=3) is None, "a larger size takes the verdict of its smaller neighbour"
    assert "no record" in str(_missing(size=0))
    assert "no record" in str(_missing(mode="train"))
    assert "no record" in str(_missing(family="d128-band"))


def test_slow_wrong_and_stale_kernels_are_not_taken(gpu_records: Any) -> None:
    gpu_records(size=1)
    gpu_records(size=2, ratio=0.8)
    gpu_records(size=3, parity=False)
    gpu_records(family="d128-band", kernel="0123456789abcdef")
    assert _missing(size=1) is None
    assert "0.80 of PyTorch's speed" in str(_missing(size=2))
    assert "failed parity" in str(_missing(size=3))
    assert "no record" in str(_missing(family="d128-band"))


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that gives attention a table in which kernels come in an order and only those
    named refuse.
    """
    impls = {impl.name: impl for impl in dispatch.TABLE["attention"]}

    def install(order: tuple[str, ...] = ("cuda", "triton"), refusing: str | None = None) -> None:
        def refuses(name: str) -> Any:
            return lambda call: "not this call" if name == refusing else None

        names = (*order, "pytorch", "reference")
        changed = [dataclasses.replace(impls[name], refuses=refuses(name)) for name in names]
        monkeypatch.setitem(dispatch.TABLE, "attention", tuple(changed))

    install()
    return install


def _on_a_gpu(training: bool = False) -> tuple[str, dict[str, str]]:
    """What auto takes for a bfloat16 call on a GPU, and every backend's reason."""
    with FakeTensorMode():
        x = torch.empty(1, 1, 8, 64, dtype=torch.bfloat16, device="cuda", requires_grad=training)
        chosen = _chosen("attention", x, x, x)
        explanation = fused_lm.why("attention", x, x, x)
    assert explanation.backend == chosen
    passed_over = {v.backend for v in explanation.verdicts if v.runs} - {chosen}
    assert passed_over <= {"pytorch", "reference"}
    return chosen, {verdict.backend: verdict.reason for verdict in explanation.verdicts}


_CLASS = {"family": "d64-plain", "size": 0}


@pytest.mark.parametrize("order", [("cuda", "triton"), ("triton", "cuda")])
def test_the_faster_of_two_recorded_kernels_runs(
    gpu_records: Any, table: Any, order: tuple[str, str]
) -> None:
    table(order)
    gpu_records("cuda", ratio=1.12, **_CLASS)
    gpu_records("triton", ratio=1.31, **_CLASS)
    chosen, reasons = _on_a_gpu()
    assert chosen == "triton"
    assert reasons["cuda"] == (
        "triton is faster here by the records: 1.31 against 1.12 of PyTorch's speed"
    )
    assert reasons["triton"] == "can run it"


@pytest.mark.parametrize("order", [("cuda", "triton"), ("triton", "cuda")])
def test_of_equals_the_first_runs(gpu_records: Any, table: Any, order: tuple[str, str]) -> None:
    table(order)
    for backend in order:
        gpu_records(backend, ratio=1.2, **_CLASS)
    chosen, reasons = _on_a_gpu()
    assert chosen == order[0]
    assert reasons[order[1]] == f"{chosen} is as fast here by the records and comes first"


def test_a_kernel_recorded_alone_runs(gpu_records: Any, table: Any) -> None:
    gpu_records("triton", ratio=1.01, **_CLASS)
    gpu_records("cuda", ratio=0.99, **_CLASS)
    chosen, reasons = _on_a_gpu()
    assert chosen == "triton" and "0.99 of PyTorch's speed" in reasons["cuda"]
    with pytest.warns(UserWarning, match="no record yet"):
        records.user_file().unlink()
        records.forget()
        assert _on_a_gpu()[0] == "pytorch"


@pytest.mark.parametrize("order", [("cuda", "triton"), ("triton", "cuda")])
def test_a_faster_kernel_that_refuses_leaves_the_call_to_the_slower(
    gpu_records: Any, table: Any, order: tuple[str, str]
) -> None:
    table(order, refusing="triton")
    gpu_records("cuda", ratio=1.12, **_CLASS)
    gpu_records("triton", ratio=1.31, **_CLASS)
    chosen, reasons = _on_a_gpu()
    assert (chosen, reasons["triton"]) == ("cuda", "not this call")


def test_each_mode_has_its_fastest_kernel(gpu_records: Any, table: Any) -> None:
    for backend, infer, train in (("cuda", 1.1, 1.4), ("triton", 1.3, 1.2)):
        gpu_records(backend, mode="infer", ratio=infer, **_CLASS)
        gpu_records(backend, mode="train", ratio=train, **_CLASS)
    assert _on_a_gpu()[0] == "triton"
    chosen, reasons = _on_a_gpu(training=True)
    assert chosen == "cuda" and "1.40 against 1.20" in reasons["triton"]
    gpu_records("triton", mode="train", ratio=1.5, **_CLASS)
    assert _on_a_gpu(training=True)[0] == "triton", "what was read is forgotten"


def test_a_backward_changes_without_the_forwards_record(
    gpu_records: Any, table: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for mode in ("infer", "train"):
        gpu_records("cuda", mode=mode, **_CLASS)
    assert _on_a_gpu()[0] == _on_a_gpu(training=True)[0] == "cuda"
    monkeypatch.setitem(records.TRAINING_SOURCES, ("attention", "cuda"), ("another backward",))
    records.kernel_id.cache_clear()
    records.forget()
    assert _on_a_gpu()[0] == "cuda"
    assert _on_a_gpu(training=True)[0] != "cuda"


def test_a_broken_user_file_is_left_out(gpu_records: Any) -> None:
    path = records.user_file()
    path.parent.mkdir(parents=True)
    for content in ("{", '{"format": 99, "records": []}', '{"format": 1, "records": [{}]}', "[]"):
        path.write_text(content)
        records.forget()
        with pytest.warns(UserWarning, match="ignores its own records"):
            records._table()


def test_shipped_records_are_those_of_the_raw_results() -> None:
    """verified.json is generated from benchmarks/results, never written by hand."""
    from benchmarks.ship import proven

    assert sorted(map(str, records.load(records.SHIPPED))) == sorted(map(str, proven()))


def test_kernel_id_sees_code_and_not_comments() -> None:
    base = "def f(x):\n    return x + 1\n"
    same = '"""Doc."""\n\n\ndef f(x):\n    """Doc."""\n    # why\n    return (x + 1)\n'
    assert records.code_of(base) == records.code_of(same)
    assert records.code_of(base) != records.code_of(base.replace("1", "2"))
    for op, backend in records.KERNEL_SOURCES:
        assert len(records.kernel_id(op, backend)) == 16


def test_every_kernel_file_is_part_of_a_kernel_id() -> None:
    folder = Path(records.__file__).parent / "triton_kernels"
    hashed = {
        name.split("/")[1]
        for (_, backend), names in records.KERNEL_SOURCES.items()
        for name in names
        if backend == "triton"
    }
    no_kernel = {"__init__.py", "interpreter.py", "compile_check.py", "attention_instantiations.py"}
    assert {path.name for path in folder.glob("*.py")} - no_kernel == hashed


def test_records_are_constants_for_compile(gpu_records: Any) -> None:
    """Dynamo must not trace into files and hashes."""
    gpu_records()
    gpu_records("cuda", ratio=1.6)

    def step(x: torch.Tensor) -> torch.Tensor:
        x = x + 1 if _missing() is None else x - 1
        slower = records.slower(
            "attention", "triton", "cuda", 0, "bfloat16", "d64-band", 1, "infer"
        )
        return x if slower is None else x * 2

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.zeros(2)), torch.full((2,), 2.0))


def test_the_choice_between_two_kernels_compiles(
    gpu_records: Any, table: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_records("cuda", ratio=1.12, **_CLASS)
    gpu_records("triton", ratio=1.31, **_CLASS)
    subject = (0, "bfloat16", "d64-plain", 0, "infer")
    monkeypatch.setattr(dispatch, "_subject", lambda op, call: subject)

    def step(x: torch.Tensor) -> torch.Tensor:
        return x[0] if _chosen_plainly(x) == "triton" else x

    x = torch.empty(1, 1, 8, 64, device="meta")
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert compiled(x).shape == (1, 8, 64)


def _chosen_plainly(x: torch.Tensor) -> str:
    return dispatch.choose("attention", (x, x, x))


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow  # three processes
def test_environment_variables() -> None:
    call = "import torch, fused_lm; q = torch.ones(1, 1, 2, 4); fused_lm.attention(q, q, q)"
    logged = _python(call + "; fused_lm.attention(q, q, q)", FUSED_LM_LOG="1").stderr
    assert logged.count("attention d32-plain/0 torch.float32 cpu pytorch") == 1
    forced = _python(
        "import fused_lm; print(fused_lm.dispatch.current_backend())", FUSED_LM_BACKEND="reference"
    )
    assert forced.stdout.strip() == "reference"
    assert "expected one of" in _python("import fused_lm", FUSED_LM_BACKEND="fastest").stderr


def test_import_is_light() -> None:
    heavy = (
        "('triton', 'torch._dynamo', 'torch._inductor', 'rich', 'matplotlib', 'safetensors',"
        " 'fused_lm._C')"
    )
    code = (
        "import torch, sys; before = set(sys.modules); import fused_lm;"
        f"print([m for m in {heavy} if m in sys.modules and m not in before])"
    )
    done = _python(code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_a_kernel_id_covers_what_its_files_import() -> None:
    """A tile chosen by a file that isn't hashed would leave a record standing."""
    folder = Path(records.__file__).parent / "triton_kernels"
    for key, names in records.KERNEL_SOURCES.items():
        files = {Path(name).stem for name in names if name.startswith("triton_kernels/")}
        for name in files:
            text = (folder / f"{name}.py").read_text()
            imported = set(re.findall(r"^from fused_lm\.triton_kernels\.(\w+) import", text, re.M))
            missing = imported - files - {"interpreter"}
            assert not missing, (key, name, missing)


def test_norms_of_mixed_dtypes_and_unaligned_rows_have_records_of_their_own() -> None:
    """They run kernels of their own, which a record of aligned rows says nothing about."""
    x = torch.zeros(4, 64, dtype=torch.bfloat16)

    def family(x: torch.Tensor, **options: Any) -> str:
        return records.SHAPE_CLASSES["layer_norm"](call_of("layer_norm", x, **options))[0]

    assert family(x) == "plain"
    assert family(x, residual=x) == "add"
    assert family(x, residual=x.float()) == "add-mixed"
    assert family(x, out_dtype=torch.float32) == "mixed"
    assert family(x[:, :60]) == family(x[:, 1:33]) == "unaligned"
    assert family(torch.zeros(4, 65)[:, :64]) == "unaligned"
    sizes = [(4, 256), (4, 257), (4, 2048), (4, 4096), (4, 6144), (4, 8192), (4, 20480)]
    found = [
        records.SHAPE_CLASSES["layer_norm"](call_of("layer_norm", torch.zeros(s)))[1] for s in sizes
    ]
    assert found == [0, 1, 1, 2, 3, 4, 5]


def test_forcing_backends_leaks_and_steals_no_reference() -> None:
    """torch 2.10 steals one at each call: its names would be freed while they are in use."""
    name = "".join(["ref", "erence"])  # a string of its own, not the constant
    before = sys.getrefcount(name)
    for _ in range(50):
        with fused_lm.use_backend(name):
            pass
    assert sys.getrefcount(name) == before
