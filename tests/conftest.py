"""Where Triton kernels run in these tests, and what every test shares."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import pytest  # noqa: E402

from fused_lm.triton_kernels import interpreter  # noqa: E402
from tests.simt import backend as simt  # noqa: E402
from tests.simt import runtime  # noqa: E402
from tests.simt.report import (  # noqa: E402, F401
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "not slow":
        runtime.allow_only(runtime.ONE)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs on every build of the harness: only on one of them in ``make test``."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        values = callspec.params.values() if callspec else ()
        if any(isinstance(v, str) and v in ("plain", "simt_plain") for v in values):
            item.add_marker(pytest.mark.slow)


WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, torch.get_num_threads() // WORKERS))


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """Random inputs follow from the test's own id: failures repeat, no two tests share inputs."""
    torch.manual_seed(_seed_of(request))


def _seed_of(request: pytest.FixtureRequest) -> int:
    return zlib.crc32(request.node.nodeid.encode())


@pytest.fixture(autouse=True)
def _simt(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test with a ``backend`` of the harness runs in a schedule that follows from its id."""
    callspec = getattr(request.node, "callspec", None)
    backend = callspec.params.get("backend") if callspec else None
    if not isinstance(backend, str) or backend not in simt.BACKENDS:
        yield
        return
    with simt.installed(backend, _seed_of(request)):
        yield


@pytest.fixture(params=simt.BACKENDS)
def harness(request: pytest.FixtureRequest) -> Iterator[runtime.Harness]:
    """Each build of the CUDA kernels for a CPU, in the schedule that a test chooses."""
    found = runtime.load(request.param.removeprefix(simt.PREFIX))
    yield found
    found.configure()


@pytest.fixture(scope="session", autouse=True)
def _interpreter() -> None:
    if not HAS_GPU:
        interpreter.patch_interpreter()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from a second thread, and wait for it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
