"""``fused_lm._C`` as users get it: the sdist built and installed, its ABI, and installs without it.

One build of one target serves all tests here. It runs in pip's build isolation, in a fresh
environment that sees this one's torch; where pip reaches no index, with this environment's
setuptools and ninja instead.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from build_tools import commands, cuda_build, toolchain
from build_tools.toolchain import Missing
from fused_lm.ops import schemas

ROOT = Path(__file__).parents[1]
SITE = Path(sysconfig.get_path("purelib"))
SOURCES = ("fused_lm", "build_tools", "csrc", "benchmarks")
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
ARCH = "80"
FAST = {"NVCC_APPEND_FLAGS": "-Xcicc -O0 -Xptxas -O0"}
"""Nothing here runs the kernels: without optimisation they compile in a quarter of the time."""


def _no_toolchain() -> str | None:
    try:
        toolchain.find()
    except Missing as error:
        return f"the extension can't be built here: {error}"
    return None


WHY_NOT = _no_toolchain()
needs_toolchain = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


def _run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        env={**_environment(), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def _environment() -> dict[str, str]:
    """Ours, without what would steer a build or show it another environment."""
    steers = ("FUSED_LM_", "VIRTUAL_ENV", "CONDA_PREFIX")
    ours = {k: v for k, v in os.environ.items() if not k.startswith(steers)}
    return {**ours, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def _without_nvcc() -> dict[str, str]:
    folders = os.environ["PATH"].split(os.pathsep)
    path = os.pathsep.join(f for f in folders if not (Path(f) / "nvcc").exists())
    return {"PATH": path, "CUDA_HOME": "", "CUDA_PATH": ""}


def _copy_of_the_source(folder: Path) -> Path:
    folder.mkdir(parents=True)
    left_out = shutil.ignore_patterns("__pycache__", "_C.*", "_build.json", "results", "plots")
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / name, ignore=left_out)
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    return folder


def _build(source: Path, hook: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a hook as a build frontend does; the wheel or sdist lies in ``source/out``."""
    code = f"from setuptools import build_meta; print(build_meta.{hook}('out'))"
    (source / "out").mkdir(exist_ok=True)
    return _run([sys.executable, "-c", code], source, **environment)


def _environment_with(folder: Path, sees: str) -> Path:
    """Python of a fresh environment; ``sees`` this one's packages, its torch only, or nothing."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    if sees == "packages":
        (site / "of_the_tests.pth").write_text(f"{SITE}\n")
    elif sees == "torch":
        (site / "torch").symlink_to(Path(torch.__file__).parent)
    return folder / "bin/python"


@dataclass(frozen=True)
class Installed:
    """An installed sdist; ``report`` is its ``_build.json``."""

    python: Path
    package: Path

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.package / "_build.json").read_text())


def _install(python: Path, what: str, folder: Path, **environment: str) -> tuple[str, Installed]:
    wheels = folder / "wheels"
    fetch = ["download", "-q", "--no-deps", "-d", str(wheels), "setuptools>=77", "ninja>=1.11"]
    reached = wheels.is_dir() or _run([sys.executable, "-m", "pip", *fetch], folder).returncode == 0
    how = ["--no-index", "--find-links", str(wheels)] if reached else ["--no-build-isolation"]
    pip = [str(python), "-m", "pip", "install", "-v", "--no-deps", "--force-reinstall", *how]
    done = _run([*pip, what], folder, **environment)
    assert done.returncode == 0, done.stdout[-4000:]
    (package,) = python.parents[1].glob("lib/python*/site-packages/fused_lm")
    return done.stdout, Installed(python, package)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all workers of a test run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "extension"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def installed(shared: Path) -> Installed:
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        python = shared / "environment/bin/python"
        if not (shared / "done").exists():
            source = _copy_of_the_source(shared / "source")
            assert _build(source, "build_sdist").returncode == 0
            (sdist,) = (source / "out").glob("*.tar.gz")
            _environment_with(shared / "environment", sees="packages")
            environment = {"FUSED_LM_CUDA_ARCHS": ARCH, "FUSED_LM_FORCE_CUDA": "1", **FAST}
            _install(python, str(sdist), shared, **environment)
            (shared / "done").touch()
    (package,) = (shared / "environment").glob("lib/python*/site-packages/fused_lm")
    return Installed(python, package)


def _output_of(installed: Installed, code: str) -> str:
    done = _run([str(installed.python), "-c", code], installed.package.parent)
    assert done.returncode == 0, done.stdout
    return done.stdout


@needs_toolchain
@pytest.mark.slow
def test_the_sdist_installs_its_kernels(installed: Installed) -> None:
    report = installed.report
    assert report["archs"] == [ARCH] and report["schema_hash"] == schemas.SCHEMA_HASH
    assert {"layernorm_fwd", "layernorm_bwd"} <= set(report["kernels"])
    assert report["host_code"].keys() == report["kernels"].keys()
    assert all(len(h) == 16 for hashes in report["kernels"].values() for h in hashes.values())
    code = """
