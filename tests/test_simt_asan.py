"""Operators' tests once more, with kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

The sanitizers must be in a process from its start, so pytest runs in one of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simt import backend as simt
from tests.simt import build, report, runtime
from tests.simt.planted import sanitized

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    simt.PROBLEM is not None or runtime.sanitized(), reason=str(simt.PROBLEM or "we are it")
)


OPERATORS = {
    "norms": (60, ["tests/test_layernorm.py", "tests/test_simt_layernorm.py"]),
    "losses": (60, ["tests/test_cross_entropy.py", "tests/test_simt_cross_entropy.py"]),
    "losses, with the head": (
        50,
        ["tests/test_linear_cross_entropy.py", "tests/test_linear_cross_entropy_products.py"],
    ),
    "attention": (50, ["tests/test_attention.py", "tests/test_simt_attention_weights.py"]),
    "attention, every kernel": (
        140,
        ["tests/test_simt_attention.py", "tests/test_simt_attention_bwd.py"],
    ),
    "attention, decoding": (
        60,
        ["tests/test_attention_decode.py", "tests/test_simt_attention_decode.py"],
    ),
    "attention, packed": (
        75,
        ["tests/test_attention_varlen.py", "tests/test_simt_attention_varlen.py"],
    ),
    "attention, Hopper": (120, ["tests/test_simt_attention_sm90.py"]),
    "attention, Hopper's backward": (60, ["tests/test_simt_attention_bwd_sm90.py"]),
    "attention, packed, backward": (50, ["tests/test_simt_attention_varlen_bwd.py"]),
    "linear layers": (
        130,
        ["tests/test_linear_act.py", "tests/test_ffn.py", "tests/test_simt_linear_act.py"],
    ),
    "linear layers, every GPU, and with a residual": (
        60,
        [
            *("tests/test_simt_linear_act_sm80.py", "tests/test_linear_residual.py"),
            "tests/test_simt_linear_residual.py",
        ],
    ),
}
"""How many tests run at least, and of which files."""


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS)
def test_under_the_sanitizers(operator: str) -> None:
    least, files = OPERATORS[operator]
    build.build("asan")
    pytest_alone = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*pytest_alone, "-k", "simt_asan", *files],
        cwd=ROOT,
        env={**os.environ, **sanitized.environment()},
        capture_output=True,
        text=True,
        check=False,
    )
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-6000:]
    passed = re.search(r"(\d+) passed", text)
    assert passed and int(passed[1]) >= least, text[-2000:]
    ran = re.search(r"\d+ kernels in \d+ instantiations, in the builds asan; \d+ schedules", text)
    assert ran, text[-2000:]
    report.SANITIZED.add(ran[0])
