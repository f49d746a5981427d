"""Everything a GPU can tell, by one command:

``python -m benchmarks.gpu_suite --minutes 9 --out DIR``

Stages run in order of worth, each in a process of its own (:mod:`benchmarks.stages`), until the
minutes are over. ``DIR/suite.tar.gz`` then holds all of it, and ``--resume`` goes on from there, on
another machine as well: one that starts bare, without git, and stays for minutes. ``--quick``
proves the kernels and makes their record, in at most four minutes.

``--device cpu`` is a dry run: the same stages on tiny shapes, with Triton's interpreter and the
CUDA harness in the GPU's place. Nothing of it enters a record or a table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fused_lm.cuda import extension

from . import stages
from .gpu_stages import QUICK, all_stages
from .stages import Outcome, Stage, Status
from .suite_archive import CACHE, pack, unpack

ROOT = Path(__file__).resolve().parents[1]
STATE, ARCHIVE, SUMMARY, BUILD = "state.json", "suite.tar.gz", "summary.txt", "build.json"
FORMAT = 1
RESERVE_SECONDS = 8.0
"""Of a piece, for the archive and the table."""
QUICK_MINUTES = 4.0
MOST_ROUNDS = 6
"""Of a piece, over stages that their own limit, a crash or silence has left open."""


class Suite:
    """A run in pieces: what is known of each stage, on disk after every one of them."""

    def __init__(self, folder: Path, archive: Path, about: dict[str, Any]) -> None:
        self.folder, self.archive, self.about = folder, archive, about
        self.outcomes: dict[str, Outcome] = {}

    def resume(self, archive: Path) -> None:
        """Takes over what an archive holds.

        Raises:
            SystemExit: It is no archive of this suite, or of another commit or GPU.
        """
        try:
            unpack(archive, self.folder)
            about = json.loads((self.folder / STATE).read_text())
            self.outcomes = stages.load(self.folder / STATE)
        except (OSError, tarfile.TarError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{archive} is no archive of this suite: {error}") from error
        for name in ("format", "commit", "device", "gpu", "torch"):
            if about.get(name) != self.about[name]:
                other = f"{name} {about.get(name)!r}, here it is {self.about[name]!r}"
                raise SystemExit(f"{archive} is of {other}: results of two can't be one record")
        self.about["pieces"] = [*about["pieces"], *self.about["pieces"]]
        absent = [n for n, o in self.outcomes.items() if o.status is Status.ABSENT]
        self.reopen(absent)  # another machine may have what it takes

    def reopen(self, names: Iterable[str]) -> None:
        """Stages that failed or couldn't run are to run again."""
        for name in names:
            outcome = self.outcomes.get(name)
            if outcome is not None and outcome.status in (Status.FAILED, Status.ABSENT):
                self.outcomes[name] = replace(outcome, status=Status.UNFINISHED)

    def run(self, chosen: Sequence[Stage], end: float) -> None:
        """Stages that are open, until the clock (time.monotonic) says ``end``."""
        environment = {
            "PYTHONPATH": os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split()]),
            "PYTHONUNBUFFERED": "1",
            "XDG_CACHE_HOME": str(self.folder / CACHE),
            "TRITON_CACHE_DIR": str(self.folder / CACHE / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / CACHE / "inductor"),
            "TORCHINDUCTOR_COMPILE_THREADS": "2",
            "QUACK_CACHE_DIR": str(self.folder / CACHE / "quack"),
            "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1",
            "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": str(self.folder / CACHE / "flash_attention"),
            "COLUMNS": "160",
        }
        for _ in range(MOST_ROUNDS):
            if not self._round(chosen, end, environment):
                break

    def _round(self, chosen: Sequence[Stage], end: float, environment: Mapping[str, str]) -> bool:
        """Each open stage once; whether there was one that the time was enough for."""
        ran = False
        for _, group in itertools.groupby(chosen, lambda stage: stage.beside or stage.name):
            left = end - time.monotonic() - RESERVE_SECONDS
            begun = {
                stage: self.outcomes.get(stage.name, Outcome())
                for stage in group
                if self._is_open(stage) and left >= stage.least_s
            }
            for stage, before in begun.items():
                self.outcomes[stage.name] = replace(before, status=None, said="begun")
            if begun:
                self.keep()
                self._run_at_once(begun, left, environment)
                ran = True
        return ran

    def _is_open(self, stage: Stage) -> bool:
        return self.outcomes.get(stage.name, Outcome()).status in stages.OPEN

    def _run_at_once(
        self, begun: Mapping[Stage, Outcome], seconds: float, environment: Mapping[str, str]
    ) -> None:
        """Stages, each with its outcome so far."""
        with ThreadPoolExecutor(len(begun)) as pool:
            try:
                running = {
                    pool.submit(stages.run, stage, self.folder, seconds, before, environment): stage
                    for stage, before in begun.items()
                }
                for future in as_completed(running):
                    self._ended(running[future], future.result())
            finally:
                stages.stop_all()

    def _ended(self, stage: Stage, outcome: Outcome) -> None:
        self.outcomes[stage.name] = outcome
        self.keep()
        how = f"{_word(outcome.status)}: {stage.name}, {outcome.seconds:.0f} s"
        print(f"{how}: {outcome.said}", flush=True)

    def keep(self) -> None:
        """State and archive, as far as the disk takes them."""
        try:
            stages.save(self.folder / STATE, self.outcomes, self.about)
            pack(self.folder, self.archive)
        except OSError as error:
            print(f"not kept: {error}", file=sys.stderr, flush=True)

    def summary(self, chosen: Sequence[Stage]) -> str:
        """A row per stage."""
        where = self.about["gpu"] or "A CPU: nothing here is from a GPU"
        width = max(len(stage.name) for stage in chosen)
        rows = [f"{where}, commit {self.about['commit']}"]
        for stage in chosen:
            outcome = self.outcomes.get(stage.name)
            if outcome is None:
                rows.append(f"{stage.name:{width}} not reached")
            else:
                how = f"{_word(outcome.status):12} {outcome.seconds:5.0f} s  {outcome.said}"
                rows.append(f"{stage.name:{width}} {how}")
        return "\n".join(rows)


