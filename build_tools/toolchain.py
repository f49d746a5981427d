"""What a build of the extension needs, where it is found, and what to say where it isn't.

Under build isolation this code runs in the target environment's interpreter, but pip hides that
environment's packages from it. torch is no build requirement (pip would fetch another, gigabytes
large, for its headers alone): a second interpreter, started without pip's isolation, says where
torch and NVIDIA's wheels are.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MINIMUM_TORCH = (2, 10)
TOOLKIT_WHEELS = " ".join(
    f"'{name}==13.0.*'"
    for name in (
        "nvidia-cuda-nvcc",
        "nvidia-nvvm",
        "nvidia-cuda-crt",
        "nvidia-cuda-runtime",
        "nvidia-cuda-cccl",
    )
)
"""The whole of a toolkit that this build needs, on PyPI."""

_INSTALL_TOOLKIT = f"pip install {TOOLKIT_WHEELS}"
_HIDDEN_BY_PIP = ("PYTHONPATH", "PYTHONNOUSERSITE")
_QUERY = """
import importlib.util, json
def folders(name):
    spec = importlib.util.find_spec(name)
    return [] if spec is None else list(spec.submodule_search_locations or [])
print(json.dumps({name: folders(name) for name in ("torch", "nvidia")}))
"""


class Missing(Exception):
    """Why the extension can't be built; ``mend`` is what to run before the install, if anything."""

    def __init__(self, what: str, mend: str = "") -> None:
        super().__init__(what)
        self.mend = mend


@dataclass(frozen=True)
class Toolkit:
    """One CUDA toolkit.

    Attributes:
        version: Like ``"13.0"``.
        release: All of it, like ``"13.0.88"``: patch releases bring another ptxas.
        archs: What its compiler knows, like ``("80", "90", "90a")``.
    """

    nvcc: Path
    root: Path
    include: Path
    library: Path
    version: str
    release: str
    archs: tuple[str, ...]


@dataclass(frozen=True)
class Toolchain:
    """All that a build uses."""

    toolkit: Toolkit
    torch: Path
    torch_version: str
    python_include: Path
    ninja: str
    cxx: str
    cc: str


def find() -> Toolchain:
    """Everything, or the first thing that is missing.

    Raises:
        Missing: In one sentence, with the command that mends it.
    """
    if platform.system() != "Linux":
        raise Missing(f"the CUDA extension is built on Linux only, this is {platform.system()}")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise Missing("the CUDA extension has no build for free-threaded Python")
    packages = _target_packages()
    torch, version = _find_torch(packages["torch"])
    toolkit = _find_toolkit(packages["nvidia"])
    include = Path(sysconfig.get_path("include"))
    if not (include / "Python.h").is_file():
        raise Missing(f"Python.h is not in {include}", "apt-get install python3-dev")
    compilers = shutil.which("g++"), shutil.which("gcc")
    if None in compilers:
        raise Missing("no g++ and gcc were found on PATH", "apt-get install g++")
    return Toolchain(toolkit, torch, version, include, _find_ninja(), *map(str, compilers))


def find_toolkit() -> Toolkit:
    """nvcc and what belongs to it.

    Raises:
        Missing: There is none.
    """
    return _find_toolkit(_target_packages()["nvidia"])


def _target_packages() -> dict[str, list[str]]:
    """Folders of torch and of NVIDIA's wheels, as this process and the target environment see
    them.
    """
    environment = {k: v for k, v in os.environ.items() if k not in _HIDDEN_BY_PIP}
    homes = [os.environ.get(name) for name in ("VIRTUAL_ENV", "CONDA_PREFIX")]
    # A build frontend with an environment of its own (uv, build) runs another interpreter.
    pythons = [sys.executable, *(f"{home}/bin/python" for home in homes if home)]
    found: dict[str, list[str]] = {}
    for name in ("torch", "nvidia"):
        spec = importlib.util.find_spec(name)
        found[name] = list(spec.submodule_search_locations or ()) if spec else []
    for python in dict.fromkeys(pythons):
        command = [python, "-c", _QUERY]
        done = _run(command, env=environment, cwd=os.path.dirname(sys.executable))
        for name, folders in (json.loads(done) if done else {}).items():
            found[name] += [folder for folder in folders if folder not in found[name]]
    return found


