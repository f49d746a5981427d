"""What compilers say about the kernels, and of which code they said it.

Files per version of a compiler hold the resources; ``written_for.json`` names the code, so that
`make test` need not compile what hasn't changed. ``make golden`` writes all of it.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

FOLDER = Path(__file__).parent
CODE = FOLDER / "written_for.json"


def written_for(name: str) -> dict[str, str]:
    """Hashes of the code that ``<name>.json`` was written for, by source; empty if unknown."""
    return json.loads(CODE.read_text()).get(name, {}) if CODE.is_file() else {}


def compiled_kernels(units: str | tuple[str, ...], architectures: tuple[str, ...] = ()) -> set[str]:
    """Names of the CUDA kernels that are compiled from units whose names begin so, for some
    architectures, like "sm_90a", or any.
    """
    places = [place.split(" ", 2) for place in _places()]
    return {
        name
        for architecture, unit, name in places
        if unit.startswith(units) and (not architectures or architecture in architectures)
    }


@functools.cache
def _places() -> list[str]:
    """Architecture, unit and kernel in a line each, by the newest compiler."""
    newest = sorted(FOLDER.glob("cuda-*.json"))[-1]
    return [*json.loads(newest.read_text())]


def remember(name: str, hashes: dict[str, str]) -> None:
    """Notes what ``<name>.json`` is written for."""
    known = json.loads(CODE.read_text()) if CODE.is_file() else {}
    CODE.write_text(json.dumps({**known, name: hashes}, indent=1, sort_keys=True) + "\n")
