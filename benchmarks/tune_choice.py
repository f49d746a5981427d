"""Which tile the lines of a sweep choose: by them alone, so that everybody chooses the same.

A tile's ratio is its time by that of the table's row in the same batch. The row stands unless
another tile is faster by more than the noise: then that is the fastest, of equal ones the first by
its numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .record import Line

NOISE = 0.03
"""Of a ratio of two times that were taken in turns."""
ROW = "row "
"""Before the name of a contestant that is the table's row; the rest is its tile."""
BATCH = " #"
"""Between a spot's name and a batch's number."""

Config = dict[str, int]
Key = tuple[tuple[str, int], ...]


class Tile(NamedTuple):
    """One tile of a sweep."""

    config: Key
    ratio: float
    row: bool = False


def key_of(config: Config) -> Key:
    return tuple(sorted(config.items()))


def best(tiles: Sequence[Tile]) -> Tile:
    """The rule of this module."""
    fastest = min(tiles, key=lambda tile: (tile.ratio, tile.config))
    rows = [tile for tile in tiles if tile.row]
    return rows[0] if rows and fastest.ratio > 1.0 - NOISE else fastest


def standing(lines: Iterable[Line]) -> dict[tuple[str, str], list[Tile]]:
    """(gpu, spot) -> the tiles of the sweep that counts: of several, which differ by their commit,
    the last one that has timed what those before it chose. Of a dry run there is none.
    """
    sweeps: dict[tuple[str, str], dict[str, list[Line]]] = {}
    for line in lines:
        if line["gpu"] and "us" in line:
            spot, _, _ = line["case"].rpartition(BATCH)
            sweeps.setdefault((line["gpu"], spot), {}).setdefault(line["commit"], []).append(line)
    found: dict[tuple[str, str], list[Tile]] = {}
    for key, by_commit in sweeps.items():
        for own in by_commit.values():
            tiles = _tiles(own)
            before = found.get(key)
            if before is None or best(before).config in {tile.config for tile in tiles}:
                found[key] = tiles
    return found


def _tiles(lines: Sequence[Line]) -> list[Tile]:
    """Of one sweep of one spot. Where a batch's row failed, the fastest of those stands for it."""
    rows = {line["case"]: line["us"] for line in lines if line["contestant"].startswith(ROW)}
    others = min((line["us"] for line in lines if line["case"] not in rows), default=0.0)
    return [
        Tile(
            key_of(json.loads(line["contestant"].removeprefix(ROW))),
            line["us"] / rows.get(line["case"], others),
            line["contestant"].startswith(ROW),
        )
        for line in lines
    ]


def together(spots: Sequence[Sequence[Tile]]) -> list[Tile]:
    """For spots that share a row: each tile that all have tried, with its geometric mean."""
    ratios: dict[Key, list[float]] = {}
    rows = {tile.config for tiles in spots for tile in tiles if tile.row}
    for tiles in spots:
        own: dict[Key, float] = {}
        for tile in tiles:
            own[tile.config] = min(tile.ratio, own.get(tile.config, math.inf))
        for config, ratio in own.items():
            ratios.setdefault(config, []).append(ratio)
    return [
        Tile(config, math.exp(sum(map(math.log, found)) / len(found)), config in rows)
        for config, found in ratios.items()
        if len(found) == len(spots)
    ]
