"""What a run of the GPU suite found, as a record: ``python -m benchmarks.keep suite.tar.gz``.

The record is ``benchmarks/results/<gpu>/<date>-<commit>/``, without logs and caches:

environment.json   the machine, and when
build.json         what the CUDA kernels that ran were built of
stages.json        each stage: how it went, what it said last, seconds
results.jsonl      ``fused-lm verify``: parity and times of each kernel, a line per case
roofs.jsonl        what this GPU can do at most
attention.jsonl    and other races: a line per case, contestant and pass, or why there is none
tune.jsonl         a line per tile that was tried (:mod:`benchmarks.tune`)
kernels.txt        every CUDA kernel that the tests ran, as CUPTI saw them
proofs.txt         how the kernels' tests went, and what each sanitizer reported

A record of the same GPU, day and commit is replaced. Of a dry run there is none.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .call_share import SANITIZERS
from .contest import RACES
from .diary import whole_lines
from .gpu_calls import CALLS, KERNELS, Proof
from .gpu_suite import BUILD, STATE
from .record import RESULTS, counts_more, slug
from .stages import LOG
from .suite_archive import unpack

LAST_WORDS = re.compile(r"\d+ (passed|failed|error)|SUMMARY|^FAILED")
OF_THE_USER = ("records", "forced backend")
"""What ``doctor`` says that is no property of the machine."""


def keep(archive: Path, results: Path = RESULTS) -> Path:
    """Writes the record of an archive; returns its folder.

    Raises:
        ValueError: The archive is of a dry run.
    """
    with tempfile.TemporaryDirectory() as temporary:
        suite = Path(temporary)
        unpack(archive, suite)
        state = json.loads((suite / STATE).read_text())
        if state["device"] != "cuda":
            raise ValueError(f"{archive} is of a dry run on a CPU, which proves nothing of a GPU")
        folder = results / slug(state["gpu"]) / f"{state['pieces'][0][:10]}-{state['commit']}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        stages = state.pop("stages")
        _write(folder / "environment.json", {**state, **_machine(suite)})
        _write(folder / "stages.json", stages)
        if (suite / BUILD).is_file():
            _write(folder / BUILD, json.loads((suite / BUILD).read_text()))
        _write_lines(folder / "results.jsonl", verified(suite))
        _write_lines(folder / "roofs.jsonl", _lines(suite / "roofs/roofs.jsonl"))
        for race in (*RACES, "tune"):
            lines = _lines(suite / race / f"{race}.jsonl")
            _write_lines(folder / f"{race}.jsonl", (line for line in lines if "event" not in line))
        (folder / "proofs.txt").write_text("\n".join(_proofs(suite)) + "\n")
        if (suite / "kernels" / CALLS).is_file():  # without a name, if CUPTI saw none
            names = sorted(Proof(suite / "kernels").kernels)
            (folder / KERNELS).write_text("".join(f"{name}\n" for name in names))
    return folder


def _machine(suite: Path) -> dict[str, Any]:
    """What ``doctor`` said of it; nothing if it wasn't reached."""
    try:
        said = json.loads((suite / "environment" / LOG).read_text())
    except (OSError, ValueError):
        return {}
    about = {k: v for k, v in said["environment"].items() if k not in OF_THE_USER}
    about["platform"] = about["platform"].split("-")[0]
    return {"environment": about, "gpus": said["gpus"]}


def verified(suite: Path) -> Iterator[dict[str, Any]]:
    """A line per kernel and case."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path in sorted(suite.glob("record*/results.jsonl")):
        for line in _lines(path):
            key = tuple(line.get(name) for name in ("op", "case", "dtype", "backend", "kernel"))
            if key not in found or counts_more(line, found[key]):
                found[key] = line
    yield from found.values()


def _proofs(suite: Path) -> Iterator[str]:
    """Last words of tests, and what compute-sanitizer reported."""
    for name in ("kernels", "wrappers", *SANITIZERS):
        folder = suite / name
        if (folder / CALLS).is_file():
            proof = Proof(folder)
            yield from (f"== {name}", *proof.words(), proof.sum_up())
        elif (folder / LOG).is_file():
            lines = (folder / LOG).read_bytes().decode(errors="replace").splitlines()
            yield f"== {name}"
            yield from (line.strip()[:200] for line in lines if LAST_WORDS.search(line))


def _lines(path: Path) -> list[dict[str, Any]]:
    return list(whole_lines(path)) if path.is_file() else []


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def _write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """None, if there are none."""
    texts = [json.dumps(line) + "\n" for line in lines]
    if texts:
        path.write_text("".join(texts))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.keep")
    parser.add_argument("archive", type=Path, nargs="+")
    for archive in parser.parse_args().archive:
        print(keep(archive))


if __name__ == "__main__":
    main()
