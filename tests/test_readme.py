"""The README's example runs, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

from fused_lm.cli import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_runs() -> None:
    names: dict[str, object] = {}
    for example in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(example, names)
    assert names["lse"].shape == (2, 8, 1024)  # type: ignore[attr-defined]
    assert names["y"].shape == names["stream"].shape  # type: ignore[attr-defined]


def test_the_commands_exist() -> None:
    assert set(re.findall(r"fused-lm (\w+)", README)) <= {module.NAME for module in COMMANDS}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make ([\w-]+)", README)) <= targets


def test_the_map_shows_what_is_there() -> None:
    house = README.split("## The house")[1]
    for path in re.findall(r"^(\S+/)(?: |$)", house.split("```")[1], re.MULTILINE):
        assert (ROOT / path).is_dir(), path