def _find_torch(folders: list[str]) -> tuple[Path, str]:
    for folder in map(Path, folders):
        if (folder / "include/torch/csrc/stable/tensor.h").is_file():
            text = (folder / "version.py").read_text()
            version = re.search(r"__version__ = '([^']+)'", text)
            name = version[1] if version else "unknown"
            if tuple(int(part) for part in re.findall(r"\d+", name)[:2]) >= MINIMUM_TORCH:
                return folder, name
            raise Missing(f"torch {name} is older than 2.10", "pip install -U 'torch>=2.10'")
    raise Missing(
        f"torch's headers were not found in the environment of {sys.executable}",
        "pip install 'torch>=2.10'",
    )


def _find_toolkit(nvidia: list[str]) -> Toolkit:
    broken = None
    for nvcc in _nvccs(nvidia):
        try:
            return _toolkit_of(nvcc)
        except Missing as error:
            broken = broken or error
    raise broken or Missing(
        "nvcc was found neither in CUDA_HOME, on PATH nor in the nvidia-cuda-nvcc wheel",
        _INSTALL_TOOLKIT,
    )


def _nvccs(nvidia: list[str]) -> Iterator[Path]:
    """What the user named, then what the shell would run, then the wheel."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    on_path = shutil.which("nvcc")
    candidates = [Path(home) / "bin/nvcc" for home in homes if home]
    candidates += [Path(on_path)] if on_path else []
    for folder in nvidia:
        candidates += sorted(Path(folder).glob("cu[0-9]*/bin/nvcc"), reverse=True)
    yield from (path for path in candidates if path.is_file())


def _toolkit_of(nvcc: Path) -> Toolkit:
    """Asks nvcc itself where its toolkit is: what lies on PATH may be a script beside none."""
    dryrun = _run([str(nvcc), "--dryrun", "-x", "cu", os.devnull], streams=("stderr",))
    top = re.search(r"^#\$ TOP=(.+)$", dryrun or "", re.MULTILINE)
    version = re.search(r"release (\d+\.\d+), V([\d.]+)", _run([str(nvcc), "--version"]) or "")
    if top is None or version is None:
        raise Missing(f"{nvcc} does not run", _INSTALL_TOOLKIT)
    root = Path(top[1]).resolve()
    targets = root / "targets" / f"{platform.machine()}-linux"
    include = _holding("cuda_runtime.h", [root / "include", targets / "include"], nvcc)
    libraries = [root / "lib64", root / "lib", targets / "lib"]
    library = _holding("libcudart_static.a", libraries, nvcc)
    _holding("crt/host_config.h", [include], nvcc)
    _holding("cicc", [root / "nvvm/bin"], nvcc)
    archs = re.findall(r"sm_(\d+[af]?)", _run([str(nvcc), "--list-gpu-code"]) or "")
    return Toolkit(nvcc, root, include, library, version[1], version[2], tuple(archs))


def _holding(name: str, folders: list[Path], nvcc: Path) -> Path:
    for folder in folders:
        if (folder / name).is_file():
            return folder
    raise Missing(f"the toolkit of {nvcc} has no {name}", _INSTALL_TOOLKIT)


def _find_ninja() -> str:
    found = shutil.which("ninja")
    if found is None and importlib.util.find_spec("ninja") is not None:
        import ninja

        found = os.path.join(ninja.BIN_DIR, "ninja")
    if found is None:
        raise Missing("ninja was not found", "pip install ninja")
    return found


def _run(
    command: list[str], streams: tuple[str, ...] = ("stdout",), **options: object
) -> str | None:
    """What a command prints, None if it fails."""
    try:
        done = subprocess.run(  # type: ignore[call-overload]
            command, capture_output=True, text=True, timeout=60, check=True, **options
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return "".join(getattr(done, stream) for stream in streams)


def gpu_archs() -> list[str]:
    """Compute capabilities of this machine's GPUs, like ``["80", "90"]``."""
    listed = _run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]) or ""
    found = re.findall(r"^\s*(\d+)\.(\d)\s*$", listed, re.MULTILINE)
    return sorted({major + minor for major, minor in found}, key=int)


def free_gib() -> float:
    """Memory that a build may take: of the machine, and of the container it runs in."""
    meminfo = Path("/proc/meminfo").read_text()
    available = re.search(r"MemAvailable:\s+(\d+) kB", meminfo)
    free = int(available[1]) / 2**20 if available else 3.0
    cgroup = Path("/sys/fs/cgroup")
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):  # no limit reads "max"
        return free
    return min(free, (limit - used) / 2**30)


def jobs() -> int:
    """Compilers at once: nvcc takes up to 3 GiB, and a machine that swaps builds nothing."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, int(free_gib() / 3)))
