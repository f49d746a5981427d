"""``fused-lm``: doctor, parity, verify, bench, train, eval, generate. Each command is a module
in ``commands/``.
"""

from __future__ import annotations

import argparse
import os
import sys

from fused_lm.commands import bench, doctor, eval, generate, parity, train, verify
from fused_lm.commands.errors import EXTRAS, UserError, is_first_process, need_extra
from fused_lm.version import __version__

COMMANDS = (doctor, parity, verify, bench, train, eval, generate)
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="fused-lm", description=__doc__)
    parser.add_argument("--version", action="version", version=f"fused_lm {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for module in COMMANDS:
        command = subparsers.add_parser(module.NAME, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except UserError as error:
        who = "" if is_first_process() else f" (process {os.environ['RANK']})"
        print(f"error{who}: {error}", file=sys.stderr)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRAS:
            raise
        print(f"error: {need_extra(error)}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
