"""Tiles of the CUDA attention kernels: the recorded sweeps' order beside the rows of
``csrc/kernels/attention_tuning.h``. ``python -m benchmarks.tune choose`` prints it.

A sweep is ``tiles.jsonl`` of a record: a kernel of its own per tile, compiled alone, timed on the
plain calls (no feature) of several lengths, causal and full. A tile's ratio is the geometric mean,
over the calls that all tiles of its kernel and head dim ran, of its time by the fastest tile's.
The fastest one is not always the row: it may spill on another architecture, which a sweep on one
doesn't see; what a row gives away is shown.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from .record import Line, Record

HEADER = Path(__file__).resolve().parents[1] / "csrc/kernels/attention_tuning.h"
FUNCTIONS = {
    "fwd": "attention_forward_plain_tuning",
    "dkdv": "attention_dkdv_tuning",
    "dq": "attention_dq_tuning",
}
HEAD_DIMS = (32, 64, 96, 128, 192, 256)
NAMES = ("rows_per_warp", "warps", "block", "blocks_per_sm")


class Tile(NamedTuple):
    """Rows of a warp, warps, positions of the other axis, blocks that registers leave room for."""

    rows_per_warp: int
    warps: int
    block: int
    blocks_per_sm: int


def rows(header: str) -> dict[tuple[str, int], Tile]:
    """(kernel, head dim) -> the header's row for plain calls of warps that own their rows alone.

    Raises:
        ValueError: A function isn't there, or has no row for a head dim.
    """
    found = {}
    for kernel, function in FUNCTIONS.items():
        body = re.search(rf"{function}\([^)]*\) \{{\n(.*?)\n\}}\n", header, re.DOTALL)
        if body is None:
            raise ValueError(f"no {function} in the header")
        code = re.sub(r"if \(general\) return[^;]*;", "", body[1])
        limits = re.split(r"if \(head_dim <= (\d+)\)", code)
        branches = [(int(n), text) for n, text in zip(limits[1::2], limits[2::2], strict=True)]
        for head_dim in HEAD_DIMS:
            found[kernel, head_dim] = _row(branches, head_dim)
    return found


def _row(branches: list[tuple[int, str]], head_dim: int) -> Tile:
    """Of the first branch that takes the head dim; what follows the last one is its alternative."""
    texts = [text for limit, text in branches if head_dim <= limit] or [branches[-1][1]]
    returned = re.findall(r"return \{(\d+), (\d+), (\d+), (\d+),", texts[0])
    if not returned:
        raise ValueError(f"no row for head dim {head_dim}")
    return Tile(*map(int, returned[0 if head_dim <= branches[-1][0] else -1]))


def ratios(lines: Iterable[Line]) -> dict[tuple[str, int], dict[Tile, float]]:
    """(kernel, head dim) -> tile -> its ratio, the fastest first."""
    times: dict[tuple[str, int], dict[Tile, dict[tuple[int, int], float]]] = {}
    for line in lines:
        if all(name in line for name in NAMES) and line["kernel"] in FUNCTIONS:
            tile = Tile(*(line[name] for name in NAMES))
            own = times.setdefault((line["kernel"], line["D"]), {}).setdefault(tile, {})
            call = line["T"], line["causal"]
            own[call] = min(line["us"], own.get(call, math.inf))  # variants of its code
    return {key: _of_one(tiles) for key, tiles in times.items()}


def _of_one(tiles: dict[Tile, dict[tuple[int, int], float]]) -> dict[Tile, float]:
    calls = set.intersection(*(set(times) for times in tiles.values()))
    if not calls:
        return {}
    means = {
        tile: math.exp(sum(math.log(times[call]) for call in calls) / len(calls))
        for tile, times in tiles.items()
    }
    fastest = min(means.values())
    return {tile: means[tile] / fastest for tile in sorted(means, key=lambda t: (means[t], t))}


def chosen(found: Iterable[Record]) -> Iterator[tuple[str, str, int, Tile, float | None, Tile]]:
    """GPU, kernel, head dim, the header's row, its ratio (None: never tried) and the fastest."""
    table = rows(HEADER.read_text())
    for record in found:
        for (kernel, head_dim), tiles in sorted(ratios(record.lines("tiles")).items()):
            if tiles and (row := table.get((kernel, head_dim))):
                yield record.gpu, kernel, head_dim, row, tiles.get(row), next(iter(tiles))


def report(found: Iterable[Record]) -> str:
    """A line per kernel and head dim."""
    text = []
    for gpu, kernel, head_dim, row, ratio, fastest in chosen(found):
        said = "never tried" if ratio is None else f"{ratio:.3f} of the fastest's time"
        text.append(f"{gpu}, {kernel} d{head_dim}: {tuple(row)}, {said}, {tuple(fastest)}")
    return "\n".join(text) or "no sweep of the CUDA kernels is recorded"