import sys, fused_lm; assert 'fused_lm._C' not in sys.modules
from fused_lm.cuda import extension; assert extension.why_not() is None
from fused_lm import _C; print(_C.__file__, _C.driver_version())
"""
    assert _output_of(installed, code).startswith(str(installed.package / "_C.abi3.so"))


@needs_toolchain
@pytest.mark.slow
def test_the_races_are_installed(installed: Installed) -> None:
    """With all that they import: what lies beside the package in a checkout isn't there."""
    code = f"""
import importlib, sys
for name in {commands.BENCHMARKS}:
    importlib.import_module(f"fused_lm.benchmarks.{{name}}")
assert "benchmarks" not in sys.modules and "build_tools" not in sys.modules
from fused_lm.commands.bench import RACES, benchmarks_place
from fused_lm.benchmarks.contest import RACES as known
assert sorted(RACES) == sorted(known)
print(benchmarks_place().package)
"""
    assert _output_of(installed, code).strip() == "fused_lm.benchmarks"


@needs_toolchain
@pytest.mark.slow
def test_one_sentence_where_it_can_not_run(installed: Installed) -> None:
    """With the real library loaded into a torch without CUDA, or on a machine without a GPU."""
    code = """
import torch, fused_lm
from fused_lm.cuda import extension
x = torch.zeros(2, 8)
for change in (None, "13.0"):
    torch.version.cuda = change or torch.version.cuda
    extension.forget()
    assert extension.why_not() is None
    with fused_lm.use_backend("cuda"):
        for value in (x, x.double()):
            try:
                fused_lm.layer_norm(value)
            except RuntimeError as error:
                print(str(error).split("\\n")[2].strip())
try:
    op = torch.ops.fused_lm.layer_norm_fwd
    op(x, None, None, None, None, 1e-5, 0.0, x.dtype, x.dtype, "cuda")
except NotImplementedError as error:
    print(str(error).split(". ")[0])
"""
    lines = _output_of(installed, code).splitlines()
    if torch.version.cuda is None:
        assert "is built without CUDA; mend: pip install" in lines[0]
    assert "float64 runs through the reference" in lines[1]
    assert "the CUDA kernels run on NVIDIA GPUs, got a cpu tensor" in lines[2]
    assert "float64 runs through the reference" in lines[3]
    assert lines[4].startswith("Could not run 'fused_lm::cuda_layer_norm_fwd' with arguments")


@needs_toolchain
@pytest.mark.slow
def test_the_abi_is_stable(installed: Installed) -> None:
    audit = pytest.importorskip("torch_abi_audit").__name__
    code = f"import sys; from {audit}.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "./_C.abi3.so", "--check", "both"]
    done = _run(command, installed.package)
    found = done.returncode == 0, "unstable=0" in done.stdout, "min-torch=2.10" in done.stdout
    assert all(found), done.stdout


@needs_toolchain
@pytest.mark.slow
def test_symbols(installed: Installed) -> None:
    """No CUDA library is needed: any torch loads the file, whatever CUDA it is built with."""
    library = str(installed.package / "_C.abi3.so")
    needed = _run(["readelf", "-dW", library], installed.package).stdout
    assert "libtorch.so" in needed
    for name in ("libcudart", "libcuda", "libtorch_cuda", "libc10_cuda", "libtorch_python"):
        assert name not in needed
    undefined = _run(["nm", "-D", "--undefined-only", library], installed.package).stdout
    cuda = [line.split() for line in undefined.splitlines() if "cuda" in line.lower()]
    assert [kind for kind, name in cuda if name == "aoti_torch_get_current_cuda_stream"] == ["w"]
    assert {name for kind, name in cuda if kind != "w"} <= {"aoti_torch_device_type_cuda"}
    text = Path(library).read_bytes()
    for path in (ROOT, installed.package.parents[4], Path(torch.__file__).parent, Path.home()):
        assert f"{path}/".encode() not in text, "a path of this machine is compiled in"


