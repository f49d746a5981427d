"""The learning curve of a run as a PNG, drawn from its log."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fused_lm.lm.atomic import write_atomically

FILE_NAME = "curve.png"
GOAL_SHARE = 0.65
"""Share of the unigram entropy below which a model has clearly learned more than pairs of bytes."""

_INK = "#1f2933"
_TRAIN = "#2b6cb0"
_VALIDATION = "#d9480f"
_RATE = "#7b8794"


def draw_curve(
    entries: Sequence[dict[str, Any]],
    path: str | os.PathLike[str],
    *,
    title: str,
    unigram_bits: float,
    bigram_bits: float,
) -> Path:
    """Draws bits per byte and learning rate over steps.

    Args:
        entries: Lines of a run's log; those of kind "train" and "validation" are drawn.
        path: Of the PNG.
        title: First line names the model, further lines are smaller.
        unigram_bits, bigram_bits: Entropies of the text in bits per byte, drawn as levels.
    Returns:
        The path written.
    Raises:
        ImportError: Without matplotlib.
        OSError: If the file can't be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 6.0), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    train = [e for e in entries if e.get("kind") == "train"]
    validation = [e for e in entries if e.get("kind") == "validation"]
    _draw_bits(top, train, validation)
    _draw_levels(top, unigram_bits, bigram_bits)
    _frame(top, train, validation, unigram_bits)
    steps = [e["step"] for e in train]
    bottom.fill_between(steps, [e["lr"] for e in train], color=_RATE, alpha=0.25, linewidth=0)
    bottom.plot(steps, [e["lr"] for e in train], color=_RATE, linewidth=1.0)
    bottom.set_ylabel("learning rate", color=_RATE)
    bottom.set_ylim(bottom=0)
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    bottom.set_xlabel("step")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_INK)
    head, _, rest = title.partition("\n")
    figure.suptitle(head, fontsize=13, fontweight="bold", color=_INK, x=0.02, ha="left")
    top.set_title(rest, fontsize=9, color=_RATE, loc="left")
    path = Path(path)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_atomically(path, picture.getvalue())
    return path


def smooth(values: Sequence[float], reach: int) -> list[float]:
    """Mean over ``reach`` neighbours on each side; fewer, but as many on both, near the ends."""
    means = []
    for i in range(len(values)):
        near = min(reach, i, len(values) - 1 - i)
        window = values[i - near : i + near + 1]
        means.append(sum(window) / len(window))
    return means


def _draw_bits(
    axes: Any, train: Sequence[dict[str, Any]], validation: Sequence[dict[str, Any]]
) -> None:
    steps = [e["step"] for e in train]
    bits = [e["bits_per_byte"] for e in train]
    axes.plot(steps, bits, color=_TRAIN, alpha=0.22, linewidth=0.8)
    axes.plot(steps, smooth(bits, len(bits) // 40), color=_TRAIN, linewidth=1.8, label="training")
    on_the_way = [e for e in validation if not e.get("final")]
    axes.plot(
        [e["step"] for e in on_the_way],
        [e["bits_per_byte"] for e in on_the_way],
        color=_VALIDATION,
        marker="o",
        markersize=4.5,
        markeredgecolor="white",
        linewidth=1.2,
        label="validation",
    )
    if validation:
        # Not joined to the line: the last evaluation reads more of the text, so it may step.
        last = validation[-1]
        axes.plot(
            [last["step"]],
            [last["bits_per_byte"]],
            color=_VALIDATION,
            marker="*",
            markersize=13,
            markeredgecolor="white",
            linestyle="none",
            label="validation at the end",
        )
        axes.annotate(
            f"{last['bits_per_byte']:.3f}",
            (last["step"], last["bits_per_byte"]),
            textcoords="offset points",
            xytext=(0, -15),
            ha="right",
            color=_VALIDATION,
            fontweight="bold",
        )


def _draw_levels(axes: Any, unigram_bits: float, bigram_bits: float) -> None:
    """Levels to compare with, named at the right edge."""
    goal = GOAL_SHARE * unigram_bits
    levels = (
        (unigram_bits, f"byte frequencies\n{unigram_bits:.2f}", "--"),
        (bigram_bits, f"byte pairs\n{bigram_bits:.2f}", ":"),
        (goal, f"goal: {GOAL_SHARE:g} x\nfrequencies\n{goal:.2f}", "-."),
    )
    for level, name, style in levels:
        axes.axhline(level, color=_INK, linewidth=0.9, linestyle=style, alpha=0.65)
        axes.annotate(
            name,
            (1.0, level),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            xytext=(5, 0),
            va="center",
            fontsize=8,
            color=_INK,
        )


def _frame(
    axes: Any,
    train: Sequence[dict[str, Any]],
    validation: Sequence[dict[str, Any]],
    unigram_bits: float,
) -> None:
    """Limits that spend the height on learning, not on the first few steps."""
    bits = [e["bits_per_byte"] for e in (*train, *validation)]
    lowest = min([*bits, GOAL_SHARE * unigram_bits])
    after_start = [*bits[len(train) // 10 : len(train)], *bits[len(train) :]]
    highest = max([1.1 * unigram_bits, *after_start])
    axes.set_ylim(0.9 * lowest, 1.02 * highest or 1.0)
    axes.set_ylabel("bits per byte", color=_INK)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, fontsize=9, loc="upper right")
