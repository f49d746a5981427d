"""What the records below ``benchmarks/results`` say, where people read it:
``python -m benchmarks.report`` writes

benchmarks/STATUS.md    which kernels have run on a GPU (:mod:`benchmarks.status`)
benchmarks/README.md    every race, a table each
README.md               a few rows of them
benchmarks/plots/       the same drawn (:mod:`benchmarks.plots`)

In the two README.md, text between ``<!-- NAME -->`` and ``<!-- end -->`` is generated, the rest is
not. A test fails where a file doesn't follow from the records.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import plots
from .contest import OURS, RACES
from .record import Line, Record, gpus, records, roofs_of, times_of
from .status import status

ROOT = Path(__file__).resolve().parents[1]
STATUS, TABLES, FRONT = "benchmarks/STATUS.md", "benchmarks/README.md", "README.md"
NOT_YET = "Not yet run on a GPU."
UNITS = {
    "attention": "tflops", "ffn": "tflops", "block": "tflops",
    "layernorm": "tbps", "loss": "us", "train": "tokens_per_s",
}  # fmt: skip
UNIT_NAMES = {
    "tflops": "TFLOP/s", "tbps": "TB/s", "us": "microseconds", "tokens_per_s": "tokens a second",
}  # fmt: skip
ROOFS = {
    "attention": "matmul bf16", "ffn": "matmul bf16", "block": "matmul bf16", "layernorm": "copy",
}  # fmt: skip
BESIDE = (
    "Most memory of a forward and backward beyond the inputs, MiB; the host's time of a forward, "
    "microseconds:"
)
FRONT_CASES = (
    ("attention", "causal d128 t4096 bfloat16", "fwd", "attention, causal, 4096 tokens, D = 128"),
    ("attention", "causal d128 t4096 bfloat16", "bwd", "its backward"),
    ("layernorm", "layer+residual c1024 bfloat16", "bwd", "LayerNorm + residual, backward, 1024"),
    ("block", "gpt2 c1600 h25 t1024 bfloat16", "step", "block of GPT-2 XL, forward and backward"),
    ("train", "gpt2-124M b16 t1024 autocast bfloat16", "train", "training step of GPT-2 124M"),
)
"""Race, case, pass, and how the first page calls it."""
MOST_FRONT_PEERS = 4


def written(found: list[Record], root: Path = ROOT) -> dict[str, str]:
    """Path below ``root`` -> what belongs there, of every text."""
    tables = {race: race_tables(race, found) for race in RACES}
    tables["roofs"] = roof_table(found)
    front = {"measured": front_table(found)}
    return {
        STATUS: status(found),
        TABLES: filled((root / TABLES).read_text(), tables),
        FRONT: filled((root / FRONT).read_text(), front),
    }


def filled(text: str, parts: dict[str, str]) -> str:
    """The text with what is between its marks replaced.

    Raises:
        ValueError: A part has no place, or a place no part.
    """
    places = re.findall(r"<!-- (?!end )(\w+) -->", text)
    if sorted(places) != sorted(parts):
        raise ValueError(f"places for {sorted(places)}, parts for {sorted(parts)}")
    for name, part in parts.items():
        found = re.search(rf"<!-- {name} -->\n(.*?)<!-- end -->", text, re.DOTALL)
        if found is None:
            raise ValueError(f"the place for {name} has no end")
        text = f"{text[: found.start(1)]}{part}\n{text[found.end(1) :]}"
    return text


def race_tables(race: str, found: list[Record]) -> str:
    """A table per GPU: a row per case and pass, a column per contestant, the best one bold."""
    parts = []
    for gpu in gpus(found):
        lines = times_of(race, gpu, found)
        if lines:
            when = ", ".join(sorted({f"{line['record']}" for line in lines}))
            roof = roofs_of(gpu, found).get(ROOFS.get(race, ""))
            unit = UNIT_NAMES[UNITS[race]]
            parts.append(f"{gpu}, {unit} ({when}):\n\n{_race_table(race, lines, roof)}")
            parts.append(f"{BESIDE}\n\n{_beside_table(lines)}")
    return "\n\n".join(parts) or NOT_YET


def _race_table(race: str, lines: Sequence[Line], roof: float | None) -> str:
    """With a last column, if there is a roof: how much of it the best of ours reaches."""
    unit, names = UNITS[race], _names(lines)
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for line in lines:
        rows.setdefault((line["case"], line["pass"]), {})[line["contestant"]] = line[unit]
    head = [*names, *(["ours, % of the roof"] if roof else [])]
    text = [f"| case | pass | {' | '.join(head)} |", f"| --- | --- |{' ---: |' * len(head)}"]
    for (case, way), values in rows.items():
        best = (min if unit == "us" else max)(values.values())
        cells = [_cell(values.get(name), best) for name in names]
        mine = max((value for name, value in values.items() if name in OURS), default=0.0)
        cells += [f"{100 * mine / roof:.0f}"] if roof else []
        text.append(f"| {case} | {way} | {' | '.join(cells)} |")
    return "\n".join(text)


def _names(lines: Iterable[Line]) -> list[str]:
    """Contestants, ours first."""
    return sorted({line["contestant"] for line in lines}, key=lambda n: (n not in OURS, n))


def _beside_table(lines: Sequence[Line]) -> str:
    """A row per case: memory and the host's time."""
    names = _names(lines)
    rows: dict[str, dict[str, str]] = {}
    for line in lines:
        mib = f"{line['step_mib']:,.0f}" if "step_mib" in line else "-"
        rows.setdefault(line["case"], {})[line["contestant"]] = f"{mib}, {line['host_us']:,.0f}"
    text = [f"| case | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    for case, cells in rows.items():
        text.append(f"| {case} | {' | '.join(cells.get(name, '') for name in names)} |")
    return "\n".join(text)


def _cell(value: float | None, best: float) -> str:
    if value is None:
        return ""
    shown = _shown(value)
    return f"**{shown}**" if value == best else shown


def _shown(value: float) -> str:
    """Three digits; whole numbers whole."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def roof_table(found: list[Record]) -> str:
    rows = []
    for gpu in gpus(found):
        roofs = roofs_of(gpu, found)
        if roofs:
            rows.append(
                f"| {gpu} | {roofs['copy']:g} | {roofs['matmul bf16']:g} | {roofs['launch']:g} |"
            )
    head = "| GPU | copy, TB/s | cuBLAS bf16, TFLOP/s | launch, microseconds of the host |"
    return "\n".join([head, "| --- | ---: | ---: | ---: |", *rows]) if rows else NOT_YET


def front_table(found: list[Record]) -> str:
    """Ours against the fastest others, in microseconds."""
    parts = []
    for gpu in gpus(found):
        rows = []
        for race, case, way, name in FRONT_CASES:
            lines = [
                line
                for line in times_of(race, gpu, found)
                if (line["case"], line["pass"]) == (case, way)
            ]
            rows += _front_row(name, lines)
        if rows:
            head = f"| {gpu}, bf16, microseconds | ours | others, the fastest first |"
            parts.append("\n".join([head, "| --- | --- | --- |", *rows]))
    return "\n\n".join(parts) or NOT_YET


def _front_row(name: str, lines: Iterable[Line]) -> list[str]:
    by_time = sorted(lines, key=lambda line: line["us"])
    ours = [line for line in by_time if line["contestant"] in OURS]
    peers = [line for line in by_time if line["contestant"] not in OURS][:MOST_FRONT_PEERS]
    if not ours or not peers:
        return []
    mine, others = f"{_shown(ours[0]['us'])} ({ours[0]['contestant']})", map(_named, peers)
    return [f"| {name} | {mine} | {', '.join(others)} |"]


def _named(line: Line) -> str:
    return f"{line['contestant']} {_shown(line['us'])}"


def main() -> None:
    found = records()
    for name, text in written(found).items():
        (ROOT / name).write_text(text)
        print(name)
    drawn = plots.draw_all(found, ROOT / plots.FOLDER)
    for path in (ROOT / plots.FOLDER).iterdir():
        if path not in drawn:  # of a record that is gone
            path.unlink()
    print(f"{len(drawn)} files in {plots.FOLDER}")


if __name__ == "__main__":
    main()
