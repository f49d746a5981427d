"""Kinds of arguments that several commands take."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


def number(
    kind: type, least: float, above: bool = False, most: float = 2**63 - 1
) -> Callable[[str], Any]:
    """An argparse type: a finite number of ``kind``, at least (or above) ``least``."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is not None and value > most:
            raise argparse.ArgumentTypeError(f"expected at most {most:g}, got {text!r}")
        if value is None or not (value > least if above else value >= least):
            what = "a whole number" if kind is int else "a number"
            bound = f"above {least:g}" if above else f"of at least {least:g}"
            raise argparse.ArgumentTypeError(f"expected {what} {bound}, got {text!r}")
        return value

    return parse