def _word(status: Status | None) -> str:
    return "begun" if status is None else status.value


def _commit() -> str:
    """The checkout's, with a + if something in it has changed; "unknown" without git."""
    try:
        git = ["git", "-C", str(ROOT)]
        options: dict[str, Any] = {"capture_output": True, "text": True, "check": True}
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], **options).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], **options).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + "+" * bool(changed.strip())


def _about(device: str, commit: str) -> dict[str, Any]:
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        "format": FORMAT,
        "device": device,
        "gpu": gpu,
        "commit": commit,
        "torch": torch.__version__,
        "pieces": [now],
    }


def _chosen(found: Iterable[Stage], quick: bool, only: Sequence[str]) -> Iterator[Stage]:
    for stage in found:
        if (not quick or stage.name in QUICK) and (not only or stage.name in only):
            yield stage


def stop(number: int, frame: object) -> None:
    """Of SIGTERM: what the stage at hand has started ends too."""
    raise SystemExit(128 + number)


def main() -> int:
    """Exit code 1 if a stage failed, 0 otherwise: what is open, the next piece does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="of this piece, all told")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for all results")
    parser.add_argument("--archive", type=Path, metavar="FILE", help=f"default: DIR/{ARCHIVE}")
    parser.add_argument("--resume", type=Path, metavar="ARCHIVE", help="go on from there")
    parser.add_argument("--commit", help="where there is no git")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE", help="only these")
    parser.add_argument("--contestants", nargs="+", default=[], metavar="NAME", help="of races")
    parser.add_argument("--quick", action="store_true", help="parity and record")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; --device cpu is a dry run")
    minutes = min(args.minutes, QUICK_MINUTES) if args.quick else args.minutes
    end = time.monotonic() + 60.0 * minutes
    commit = args.commit or _commit()
    found = all_stages(args.device, commit, args.contestants)
    unknown = {*args.only} - {stage.name for stage in found}
    if unknown:
        parser.error(
            f"no stage {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in found)}"
        )
    chosen = list(_chosen(found, args.quick, args.only))
    folder = args.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / BUILD).write_text(json.dumps(extension.build_report(), indent=1) + "\n")
    suite = Suite(folder, (args.archive or folder / ARCHIVE).resolve(), _about(args.device, commit))
    if args.resume:
        suite.resume(args.resume.resolve())
        suite.reopen(args.only)
    signal.signal(signal.SIGTERM, stop)
    try:
        suite.run(chosen, end)
    finally:
        (folder / SUMMARY).write_text(suite.summary(chosen) + "\n")
        suite.keep()
        print(suite.summary(chosen), flush=True)
    return int(any(outcome.status is Status.FAILED for outcome in suite.outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