@needs_toolchain
@pytest.mark.slow
def test_hashes_are_those_of_instructions(shared: Path, installed: Installed) -> None:
    """Another folder, the same code: the file's path is in the kernels' names, not in the hash."""
    source = _copy_of_the_source(shared / f"elsewhere-{os.getpid()}")
    kernel = source / "csrc/kernels/layernorm_fwd.cu"
    kernel.write_text(kernel.read_text() + "\n// A comment changes nothing.\n")
    (source / "csrc/kernels/layernorm_bwd.cu").unlink()
    tools = toolchain.find()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_build, "ROOT", source)
        units = cuda_build.units_of(source / "csrc/kernels", [ARCH])
        text = cuda_build.ninja_file(tools, units, source / "o", source / "_C.so", "hash")
        (source / "o/layernorm_fwd").mkdir(parents=True)
        (source / "o/build.ninja").write_text(text)
    ninja = [tools.ninja, "-f", "o/build.ninja", str(source / "o/layernorm_fwd.cu.o")]
    done = _run(ninja, source, **FAST)
    assert done.returncode == 0, done.stdout
    found = cuda_build.sass.hashes_of(source / "o/layernorm_fwd", [ARCH], ARCH)
    assert found == installed.report["kernels"]["layernorm_fwd"]


@pytest.mark.slow
def test_an_install_without_nvcc(tmp_path: Path) -> None:
    source = _copy_of_the_source(tmp_path / "source")
    python = _environment_with(tmp_path / "environment", sees="torch")
    text, installed = _install(python, str(source), tmp_path, **_without_nvcc())
    assert "fused_lm-0.1.0-py3-none-any.whl" in text
    assert not list(installed.package.glob("_C.*"))
    why = "nvcc was found neither in CUDA_HOME, on PATH nor in the nvidia-cuda-nvcc wheel"
    assert installed.report["why"] == why
    code = """
import sys; sys.path.append(sys.argv[1]); import torch, fused_lm
from fused_lm.commands import doctor; print(doctor._extension())
print(fused_lm.layer_norm(torch.ones(2, 8)).shape)
"""
    done = _run([str(python), "-c", code, str(SITE)], tmp_path)
    mend = "mend: pip install 'nvidia-cuda-nvcc==13.0.*'"
    assert why in done.stdout and mend in done.stdout, done.stdout
    assert "FUSED_LM_FORCE_CUDA=1 pip install --force-reinstall --no-deps ." in done.stdout
    assert "torch.Size([2, 8])" in done.stdout


@pytest.mark.slow
def test_an_install_without_torch(tmp_path: Path) -> None:
    """pip resolves torch after it has built us: the first install of all has no headers."""
    source = _copy_of_the_source(tmp_path / "source")
    python = _environment_with(tmp_path / "environment", sees="nothing")
    _, installed = _install(python, str(source), tmp_path)
    assert str(installed.report["why"]).startswith("torch's headers were not found in")
    assert str(installed.report["mend"]).startswith("pip install 'torch>=2.10'")


def test_force_makes_it_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once with no compiler, by the hook; once with a target that this one doesn't know."""
    commands.found.cache_clear()
    monkeypatch.setenv("FUSED_LM_FORCE_CUDA", "1")
    sentence = "nvcc was found neither"
    with pytest.raises(SystemExit, match=f"FUSED_LM_FORCE_CUDA=1, but {sentence}.* Mend: pip"):
        commands._give_up(tmp_path, Missing(sentence, "pip install x"))
    assert not list(tmp_path.iterdir())
    source = _copy_of_the_source(tmp_path / "source")
    done = _build(source, "build_wheel", FUSED_LM_FORCE_CUDA="1", FUSED_LM_CUDA_ARCHS="70")
    assert done.returncode != 0
    assert "fused_lm: FUSED_LM_FORCE_CUDA=1, but " in done.stdout.splitlines()[-1]
    if WHY_NOT is None:
        assert "FUSED_LM_CUDA_ARCHS='70' names '70', this nvcc compiles for: 80" in done.stdout


def test_skip(tmp_path: Path) -> None:
    source = _copy_of_the_source(tmp_path / "source")
    done = _build(source, "build_wheel", FUSED_LM_SKIP_CUDA="1", FUSED_LM_FORCE_CUDA="1")
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1] == "fused_lm-0.1.0-py3-none-any.whl"
    assert "because FUSED_LM_SKIP_CUDA was set at the install" in done.stdout
