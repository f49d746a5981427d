"""Plots of the races, PNG and SVG, one message each: who is how fast over length or width, with a
line for every contestant, named at its end, and the roof.

Two versions of matplotlib draw two files. So an SVG holds a hash of what is drawn in it, and that
is what a test compares.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .contest import OURS
from .record import Record, gpus, roofs_of, slug, times_of

FOLDER = "benchmarks/plots"
INK, GREY, PALE = "#1f2933", "#7b8794", "#cbd2d9"
OUR_COLORS = ("#c2410c", "#0f766e", "#7c3aed", "#b45309", "#9f1239")
BESIDE: dict[str, Any] = {"textcoords": "offset points", "xycoords": "data"}
ROOM = 1.08
"""Of an axis, in units of what is highest on it."""
LEAST_POINTS = 2
"""Of a line: less is no curve."""
WORDS = {"fwd": "forward", "bwd": "backward", "step": "forward and backward", "train": "step"}


@dataclass(frozen=True)
class Plot:
    """One drawing.

    Attributes:
        lines: Contestant -> its points (x, y); bars have one point each.
        roof: A level that nobody can pass, and its name.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    lines: dict[str, list[tuple[float, float]]]
    roof: tuple[float, str] | None = None
    bars: bool = False

    def message(self) -> str:
        """Ours at the largest x, and by how much it is ahead or behind."""
        largest = max(line[-1][0] for name, line in self.lines.items() if name in OURS)
        ends = {n: line[-1][1] for n, line in self.lines.items() if line[-1][0] == largest}
        mine = max((value, name) for name, value in ends.items() if name in OURS)
        peers = [(value, name) for name, value in ends.items() if name not in OURS]
        at = "" if self.bars else f"At {largest:,.0f}: "
        said = f"{at}{mine[1]} {_number(mine[0])} {self.y_label}"
        if peers:
            best = max(peers)
            said += f", {mine[0] / best[0]:.2f} times the fastest other, {best[1]}"
        return said

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


@dataclass(frozen=True)
class Series:
    """Which cases of a race make a plot: those whose name matches, x its first group."""

    race: str
    way: str
    pattern: str
    title: str
    x_label: str
    unit: str
    roof: str


SERIES = [
    *(
        Series(
            *("attention", way, rf"{kind} d{dim} t(\d+) bfloat16"),
            f"Attention, {kind}, head dim {dim}, {WORDS[way]}, bf16",
            *("tokens in a sequence, 16k in all", "tflops", "matmul bf16"),
        )
        for kind in ("causal", "full")
        for dim in (64, 128)
        for way in ("fwd", "bwd")
    ),
    *(
        Series(
            *("layernorm", way, rf"{norm}\+residual c(\d+) bfloat16"),
            f"{title} with residual add, {WORDS[way]}, bf16",
            *("width", "tbps", "copy"),
        )
        for norm, title in (("layer", "LayerNorm"), ("rms", "RMSNorm"))
        for way in ("fwd", "bwd")
    ),
    *(
        Series(
            *("ffn", way, r"gelu_tanh c(\d+) f\d+ n16384 bfloat16"),
            f"Feed-forward network, GELU, {WORDS[way]}, bf16",
            *("width", "tflops", "matmul bf16"),
        )
        for way in ("fwd", "step")
    ),
    *(
        Series(
            *("block", way, r"gpt2 c(\d+) h\d+ t1024 bfloat16"),
            f"A block of GPT-2, {WORDS[way]}, bf16",
            *("width", "tflops", "matmul bf16"),
        )
        for way in ("fwd", "step")
    ),
]
Y_LABELS = {"tflops": "TFLOP/s", "tbps": "TB/s"}
ROOF_NAMES = {"matmul bf16": "cuBLAS, 8192 cubed", "copy": "a copy of 1 GiB"}


def plots(found: list[Record]) -> Iterator[Plot]:
    """What there is enough of to draw."""
    for gpu in gpus(found):
        roofs = roofs_of(gpu, found)
        for series in SERIES:
            lines: dict[str, list[tuple[float, float]]] = {}
            for line in times_of(series.race, gpu, found):
                match = re.fullmatch(series.pattern, line["case"])
                if match and line["pass"] == series.way:
                    point = float(match[1]), float(line[series.unit])
                    lines.setdefault(line["contestant"], []).append(point)
            kept = {n: sorted(p) for n, p in sorted(lines.items()) if len(p) >= LEAST_POINTS}
            if any(name in OURS for name in kept):
                roof = roofs.get(series.roof)
                yield Plot(
                    f"{slug(gpu)}-{slug(series.title)}",
                    f"{series.title}: {gpu}",
                    *(series.x_label, Y_LABELS[series.unit], kept),
                    None if roof is None else (roof, ROOF_NAMES[series.roof]),
                )
        yield from _training(gpu, found)


