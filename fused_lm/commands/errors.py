"""What a command raises when the user can mend it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """One sentence: what was got, what was expected. Printed without a traceback, exit code 2."""


def is_first_process() -> bool:
    """Whether this process speaks for all that ``torchrun`` started, or is the only one."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def one_sentence(*kinds: type[Exception]) -> Iterator[None]:
    """Turns the errors of the layers below into a UserError with the same sentence."""
    try:
        yield
    except kinds as error:
        raise UserError(str(error)) from error


EXTRAS = {
    "rich": "lm",
    "safetensors": "lm",
    "matplotlib": "lm",
    "tokenizers": "train",
    "tensorboard": "train",
}
"""Package -> the extra of ours that installs it."""


def need_extra(error: ImportError) -> UserError:
    """The error for a package that only some programs need."""
    package = (error.name or "").partition(".")[0]
    return UserError(
        f"this command needs the package {package}, which is not installed; "
        f'install it with: pip install "fused_lm[{EXTRAS.get(package, "lm")}]"'
    )