def _training(gpu: str, found: list[Record]) -> Iterator[Plot]:
    cases: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for line in times_of("train", gpu, found):
        bar = [(0.0, float(line["tokens_per_s"]))]
        cases.setdefault(line["case"], {})[line["contestant"]] = bar
    for case, bars in cases.items():
        if not any(contestant in OURS for contestant in bars):
            continue
        name = f"{slug(gpu)}-train-{slug(case.split()[0])}"
        title = f"Training {case.split()[0]}, optimizer included: {gpu}"
        yield Plot(name, title, "", "tokens a second", bars, bars=True)


def draw_all(found: list[Record], folder: Path) -> list[Path]:
    """Draws all of them; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    return [path for plot in plots(found) for path in draw(plot, folder)]


def draw(plot: Plot, folder: Path) -> list[Path]:
    """``NAME.svg`` and ``NAME.png``."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 4.8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    (_draw_bars if plot.bars else _draw_lines)(axes, plot)
    axes.set_title(plot.message(), loc="left", color=INK, fontsize=9.5)
    figure.suptitle(plot.title, x=0.01, ha="left", color=INK, fontsize=11.5, fontweight="bold")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    files = [folder / f"{plot.name}.svg", folder / f"{plot.name}.png"]
    with matplotlib.rc_context({"svg.hashsalt": "fused_lm", "svg.fonttype": "none"}):
        about = {"Date": None, "Description": f"data {plot.digest()}"}
        figure.savefig(files[0], metadata=about)
    figure.savefig(files[1], metadata={"Software": None})
    return files


def _draw_lines(axes: Any, plot: Plot) -> None:
    points = [point for line in plot.lines.values() for point in line]
    first, top = min(x for x, _ in points), max(y for _, y in points)
    for name, line in plot.lines.items():
        ours = name in OURS
        xs, ys = zip(*line, strict=True)
        color, width = _color(name, GREY), 2.4 if ours else 1.2
        axes.plot(xs, ys, color=color, marker="o", markersize=2 * width, linewidth=width)
    if plot.roof is not None:
        level, name = plot.roof
        top = max(top, level)
        axes.axhline(level, color=PALE, linewidth=1.2, zorder=1)
        axes.annotate(name, (first, level), (0, 3), **BESIDE, color=GREY, fontsize=8)
    axes.set_ylim(0, ROOM * top)
    axes.set_xscale("log", base=2)
    ticks = sorted({x for x, _ in points})
    axes.set_xticks(ticks, [f"{x:,.0f}" for x in ticks])
    axes.minorticks_off()
    axes.set_xlabel(plot.x_label, color=INK)
    axes.set_ylabel(plot.y_label, color=INK)
    _name_lines(axes, plot, top)


def _name_lines(axes: Any, plot: Plot, top: float) -> None:
    """At their ends, apart where two end together."""
    heights = _apart([line[-1][1] for line in plot.lines.values()], top / 24)
    inches = axes.get_position().height * axes.figure.get_figheight()
    for (name, line), height in zip(plot.lines.items(), heights, strict=True):
        up = (height - line[-1][1]) / (ROOM * top) * inches * 72.0
        weight = "bold" if name in OURS else "normal"
        style = {"color": _color(name, GREY), "fontsize": 8.5, "fontweight": weight}
        axes.annotate(name, line[-1], (10, up), **BESIDE, va="center", **style)


def _color(name: str, others: str) -> str:
    return OUR_COLORS[OURS.index(name)] if name in OURS else others


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """The values, moved so that none is nearer to another than the gap, in their order."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    placed = [0.0] * len(values)
    below = float("-inf")
    for i in order:
        placed[i] = below = max(values[i], below + gap)
    return placed


def _draw_bars(axes: Any, plot: Plot) -> None:
    """Bars lie, so that their names can be read; the fastest on top."""
    bars = sorted(((points[0][1], name) for name, points in plot.lines.items()))
    for place, (value, name) in enumerate(bars):
        axes.barh(place, value, color=_color(name, PALE), height=0.7)
        style = {"va": "center", "color": INK, "fontsize": 9}
        axes.annotate(f"{value:,.0f}", (value, place), (4, 0), **BESIDE, **style)
    axes.set_xticks([])
    axes.set_yticks(range(len(bars)), [name for _, name in bars])
    axes.set_xlim(0, 1.15 * bars[-1][0])
    axes.set_xlabel(plot.y_label, color=INK)


def digest_in(svg: Path) -> str | None:
    """What an SVG says that it was drawn from."""
    found = re.search(r"data ([0-9a-f]{16})", svg.read_text())
    return found[1] if found else None
